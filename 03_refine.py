"""Stage 3, self-refinement (SPA section 3.1 step 2; Figure 10).

The model sees the instruction, the two definitions and all its responses with their scores, and writes
one refined response ỹ, which it then scores in the same way as stage 2.

    reads   RUN_DIR/02_scores.jsonl
    writes  RUN_DIR/03_refined.jsonl, the same rows and
            {…, "refined": {"text": "…", "scores": [9, 8]}}; until it ends, also {"id": "…", "draft": ["…"]},
            the texts that wait for their scores
    run     python 03_refine.py --run_dir runs/default
    next    python 04_denoise.py --run_dir runs/default

Hardware: as stage 1; the prompts are longer, since they hold all n responses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import common
from common import arg, check

# Figure 10. The paper describes the input format first and then gives it; here it is filled in.
REFINE_TEMPLATE = """\
You are given an instruction, two evaluation dimensions (each with a name and definition), and a set of \
candidate responses, each with scores for the two dimensions.
Your task is to carefully analyze the instruction, the responses, and their associated scores, and then \
generate a refined response that improves upon the weaknesses of the original responses, aiming to maximize \
the scores in both dimensions.

Instruction:
{instruction}

Dimension 1:
Name: {dim1_name}
Definition: {dim1_def}

Dimension 2:
Name: {dim2_name}
Definition: {dim2_def}

Responses and Scores:
{candidates}

Now, generate a single refined response that addresses the instruction and improves the existing responses \
regarding both evaluation dimensions.
Refined Response:"""
# One candidate; the fences show where each response ends, whatever it contains (ours).
CANDIDATE_TEMPLATE = """\
<response {number}>
{text}
</response {number}>
{dim1_name}: {score1}, {dim2_name}: {score2}"""


@dataclass
class Args:
    attempts: int = arg(
        1, "refinements per prompt; the best by (primary, secondary) stays (paper: 1, greedy)"
    )
    temperature: float = arg(1.0, "of several attempts (ours); a single one is greedy")
    max_new_tokens: int = arg(2048, "longest refined response in tokens (paper, appendix A)")
    primary: str | None = arg(None, "primary objective; default: that of stage 2", common.PRIMARIES)
    score_mode: str | None = arg(None, "how scores are read; default: as in stage 2", common.SCORE_MODES)
    with_instruction: bool | None = arg(None, "show the judge the instruction; default: as in stage 2")
    constitution: str | None = arg(None, "JSON file with definitions; default: those of stage 2")
    model: str | None = arg(None, "the model that refines; default: that of stage 1")
    endpoint: str | None = arg(
        None, "URL of an OpenAI-compatible server that has the model; default: that of stage 1"
    )
    chat_template: str | None = arg(None, "file with a Jinja chat template; default: that of stage 1")
    judge_model: str | None = arg(None, "the judge; default: that of stage 2")
    judge_endpoint: str | None = arg(None, "URL of the judge's server; its key: SPA_JUDGE_API_KEY")
    judge_chat_template: str | None = arg(None, "file with the judge's Jinja chat template")
    dtype: str = arg(
        "auto", "weights; auto: bfloat16 on a GPU, else float32", ("auto", "float32", "bfloat16")
    )
    device_map: str | None = arg(
        None,
        "auto spreads a model too large for one GPU over all, in one process",
        ("auto", "balanced", "sequential"),
    )
    continuous_batching: bool = arg(
        True, "on a GPU where it works: transformers' own, with many prompts under way"
    )
    batch_size: int = arg(72, "sequences generated at a time (ours)")
    concurrency: int = arg(32, "requests under way at an endpoint")
    request_timeout: float = arg(600.0, "seconds that an endpoint may take for an answer")
    retries: int = arg(6, "further tries of a request that failed, after 1, 2, 4 … seconds")
    run_dir: str = arg("runs/default", "folder of this run's files")
    seed: int = arg(0, "seed of several attempts, and of the tries of --score_mode json")
    overwrite: bool = arg(False, "redo this stage although its files are there")


def refine_prompt(objectives, prompt: str, responses: list[dict]) -> str:
    """Figure 10, filled in with the scored responses."""
    (name1, definition1), (name2, definition2) = objectives
    names = {"dim1_name": name1, "dim2_name": name2}
    candidates = [
        CANDIDATE_TEMPLATE.format(
            number=number,
            text=response["text"],
            score1=round(response["scores"][0], 1),
            score2=round(response["scores"][1], 1),
            **names,
        )
        for number, response in enumerate(responses, 1)
    ]
    return REFINE_TEMPLATE.format(
        instruction=prompt,
        dim1_def=definition1,
        dim2_def=definition2,
        candidates="\n\n".join(candidates),
        **names,
    )


def clean_refined(text: str) -> str:
    """The response without the label or fences that models repeat from the prompt."""
    text = re.sub(r"^\W*refined response\W*:\**\s*", "", text, flags=re.IGNORECASE)
    return re.sub(r"^<response \d+>\s*|\s*</response \d+>$", "", text).strip()


def best_attempt(attempts: list[dict]) -> dict:
    """The attempt {"text", "scores"} with the lexicographically greatest scores; the earliest of equals."""
    unscored = {"text": "", "scores": None}
    return max(attempts, key=lambda attempt: attempt["scores"] or [float("-inf")] * 2, default=unscored)


def main(args: Args) -> None:
    common.check_at_least(args, 1, "attempts", "max_new_tokens", "batch_size")
    check(args.temperature > 0, f"--temperature {args.temperature}: more than 0; --attempts 1 is greedy")
    source, output = Path(args.run_dir) / "02_scores.jsonl", Path(args.run_dir) / "03_refined.jsonl"
    rows = list(common.read_rows(source, made_by="02_score.py", scored=True))
    check(bool(rows), f"{source} has no rows")
    facts = common.read_facts(args.run_dir, "02_score")
    fallback = {"primary": "harmlessness", "score_mode": "constrained", "with_instruction": True}
    for name, value in fallback.items():  # the judge of stage 2, but for what was asked otherwise
        given, before = getattr(args, name), facts.get(name, value)
        if given is not None and facts and given != before:
            common.warn(f"--{name} {given}, but stage 2 had {before}: its scores and these may not compare")
        setattr(args, name, before if given is None else given)
    objectives = common.load_objectives(args.primary, args.constitution)
    if facts.get("primary") == args.primary and not args.constitution:
        objectives = facts["objectives"]
    common.choose_model(args, facts)
    common.choose_model(args, facts if "judge_model" in facts else common.judged_by_itself(args), "judge_")
    inputs = {source.name: source, "--constitution": str(objectives)}
    record = common.check_run(args, "03_refine", [output], inputs, may_change=common.MAY_CHANGE)

    backend = common.make_backend(args)
    judge = common.make_judge(args, backend)
    check(
        args.max_new_tokens < backend.context,
        f"--max_new_tokens {args.max_new_tokens}: the model takes {backend.context} tokens",
    )
    dropped = {"no scored response": 0, "too long for the context": 0}
    prompts, lengths = {}, []
    for row in rows:
        scored = [response for response in row["responses"] if response["scores"] is not None]
        prompt = refine_prompt(objectives, row["prompt"], scored)
        length = backend.length(prompt) if scored else 0
        if not scored:
            dropped["no scored response"] += 1
        elif length + args.max_new_tokens > backend.context:
            dropped["too long for the context"] += 1
        else:
            prompts[row["id"]] = prompt
        lengths.append(length if row["id"] in prompts else 0)

    def refine(batch: list[int]) -> list[dict]:
        chosen = [rows[i] for i in batch if rows[i]["id"] in prompts]
        seeds = [common.derive_seed(args.seed, row["id"]) for row in chosen]
        completions = backend.complete(
            [
                common.Request(prompts[row["id"]], None, args.attempts, seed)
                for row, seed in zip(chosen, seeds, strict=True)
            ],
            temperature=args.temperature if args.attempts > 1 else 0.0,
            max_new_tokens=args.max_new_tokens,
        )
        refined = {rows[i]["id"]: [] for i in batch}
        for row, group in zip(chosen, completions, strict=True):  # None is what a server has refused
            refined[row["id"]] = [clean_refined(one.text) for one in group if one]
        return [{"id": id, "draft": texts} for id, texts in refined.items()]

    def score(batch: list[int], drafts: list[list[str]]) -> list[dict]:
        attempts = [[{"text": text} for text in texts] for texts in drafts]
        places = [
            (rows[i], j, one) for i, group in zip(batch, attempts, strict=True) for j, one in enumerate(group)
        ]
        scores = common.judge(
            judge,
            [(row["prompt"], one["text"]) for row, _, one in places],
            objectives,
            score_mode=args.score_mode,
            with_instruction=args.with_instruction,
            seeds=[common.derive_seed(args.seed, row["id"], j) for row, j, _ in places],
        )
        for (_, _, one), pair in zip(places, scores, strict=True):
            one["scores"] = pair
        return [rows[i] | {"refined": best_attempt(group)} for i, group in zip(batch, attempts, strict=True)]

    record["facts"] = facts | common.carried_facts(args, facts)
    record["facts"] |= {"primary": args.primary, "objectives": objectives, "refused": 0}
    ids = [row["id"] for row in rows]
    sizes = [(length, args.attempts if id in prompts else 0) for length, id in zip(lengths, ids, strict=True)]
    steps = [
        common.Step("03 refine", backend, refine),
        common.Step("03 score", judge, score, decodes=args.score_mode == "json"),
    ]
    rows = common.make_rows(args, record, output, ids, sizes, *steps)
    if rows is None:  # the first of several processes reports
        return

    dropped["refined answer not scored"] = sum(row["refined"]["scores"] is None for row in rows) - sum(
        dropped.values()
    )
    common.show_funnel("03 refine", ("prompts in", len(rows)), dropped, "refined and scored")
    names, candidates = common.objective_names(record["facts"]), [r for row in rows for r in row["responses"]]
    common.ScoreHistogram(r["scores"] for r in candidates).show(names, "candidates")
    common.ScoreHistogram(row["refined"]["scores"] for row in rows).show(names, "refined")
    ties = []
    for row in rows:
        ties += [[row["refined"]["scores"], response["scores"]] for response in row["responses"]]
    common.show_ties(common.tie_rate(ties), "pairs of a refined response and a candidate")
    common.show_tokens(backend, judge)
    print(f"wrote {output}\nnext: python 04_denoise.py --run_dir {args.run_dir}")


if __name__ == "__main__":
    common.run_stage(main, Args)
