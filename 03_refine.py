"""Stage 3, self-refinement (SPA section 3.1 step 2; Figure 10).

The model sees the instruction, the definitions of the objectives and all its responses with their scores, and writes
one refined response ỹ, which it then scores in the same way as stage 2.

    reads   RUN_DIR/02_scores.jsonl
    writes  RUN_DIR/03_refined.jsonl, the same rows and
            {…, "refined": {"text": "…", "scores": [9, 8], "truncated": false}}
    run     python 03_refine.py --run_dir runs/default
    next    python 04_denoise.py --run_dir runs/default

Hardware: as stage 1; the prompts are longer, since they hold all n responses.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import common
from common import arg, check

# Figure 10. The paper describes the input format first and then gives it; here it is filled in.
REFINE_TEMPLATE = """\
You are given an instruction, {count} evaluation dimensions (each with a name and definition), and a set of candidate \
responses, each with scores for the {count} dimensions.
Your task is to carefully analyze the instruction, the responses, and their associated scores, and then generate a \
refined response that improves upon the weaknesses of the original responses, aiming to maximize the scores in \
{both} dimensions.

Instruction:
{instruction}

{dimensions}

Responses and Scores:
{candidates}

Now, generate a single refined response that addresses the instruction and improves the existing responses regarding \
{both} evaluation dimensions.
Refined Response:"""
DIMENSION = "Dimension {number}:\nName: {name}\nDefinition: {definition}"
# One candidate; the fences show where each response ends, whatever it contains (ours).
CANDIDATE = "<{fence} {number}>\n{text}\n</{fence} {number}>\n{scores}"

# Forms that weak models follow, where Figure 10 makes them write about "the original responses" (ours): the
# conversation goes on from the best response, or the objectives are a system prompt before the plain prompt.
ASK_AGAIN = "Please answer my message again, better, so that your answer is as good as it can be on these points:\n\
{principles}\nWrite only the new answer."
PRINCIPLES = "Answer so that your answer is as good as it can be on these points, the first before the others:\n\
{principles}"
FORMS = ("paper", "conversation", "principles")
NEXT_TURN = "\n---\n"  # in a file of turns, as recipes/prompts/self_criticism.txt: the critique, then the revision

# What a model writes before its answer, and what it writes about the task instead of one.
BETTER = r"(?:refined|improved|revised|better|new|final|enhanced|updated|safer|(?:more|most) \w+)"
LEAD_IN = re.compile(
    r"(?i)^[^\w`]*(?:(?:sure|okay|certainly|absolutely|of course|i(?:['’]d| would) be happy to help)\W+)?(?:"
    r"(?:here(?:['’]s| is)|below is)\s+(?:an?|the|my|your)\s+(?:attempt at an?\s+)?(?:(?:single|possible),?\s+)?(?:"
    rf"{BETTER}\s+(?:response|answer|version)\b[^\n:]{{0,80}}(?::\**|\.?\**[ \t]*\n)|response that\b[^\n:]{{0,80}}:)|"
    rf"response:|(?:(?:the|my|an?)\s+)?(?:final\s+)?{BETTER}\s+(?:response|answer)(?:\s+(?:is|\d|\([^)\n]{{0,40}}\)))?"
    r"[*\]]*[ \t]*(?::\**|\n))\s*"
)
FENCE = (  # NAMES: of the objectives
    r"(?i)^\s*<(?:response(?:[\w-]* \d+)?|refined.response)>\s*|</(?:response[\w-]* \d+|refined.response)>[\s\S]*$|"
    r"</response>\s*$|\n[ \t*#(\[]{0,9}(?:scores?\W{1,5})?(?:(?:NAMES)(?: score)?\W{1,5}\d[\d./]{0,5}\W{0,5}){1,9}$"
)
QUOTED = re.compile(r"^\s*```(?:markdown|text)?\n([^`]*)\n```\s*$")  # as a whole; code stays code
ABOUT_THE_TASK = re.compile(
    r"(?i)\b(?:original|candidate|existing|previous|provided|given|refined|revised|rewritten|updated|improved|enhanced|"
    r"first|second|third|two|three)\s+responses?\b|\bresponses? [1-9]\b|\b(?:both|evaluation) dimensions?\b|"
    r"\bthe instruction (?:is|asks|was)\b|\b(?:the|this) response (?:is|was|has|does|should|would|can|could|also|now|"
    r"(?:highlight|provide|address|contain|offer|reduce|give|show|include|meet|suggest|acknowledge)e?s)\b"
)


@dataclass
class Args(common.JudgeArgs):
    template: str = arg("paper", "paper: Figure 10; conversation, principles: for weak models; or a file of what is "
        "said after the best response: turns, --- between them; the last answer counts (ours)")  # fmt: skip
    attempts: int = arg(1, "refinements per prompt; the best by (primary, secondary) stays (paper: 1, greedy)")
    temperature: float = arg(1.0, "of several attempts (ours); a single one is greedy")
    max_new_tokens: int = arg(2048, "longest refined response in tokens (paper, appendix A)")
    drop_remarks: bool = arg(False, "texts about the task instead of an answer count as not scored (ours)")


def list_principles(objectives) -> str:
    """The objectives as a template's {principles}, a line each, in order of priority."""
    return "\n".join(f"- {name}: {definition}" for name, definition in objectives)


def refine_messages(template: str, objectives, prompt, responses: list[dict]) -> list[dict]:
    """The conversation that asks for a refined response, from the scored responses of a prompt."""
    if template == "principles":
        return common.as_messages(prompt, PRINCIPLES.format(principles=list_principles(objectives)))
    if template != "paper":
        best = {"role": "assistant", "content": best_attempt(responses)["text"]}
        ask = ASK_AGAIN if template == "conversation" else template.partition(NEXT_TURN)[0]
        ask = ask.replace("{principles}", list_principles(objectives))
        return [*common.as_messages(prompt), best, *common.as_messages(ask)]
    # a text that holds such a fence could close its own and forge scores: then the fence gets a name of its own
    texts = [common.plain_text(prompt), *(response["text"] for response in responses)]
    forged = any("<" in text and "response" in text.lower() for text in texts)
    fence = f"response-{common.derive_seed(texts):x}" if forged else "response"
    dimensions = [DIMENSION.format(number=i, name=n, definition=d) for i, (n, d) in enumerate(objectives, 1)]
    candidates = []
    for i, response in enumerate(responses, 1):
        named = zip(objectives, response["scores"], strict=True)
        scores = ", ".join(f"{name}: {round(score, 1)}" for (name, _), score in named)
        candidates.append(CANDIDATE.format(fence=fence, number=i, text=response["text"], scores=scores))
    count = {2: "two", 3: "three", 4: "four", 5: "five"}.get(len(objectives), len(objectives))
    parts = {"instruction": common.plain_text(prompt), "count": count, "both": "both" if count == "two" else "all"}
    parts |= {"dimensions": "\n\n".join(dimensions), "candidates": "\n\n".join(candidates)}
    return common.as_messages(REFINE_TEMPLATE.format(**parts))


def clean_refined(text: str, names=common.CONSTITUTION) -> str:
    """The response without the lead-in, fences or scores of the objectives that models repeat from the prompt."""
    fence = re.compile(FENCE.replace("NAMES", "|".join(map(re.escape, names))))
    text = fence.sub("", LEAD_IN.sub("", fence.sub("", QUOTED.sub(r"\1", text)))).strip()
    return QUOTED.sub(r"\1", text).strip()


def about_the_task(text: str, row: dict) -> bool:
    """Whether a refined text speaks of responses and dimensions instead of answering; a prompt may do so itself."""
    return bool(ABOUT_THE_TASK.search(text)) and not ABOUT_THE_TASK.search(common.plain_text(row["prompt"]))


def best_attempt(attempts: list[dict]) -> dict:
    """The attempt {"text", "scores", …} with the lexicographically greatest scores; the earliest of equals."""
    unscored = {"text": "", "scores": None, "truncated": False}
    return max(attempts, key=lambda attempt: attempt["scores"] or [], default=unscored)


def main(args: Args) -> None:
    common.check_at_least(args, 1, "attempts", "max_new_tokens")
    check(args.temperature > 0, f"--temperature {args.temperature}: more than 0; --attempts 1 is greedy")
    source, output = Path(args.run_dir) / "02_scores.jsonl", Path(args.run_dir) / "03_refined.jsonl"
    rows = list(common.read_rows(source, scored=True))
    check(rows, f"{source} has no rows")
    common.read_files(args)
    if args.template not in FORMS:  # a file, whose content counts
        check(Path(args.template).is_file(), f"--template {args.template}: no such file, nor one of {', '.join(FORMS)}")
        name, args.template = args.template, common.read_text(Path(args.template)).strip()
        unknown = [field for field in ("{instruction}", "{dimensions}", "{candidates}") if field in args.template]
        words = "they are turns behind the best response, with {principles} alone; for Figure 10 edit REFINE_TEMPLATE"
        check(not unknown, f"--template {name}: {', '.join(unknown)} is not filled in here: {words}")
    made, before = common.made_by(source), common.read_record(common.record_file_of(source))
    common.inherit(args, made, "01", "model", "endpoint", "chat_template")
    judging = ("objectives", "score_mode", "with_instruction", "constitution", "scorer", "judge_template")
    judging += ("judge_max_new_tokens", "judge_model", "judge_endpoint", "judge_chat_template")
    was, given = made.get("02", {}).get("objectives"), args.objectives
    check(None in (was, given) or was == given, f"--objectives {given}, but stage 2 scored {was}: leave it out")
    common.inherit(args, made, "02", *judging)
    check(args.model, f"nothing beside {source} says which model wrote these responses: pass --model")
    objectives, inputs = common.judge_defaults(args)
    k = next((len(r["scores"]) for row in rows for r in row["responses"] if r["scores"]), len(objectives))
    check(k == len(objectives), f"{source} has {k} scores a response: pass their names as --objectives, in order")
    engine = common.make_engine(args)  # a wrong name ends here, before --overwrite has cost anything
    judge = common.make_judge(args, engine)
    record = common.begin(args, "03_refine", [output], made, source=source, **inputs)
    if not record["complete"]:
        for one in dict.fromkeys((engine, judge)):
            one.open()
        common.settle_score_mode(args, judge, record)
    # the judge must be that of stage 2, or its scores and these do not compare: its settings, words, weights and code
    settings = ("with_instruction", "judge_template", "judge_max_new_tokens", "dtype")
    ways = [(f"--{name}", [one.get("args", {}).get(name) for one in (before, record)]) for name in settings]
    ways.append(("--score_mode", [[one.get("scores_read"), one.get("server_mode")] for one in (before, record)]))
    itself = ["--model"] * (not (args.scorer or args.judge_model))
    for name in ("constitution", "--scorer", "--judge_model", *itself):
        ways.append((name, [one.get("inputs", {}).get(name) for one in (before, record)]))
    ways.append(("common.py", [one.get("code", {}).get("common.py") for one in (before, record)]))
    if others := [name for name, (was, now) in ways if before and was != now]:
        common.warn(f"{', '.join(others)}: not as in stage 2, so its scores and these may not compare")

    later = args.template.replace("{principles}", list_principles(objectives)).split(NEXT_TURN)[1:]
    # One conversation a prompt. What can't be refined keeps an empty, unscored ỹ: 04 drops it as unscored.
    longest = args.max_new_tokens + sum(args.max_new_tokens + len(turn.encode()) for turn in later)
    room, chats = engine.context - longest, {}
    check(room > 0, f"--max_new_tokens {args.max_new_tokens} leaves no room in the model's {engine.context} tokens")
    dropped = {"no scored response": 0, "too long for the context": 0}
    for row in rows:
        scored = [response for response in row["responses"] if response["scores"] and response["text"].strip()]
        chat = refine_messages(args.template, objectives, row["prompt"], scored) if scored else []
        if scored and not common.too_long(engine, chat, room):
            chats[row["id"]] = chat
        else:
            dropped["too long for the context" if scored else "no scored response"] += 1
    settings = f"{args.template.partition(chr(10))[0][:30]} template"
    settings += f", {args.attempts} attempt(s), judged by {judge.title}{'' if args.scorer else f' ({args.score_mode})'}"
    common.announce("03 refine", engine.title, f"{len(chats)} prompts", settings)
    sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature if args.attempts > 1 else 0.0}
    remarks = Counter()  # of this call's attempts, where they are dropped: is it one?

    def refine(some: list[dict]) -> list[dict]:
        asked = [(row, j) for row in some if row["id"] in chats for j in range(args.attempts)]
        seeds = [common.derive_seed(args.seed, row["id"], j) for row, j in asked]
        talks = [chats[row["id"]] for row, _ in asked]
        completions = engine.complete(talks, seeds, **sampling)
        for turn in later:
            answers = [{"role": "assistant", "content": one.text if one else ""} for one in completions]
            talks = [[*talk, own, *common.as_messages(turn)] for talk, own in zip(talks, answers, strict=True)]
            completions = engine.complete(talks, seeds, **sampling)
        texts = [clean_refined(one.text, dict(objectives)) if one else "" for one in completions]  # refused: blank
        items = [(row["prompt"], text) for (row, _), text in zip(asked, texts, strict=True)]
        scores = common.judge(judge, items, args, seeds)  # None for what is blank
        attempts = {row["id"]: [] for row in some}
        for (row, _), one, text, own in zip(asked, completions, texts, scores, strict=True):
            if args.drop_remarks:
                remarks[about := about_the_task(text, row)] += 1
                own = None if about else own
            attempts[row["id"]].append({"text": text, "scores": own, "truncated": bool(one and one.truncated)})
        return [row | {"refined": best_attempt(attempts[row["id"]])} for row in some]

    asked_for = [chats.get(row["id"], []) for row in rows]
    sizes = [(common.text_size(chat) + longest, args.attempts * bool(chat)) for chat in asked_for]
    worker = judge if isinstance(judge, common.Local) else engine  # a local judge works in batches, a server in rows
    done = common.map_rows(refine, rows, sizes, record, output, worker, "03 refine")
    if done is None:  # the first of several processes reports
        return
    common.finish(record, len(done))

    refined = [row["refined"] for row in done]
    dropped["not scored"] = sum(one["scores"] is None for one in refined) - sum(dropped.values())
    common.show_funnel("03 refine", ("prompts in", len(done)), dropped, "refined and scored")
    if remarks[True]:
        print(f"  attempts about the task, dropped: {remarks[True]} of {remarks.total()} in this call")
    if about := sum(about_the_task(row["refined"]["text"], row) for row in done):
        way_out = "--template principles asks otherwise, --drop_remarks drops them"
        common.warn(f"{about} of {len(done)} refined texts are about the task, no answers: {way_out}")
    print(f"  met --max_new_tokens: {sum(one['truncated'] for one in refined)}")
    names, pairs = [name for name, _ in objectives], [(row["refined"], r) for row in done for r in row["responses"]]
    common.ScoreHistogram(candidate["scores"] for _, candidate in pairs).show(names, "candidates")
    common.ScoreHistogram(one["scores"] for one in refined).show(names, "refined")
    common.show_ties([[one["scores"] for one in pair] for pair in pairs], "pairs of a refined response and a candidate")
    common.show_tokens(engine, judge)
    print(f"wrote {output}\nnext: python 04_denoise.py --run_dir {args.run_dir}")


if __name__ == "__main__":
    common.run_stage(main, Args)
