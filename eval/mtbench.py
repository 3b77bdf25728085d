"""MT-Bench of one or several models (arXiv 2306.05685; the paper's Table 2).

Every model answers 80 questions of two turns, the second with the first answer in the conversation. A judge grades
each turn from 1 to 10 with FastChat's prompts; for math, reasoning and coding it sees a reference answer. A judgment
without a rating is asked again twice, with sampling, then it is null: counted, left out, never a default number.

    reads   --questions and --references: FastChat's files llm_judge/data/mt_bench/question.jsonl and
            reference_answer/gpt-4.jsonl: {"question_id": 101, "category": "reasoning", "turns": ["…", "…"]} and
            {"question_id": 101, "choices": [{"turns": ["…", "…"]}]}
    writes  OUTPUT_DIR/mtbench.md, .csv: means by category, of turn 1, turn 2 and both, with bootstrap intervals
            over questions and each model's paired difference to the first one
            OUTPUT_DIR/mtbench_answers_NAME.jsonl and mtbench_judgments_NAME.jsonl, where an interrupted run goes on:
            {"id": 101, "category": "reasoning", "turns": ["…", "…"], "truncated": [false, false]}
            {"id": "101/2", "question_id": 101, "turn": 2, "rating": 7, "judgment": "…", "tries": 1}
    run     python eval/mtbench.py --questions question.jsonl --references gpt-4.jsonl \\
                --models Vanilla=ORG/NAME SPA=runs/x/06_model --judge_model gpt-4 --judge_endpoint URL

Published scores have GPT-4 as the judge; those of another one compare only with each other. Needs one GPU that holds
the models one after the other, and the judge if it is local; or servers (--endpoint has all of --models).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import shared

import common
from common import arg, check

# FastChat's llm_judge (Apache-2.0): temperatures, categories with a reference, and the judge's prompts word for word,
# slips included: (system prompt, user prompt) each, "-math" with a reference, "-multi-turn" of the second turn.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
TEMPERATURES |= {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}
OTHER_TEMPERATURE = 0.7  # of a category that isn't MT-Bench's
WITH_REFERENCE = ("math", "reasoning", "coding")
PROMPTS = shared.read_jsonl(Path(__file__).parent / "prompts" / "mtbench.jsonl", {"name"}, "no judge prompt")
JUDGE_PROMPTS = {row["name"]: (row["system_prompt"], row["prompt_template"]) for _, row in PROMPTS}
WANTED = {"--questions": "'question_id', 'category' and 'turns', two texts, are wanted"}
WANTED["--references"] = "'question_id' and two texts at choices[0].turns are wanted"
OVERALL = "all questions"


@dataclass
class Args(common.ModelArgs):
    models: list[str] | None = arg(None, "NAME=MODEL or MODEL each, as --model is given elsewhere", free=True)
    questions: str | None = arg(None, "FastChat's mt_bench question file", free=True)
    references: str | None = arg(None, "FastChat's file of reference answers, for math, reasoning, coding", free=True)
    limit: int | None = arg(None, "only the first questions of each category", free=True)
    max_new_tokens: int = arg(1024, "longest answer in tokens (FastChat)")
    judge_model: str | None = arg(None, "the judge: a local model, or its name at --judge_endpoint", free=True)
    judge_endpoint: str | None = arg(None, "URL of the judge's server; its key: SPA_JUDGE_API_KEY", free=True)
    judge_chat_template: str | None = arg(None, "file with the judge's Jinja chat template")
    judge_max_new_tokens: int = arg(2048, "longest judgment in tokens (FastChat)")
    judge_system: bool = arg(True, "--no-…: no system prompt, for a judge whose template refuses one (ours)")
    batch_size: int = arg(16, "answers or judgments written at a time (ours)", free=True)
    output_dir: str = arg("runs/eval", "folder of the tables", free=True)
    model: str | None = arg(None, "the same as --models with one", free=True)
    run_dir: str | None = arg(None, "not used here: see --models and --output_dir", free=True)


def read_file(path: str, option: str) -> dict:
    """question_id -> (where it stands, row with two "turns") of a file of FastChat's; UserError with the line."""
    check(Path(path).is_file(), f"{option} {path}: no such file")
    rows: dict = {}
    for where, row in shared.read_jsonl(Path(path), {"question_id"}, f"no 'question_id'; {WANTED[option]}"):
        id, turns = row["question_id"], None
        with contextlib.suppress(LookupError, TypeError):
            turns = row["turns"] if option == "--questions" else row["choices"][0]["turns"]
        pair = isinstance(turns, list) and len(turns) == 2 and all(isinstance(t, str) and t.strip() for t in turns)
        check(pair and isinstance(id, (int, str)), f"{where}: {WANTED[option]}")
        check(id not in rows, f"{where}: question_id {id} again (first: {rows.get(id, [''])[0]})")
        rows[id] = (where, row | {"turns": turns})
    check(rows, f"{option} {path} has no rows")
    return rows


def read_questions(path: str, references: str | None, limit: int | None) -> list[dict]:
    """[{"id", "category", "turns", "references"}, …], `references` two texts or None."""
    answers = read_file(references, "--references") if references else {}
    questions, taken = [], Counter()
    for id, (where, row) in read_file(path, "--questions").items():
        category = row.get("category")
        check(isinstance(category, str) and category, f"{where}: {WANTED['--questions']}")
        needs = category in WITH_REFERENCE
        way_out = f"{references} has none" if references else "pass --references FILE"
        check(id in answers or not needs, f"{where}: question {id} ({category}) needs a reference answer; {way_out}")
        taken[category] += 1
        if limit is None or taken[category] <= limit:
            own = answers[id][1]["turns"] if needs else None
            questions.append({"id": id, "category": category, "turns": row["turns"], "references": own})
    return questions


def write_turn(engine, chats: list[list[dict]], seeds: list[int], temperatures: list[float], longest: int) -> list:
    """A completion of each conversation, of at most `longest` tokens and within the context; None: refused."""
    answers: list = [common.Completion("", 0, True)] * len(chats)  # what it is where no room is left
    groups: dict[tuple, list[int]] = {}
    for i, chat in enumerate(chats):
        fits = not common.too_long(engine, chat, engine.context - longest)
        room = longest if fits else engine.context - engine.length(chat)
        groups.setdefault((temperatures[i], room), []).append(i)
    for (temperature, room), places in groups.items():
        if room > 0:
            asked, drawn = [chats[i] for i in places], [seeds[i] for i in places]
            found = engine.complete(asked, drawn, temperature=temperature, max_new_tokens=room)
            for i, answer in zip(places, found, strict=True):
                answers[i] = answer
    return answers


def answer(args: Args, engine, some: list[dict]) -> list[dict | None]:
    """The rows of some questions: both turns, the second after the first; None where a server refuses one."""
    temperatures = [TEMPERATURES.get(question["category"], OTHER_TEMPERATURE) for question in some]
    rows = [{"id": row["id"], "category": row["category"], "turns": [], "truncated": []} for row in some]
    chats: list[list[dict]] = [[] for _ in some]
    for turn in (0, 1):
        for chat, question in zip(chats, some, strict=True):
            chat.append({"role": "user", "content": question["turns"][turn]})
        seeds = [common.derive_seed(args.seed, question["id"], turn) for question in some]
        found = write_turn(engine, chats, seeds, temperatures, args.max_new_tokens)
        for row, chat, one in zip(rows, chats, found, strict=True):
            row["turns"].append(one and one.text)
            row["truncated"].append(one and one.truncated)
            chat.append({"role": "assistant", "content": one.text if one else ""})
    return [None if None in row["turns"] else row for row in rows]


def work_through(args: Args, name: str, items: list[dict], sizes: list[int], work, engine, **asked) -> list[dict]:
    """The finished rows of OUTPUT_DIR/mtbench_NAME.jsonl, resumed: work(args, engine, some items) -> rows."""
    output = shared.output_path(args.output_dir, f"mtbench_{name}.jsonl")
    record_file = output.with_name(f"{output.stem}_args.json")
    asked = {what: str(common.derive_seed(texts)) for what, texts in asked.items()}
    record = common.begin(args, "eval/mtbench", [output], record_file=record_file, **asked)
    if not record["complete"]:
        engine.open()
    todo, title, one_each = functools.partial(work, args, engine), name.replace("_", " of "), [(n, 1) for n in sizes]
    rows = common.map_rows(todo, items, one_each, record, output, engine, title)
    common.finish(record, len(rows))
    return rows


def answer_all(args: Args, name: str, model: str, questions: list[dict]) -> list[dict]:
    """Every question's answers by one model, resumed."""
    # what does not change the answers is left out, so that another judge finds them
    judge = {"judge_model": None, "judge_endpoint": None, "judge_chat_template": None, "judge_max_new_tokens": 0}
    own = dataclasses.replace(args, model=model, judge_system=True, **judge)
    texts = [[row["id"], row["turns"]] for row in questions]
    sizes = [sum(len(text.encode()) // 3 for text in row["turns"]) + 2 * args.max_new_tokens for row in questions]
    engine = common.make_engine(own)
    rows = work_through(own, f"answers_{name}", questions, sizes, answer, engine, **{"--questions": texts})
    common.show_tokens(engine)
    return rows


def judge_request(question: dict, answers: list[str], turn: int, with_system: bool) -> list[dict]:
    """The conversation that asks for the rating of turn 1 or 2. `str.format` fills once: braces stay.

    Without a system prompt the multi-turn instruction goes before the user prompt (as FastChat does for
    models that take none), "You are a helpful assistant." nowhere.
    """
    name = "single-math-v1" if question["references"] else "single-v1"
    system, prompt = JUDGE_PROMPTS[name if turn == 1 else f"{name}-multi-turn"]
    texts = {"question": question["turns"], "answer": answers, "reference": question["references"] or ["", ""]}
    prompt = prompt.format(**{f"{key}_{i}": text for key, pair in texts.items() for i, text in enumerate(pair, 1)})
    if with_system:
        return common.as_messages(prompt, system)
    return common.as_messages(prompt if turn == 1 else f"[Instruction]\n{system.strip()}\n\n{prompt}")


def parse_rating(text: str) -> float | int | None:
    """The [[number]] of a judgment, else its "Rating: [number]"; None if it is no score, or if several differ."""
    text, number = common.without_thoughts(text), r"\[([^][\d]*+\d[^][]*+)\]"  # [[rating]] has no digit
    found = re.findall(rf"\[{number}\]", text) or re.findall(rf"(?i)\brating\W{{0,5}}{number}", text)
    values = {common.read_score(one if re.fullmatch(r"\s*\d++\.?\d*+\s*", one) else None) for one in found}
    return values.pop() if len(values) == 1 else None


def grade(args: Args, judge, some: list[dict]) -> list[dict]:
    """The finished rows of some answers; judgment None: too long for the judge, or refused."""
    chats, rows = [item["chat"] for item in some], []
    seeds = [common.derive_seed(args.seed, item["id"]) for item in some]
    found = shared.ask(judge, chats, seeds, parse_rating, args.judge_max_new_tokens)
    for item, (rating, text, tries) in zip(some, found, strict=True):
        about = {key: item[key] for key in ("id", "question_id", "turn")}
        rows.append(about | {"rating": rating, "judgment": text, "tries": tries})
    return rows


def judge_all(args: Args, judge, name: str, questions: list[dict], answers: list[dict]) -> list[dict]:
    """The judgment of every answer of one model, resumed."""
    items, by_id = [], {row["id"]: row for row in questions}
    for row, turn in ((row, turn) for row in answers for turn in (1, 2)):
        about = {"id": f"{row['id']}/{turn}", "question_id": row["id"], "turn": turn}
        items.append(about | {"chat": judge_request(by_id[row["id"]], row["turns"], turn, args.judge_system)})
    # what has changed the answers has done so already
    own = dataclasses.replace(args, model=None, endpoint=None, chat_template=None, max_new_tokens=0)
    sizes = [common.text_size(item["chat"]) + args.judge_max_new_tokens for item in items]
    return work_through(own, f"judgments_{name}", items, sizes, grade, judge, **{"answers and references": items})


def rating_table(judgments: list[dict]) -> pd.DataFrame:
    """The ratings of one model: a row a question, columns "1", "2" and "both" (their mean); NaN where there is none."""
    ratings: dict = {}
    for row in judgments:
        ratings.setdefault(row["question_id"], {})[str(row["turn"])] = row["rating"]
    table = pd.DataFrame.from_dict(ratings, orient="index", columns=["1", "2"], dtype=float)
    return table.assign(both=table.mean(axis="columns", skipna=False))


def summarize(ratings: dict[str, pd.DataFrame], categories: dict) -> list[dict]:
    """A row per model, category (at last all questions) and turn: mean, and difference to the first model.

    ratings: model -> its `rating_table`; categories: question -> category. Intervals are over questions; the difference
    is over those that both models have.
    """
    lines, first = [], next(iter(ratings.values()))
    for name, table in ratings.items():
        for category in [*dict.fromkeys(categories.values()), OVERALL]:
            chosen = table.loc[[category in (categories[question], OVERALL) for question in table.index]]
            changes = (chosen - first.reindex(chosen.index))[: 0 if table is first else None]
            for turn in chosen:
                values, change = chosen[turn].dropna(), changes[turn].dropna()
                row = {"model": name, "category": category, "turn": turn, "n": len(values)}
                row |= {"unrated": len(chosen) - len(values)} | shared.estimate(values)
                lines.append(row | {"difference_n": len(change)} | shared.estimate(change, "difference"))
    return lines


def main(args: Args) -> None:
    common.check_at_least(args, 1, "limit", "max_new_tokens", "judge_max_new_tokens")
    shared.check_no_run_dir(args)
    check(common.processes()[1] == 1, "start this with python: one process; --device_map uses several GPUs")
    models = shared.read_named(args.models or ([args.model] if args.model else None), "--models", "NAME=MODEL or MODEL")
    odd = next((name for name in models if not re.fullmatch(r"[\w.+-]+", name)), None)
    check(odd is None, f"--models {odd}=…: a name of letters, digits, . + - and _; files have it")
    check(args.questions, "--questions FILE is wanted: FastChat's mt_bench question.jsonl")
    check(args.judge_model, "--judge_model is wanted: a local model, or a name and --judge_endpoint URL")
    common.read_files(args)
    questions = read_questions(args.questions, args.references, args.limit)
    judge = common.make_engine(args, "judge_")  # a wrong name ends this here, not after an hour of answers
    judge.open = functools.cache(judge.open)
    if args.judge_endpoint:
        judge.open()
    elif args.judge_model in models.values():
        common.warn(f"{args.judge_model} judges itself; judges prefer their own answers")

    answers = {}
    for name, model in models.items():
        answers[name] = answer_all(args, name, model, questions)
        gc.collect()  # its weights go before those of the next model come
    judgments = {name: judge_all(args, judge, name, questions, rows) for name, rows in answers.items()}
    ratings = {name: rating_table(rows) for name, rows in judgments.items()}
    lines = summarize(ratings, {row["id"]: row["category"] for row in questions})
    of = {(row["model"], row["category"], row["turn"]): row for row in lines}  # what the page looks up
    graded = [row for rows in judgments.values() for row in rows]
    facts = {"models": list(models), "categories": list(dict.fromkeys(row["category"] for row in lines))}
    facts |= {"overall": OVERALL, "questions": len(questions), "judge": args.judge_model, "graded": graded}
    # a judge that always gives the same rating tells nothing
    facts["ratings"] = Counter(math.floor(row["rating"] + 0.5) for row in graded if row["rating"] is not None)
    facts["cut"] = [truncated for rows in answers.values() for row in rows for truncated in row["truncated"]]
    text = shared.render_page("mtbench.md", of=of, **facts)
    path = shared.write_table(args.output_dir, "mtbench", text, lines)
    print(text)
    if refused := len(questions) * len(models) - sum(map(len, answers.values())):
        common.warn(f"{refused} questions were refused by the models' server; they count nowhere")
    common.show_tokens(judge)
    print(f"\nwrote {path} and .csv; answers and judgments of {', '.join(models)} stand beside them")


if __name__ == "__main__":
    common.run_stage(main, Args)
