"""MT-Bench of one or several models (arXiv 2306.05685; the paper's Table 2).

Every model answers 80 questions of two turns, the second with the first answer in the conversation. A judge
grades each turn from 1 to 10 (single-answer grading with FastChat's prompts; for math, reasoning and coding
it sees a reference answer). Temperatures by category are FastChat's. A judgment without a rating is asked
again twice, with sampling, then it is null: counted, left out, never a default number.

    reads   --questions and --references: FastChat's files llm_judge/data/mt_bench/question.jsonl and
            reference_answer/gpt-4.jsonl:
            {"question_id": 101, "category": "reasoning", "turns": ["…", "…"]}
            {"question_id": 101, "choices": [{"turns": ["…", "…"]}]}
    writes  OUTPUT_DIR/mtbench.md and mtbench.csv: means by category, of turn 1, turn 2 and both, with
            bootstrap intervals over questions and each model's paired difference to the first one
            OUTPUT_DIR/mtbench_answers_NAME.jsonl and mtbench_judgments_NAME.jsonl, where an interrupted run goes on:
            {"id": 101, "category": "reasoning", "turns": ["…", "…"], "truncated": [false, false]}
            {"id": "101/2", "question_id": 101, "turn": 2, "rating": 7, "judgment": "…", "tries": 1}
    run     python eval/mtbench.py --questions question.jsonl --references gpt-4.jsonl \\
                --models Vanilla=ORG/NAME SPA=runs/x/06_model --judge_model gpt-4 --judge_endpoint URL

Published scores have GPT-4 as the judge; those of another one compare only with each other.

Hardware: one GPU that holds the models one after the other, and the judge if it is local; or servers (--endpoint has
all of --models, --judge_endpoint the judge).
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shared

import common
from common import arg, check

# FastChat's llm_judge (Apache-2.0): temperatures, categories with a reference, and the judge's prompts word
# for word, slips included. Each is (system prompt, user prompt).
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
TEMPERATURES |= {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}
OTHER_TEMPERATURE = 0.7  # of a category that isn't MT-Bench's
WITH_REFERENCE = ("math", "reasoning", "coding")

ACT = (
    "Please act as an impartial judge and evaluate the quality of the response provided by an AI assistant "
    "to the user question"
)
FACTORS = (
    "Your evaluation should consider factors such as the helpfulness, relevance, accuracy, depth, "
    "creativity, and level of detail of the response. "
)
CORRECTNESS = (
    "Your evaluation should consider correctness and helpfulness. You will be given a reference answer and "
    "the assistant's answer. "
)
FOCUS = "You evaluation should focus on the assistant's answer to the second"
EXPLAIN = "Begin your evaluation by providing a short explanation. Be as objective as possible. "
COMPARE = (
    "Begin your evaluation by comparing the assistant's answer with the reference answer. Identify and "
    "correct any mistakes. Be as objective as possible. "
)
RATE = (
    "After providing your explanation, you must rate the response on a scale of 1 to 10 by strictly "
    'following this format: "[[rating]]", for example: "Rating: [[5]]".'
)
CONVERSATION = (
    "<|The Start of Assistant A's Conversation with User|>\n\n### User:\n{question_1}\n\n"
    "### Assistant A:\n{answer_1}\n\n### User:\n{question_2}\n\n### Assistant A:\n{answer_2}\n\n"
    "<|The End of Assistant A's Conversation with User|>"
)
JUDGE_PROMPTS = {
    "single-v1": (
        "You are a helpful assistant.",
        f"[Instruction]\n{ACT} displayed below. {FACTORS}{EXPLAIN}{RATE}\n\n"
        "[Question]\n{question_1}\n\n"
        "[The Start of Assistant's Answer]\n{answer_1}\n[The End of Assistant's Answer]",
    ),
    "single-math-v1": (
        "You are a helpful assistant.",
        f"[Instruction]\n{ACT} displayed below. {CORRECTNESS}{COMPARE}{RATE}\n\n"
        "[Question]\n{question_1}\n\n"
        "[The Start of Reference Answer]\n{reference_1}\n[The End of Reference Answer]\n\n"
        "[The Start of Assistant's Answer]\n{answer_1}\n[The End of Assistant's Answer]",
    ),
    "single-v1-multi-turn": (
        f"{ACT} displayed below. {FACTORS}{FOCUS} user question. {EXPLAIN}{RATE}\n\n",
        CONVERSATION,
    ),
    "single-math-v1-multi-turn": (
        f"{ACT}. {CORRECTNESS}{FOCUS} question. {COMPARE}{RATE}\n\n",
        "<|The Start of Reference Answer|>\n\n### User:\n{question_1}\n\n"
        "### Reference answer:\n{reference_1}\n\n### User:\n{question_2}\n\n"
        "### Reference answer:\n{reference_2}\n\n<|The End of Reference Answer|>\n\n\n" + CONVERSATION,
    ),
}
TURNS = ("1", "2", "both")
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


# ---------------------------------------------------------------------------------------------------------------------
# Questions and references.


def two_texts(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def read_by_id(path: Path, option: str) -> dict:
    """question_id -> (where it stands, row) of a file of FastChat's. Raises UserError with file and line."""
    check(path.is_file(), f"{option} {path}: no such file")
    rows = {}
    for number, line in common.read_lines(path):
        where = f"{path}, line {number}"
        row = common.parse_json(line, where)
        id = row.get("question_id") if isinstance(row, dict) else None
        check(isinstance(id, (int, str)), f"{where}: no 'question_id'; a file of FastChat's is wanted")
        check(id not in rows, f"{where}: question_id {id} again (first: {rows.get(id, [''])[0]})")
        rows[id] = (where, row)
    check(bool(rows), f"{option} {path} has no rows")
    return rows


def read_questions(path: str, references: str | None, limit: int | None) -> list[dict]:
    """[{"id", "category", "turns", "references"}, …], `references` two texts or None."""
    answers, questions, taken = {}, [], Counter()
    if references:
        for id, (where, row) in read_by_id(Path(references), "--references").items():
            choices = row.get("choices")
            first = choices[0] if isinstance(choices, list) and choices else None
            turns = first.get("turns") if isinstance(first, dict) else None
            check(two_texts(turns), f"{where}: no two texts at choices[0].turns")
            answers[id] = turns
    for id, (where, row) in read_by_id(Path(path), "--questions").items():
        category, turns = row.get("category"), row.get("turns")
        check(isinstance(category, str) and bool(category), f"{where}: no 'category'")
        check(two_texts(turns) and all(text.strip() for text in turns), f"{where}: 'turns' must be two texts")
        needs = category in WITH_REFERENCE
        missing = f"{where}: question {id} ({category}) needs a reference answer; "
        check(bool(references) or not needs, f"{missing}pass --references FILE")
        check(id in answers or not needs, f"{missing}{references} has none")
        taken[category] += 1
        if limit is None or taken[category] <= limit:
            question = {"id": id, "category": category, "turns": turns}
            questions.append(question | {"references": answers[id] if needs else None})
    return questions


# ---------------------------------------------------------------------------------------------------------------------
# Answers.


def name_models(specs: list[str] | None) -> dict[str, str]:
    """name -> model, of NAME=MODEL or MODEL. Raises UserError without any, or if a name stands twice."""
    check(specs, "--models: at least one is wanted, NAME=MODEL or MODEL")
    models = {}
    for spec in specs:
        name, model = shared.split_spec(spec)
        name = name or Path(model).name
        check(name and model, f"--models {spec}: NAME=MODEL or MODEL is wanted")
        check(
            re.fullmatch(r"[\w.+-]+", name), f"--models {spec}: a name of letters, digits, . + - and _; files have it"
        )
        check(name not in models, f"--models: '{name}' twice; give each a NAME=MODEL of its own")
        models[name] = model
    return models


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
    temperatures = [TEMPERATURES.get(row["category"], OTHER_TEMPERATURE) for row in some]
    chats, answers = [[] for _ in some], [[] for _ in some]
    for turn in (0, 1):
        chats = [[*c, {"role": "user", "content": row["turns"][turn]}] for c, row in zip(chats, some, strict=True)]
        seeds = [common.derive_seed(args.seed, row["id"], turn) for row in some]
        for i, one in enumerate(write_turn(engine, chats, seeds, temperatures, args.max_new_tokens)):
            answers[i].append(one)
            chats[i].append({"role": "assistant", "content": one.text if one else ""})
    return [
        {"id": row["id"], "category": row["category"], "turns": [one.text for one in own]}
        | {"truncated": [one.truncated for one in own]}
        if None not in own
        else None
        for row, own in zip(some, answers, strict=True)
    ]


def answer_all(args: Args, name: str, model: str, questions: list[dict]) -> list[dict]:
    """Every question's answers by one model, resumed."""
    # what does not change the answers is left out, so that another judge finds them
    judge = {"judge_model": None, "judge_endpoint": None, "judge_chat_template": None, "judge_max_new_tokens": 0}
    own = dataclasses.replace(args, model=model, judge_system=True, **judge)
    output = shared.output_path(args.output_dir, f"mtbench_answers_{name}.jsonl")
    asked = str(common.derive_seed([[row["id"], row["turns"]] for row in questions]))
    record_file = output.with_name(f"{output.stem}_args.json")
    record = common.begin(own, "eval/mtbench", [output], record_file=record_file, **{"--questions": asked})
    engine = common.make_engine(own)
    if not record["complete"]:
        engine.open()
    sizes = [(sum(len(text.encode()) // 3 for text in row["turns"]) + 2 * args.max_new_tokens, 1) for row in questions]
    work = functools.partial(answer, own, engine)
    rows = common.map_rows(work, questions, sizes, record, output, engine, f"answers of {name}")
    common.finish(record, len(rows))
    common.show_tokens(engine)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Judgments.


def judge_request(question: dict, answers: list[str], turn: int, with_system: bool) -> tuple[str | None, str]:
    """(system prompt, user prompt) for the answer to turn 1 or 2. `str.format` fills once: braces stay.

    Without a system prompt the multi-turn instruction goes before the user prompt (as FastChat does for
    models that take none), "You are a helpful assistant." nowhere.
    """
    name = "single-math-v1" if question["references"] else "single-v1"
    system, prompt = JUDGE_PROMPTS[name if turn == 1 else f"{name}-multi-turn"]
    reference = question["references"] or ["", ""]
    prompt = prompt.format(
        question_1=question["turns"][0],
        question_2=question["turns"][1],
        answer_1=answers[0],
        answer_2=answers[1],
        reference_1=reference[0],
        reference_2=reference[1],
    )
    if with_system:
        return system, prompt
    return None, prompt if turn == 1 else f"[Instruction]\n{system.strip()}\n\n{prompt}"


def parse_rating(text: str) -> float | int | None:
    """The [[number]] of a judgment, else its [number]; None if it isn't from 1 to 10, or if several differ.

    The patterns are FastChat's, which takes the first of several. What follows the last </think> counts. A whole
    number comes as an int.
    """
    number, text = r"(\d+\.?\d*)", text.rpartition("</think>")[2]
    found = re.findall(rf"\[\[{number}\]\]", text) or re.findall(rf"\[{number}\]", text)
    values = set(map(float, found))
    value = values.pop() if len(values) == 1 else math.nan
    if not 1 <= value <= 10:
        return None
    return int(value) if value == int(value) else value


def grade(args: Args, judge, some: list[dict]) -> list[dict]:
    """The finished rows of some answers; judgment None: too long for the judge, or refused."""
    chats = [common.as_messages(item["prompt"], item["system"]) for item in some]
    done = [{key: item[key] for key in ("id", "question_id", "turn")} for item in some]
    done = [row | {"rating": None, "judgment": None, "tries": 0} for row in done]
    room = judge.context - args.judge_max_new_tokens
    todo = [i for i, chat in enumerate(chats) if not common.too_long(judge, chat, room)]
    for attempt in range(1 + common.JSON_RETRIES):
        seeds = [common.derive_seed(args.seed, some[i]["id"], attempt) for i in todo]
        sampling = {"temperature": 1.0 if attempt else 0.0, "max_new_tokens": args.judge_max_new_tokens}
        answers = judge.complete([chats[i] for i in todo], seeds, **sampling) if todo else []
        for i, one in zip(todo, answers, strict=True):
            if one:
                done[i] |= {"rating": parse_rating(one.text), "judgment": one.text, "tries": attempt + 1}
        todo = [i for i, one in zip(todo, answers, strict=True) if one and done[i]["rating"] is None]
    return done


def judge_all(args: Args, judge, open_judge, name: str, questions: list[dict], answers: list[dict]) -> list[dict]:
    """The judgment of every answer of one model, resumed."""
    # what has changed the answers has done so already
    own = dataclasses.replace(args, model=None, endpoint=None, chat_template=None, max_new_tokens=0)
    output = shared.output_path(args.output_dir, f"mtbench_judgments_{name}.jsonl")
    items, by_id = [], {row["id"]: row for row in questions}
    for row in answers:
        for turn in (1, 2):
            system, prompt = judge_request(by_id[row["id"]], row["turns"], turn, args.judge_system)
            about = {"id": f"{row['id']}/{turn}", "question_id": row["id"], "turn": turn}
            items.append(about | {"system": system, "prompt": prompt})
    asked = {"answers and references": str(common.derive_seed([[i["id"], i["system"], i["prompt"]] for i in items]))}
    record_file = output.with_name(f"{output.stem}_args.json")
    record = common.begin(own, "eval/mtbench", [output], record_file=record_file, **asked)
    if not record["complete"]:
        open_judge()
    sizes = [(common.text_size(common.as_messages(i["prompt"])) + args.judge_max_new_tokens, 1) for i in items]
    work = functools.partial(grade, own, judge)
    rows = common.map_rows(work, items, sizes, record, output, judge, f"judgments of {name}")
    common.finish(record, len(rows))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Tables.


def turn_values(ratings: dict, turn: str) -> dict:
    """question -> rating of a turn, or the mean of both turns; questions without (all of) them are left out.

    ratings: question -> [rating of turn 1, of turn 2], None where there is none.
    """
    chosen = {"1": slice(0, 1), "2": slice(1, 2), "both": slice(0, 2)}[turn]
    values = {question: pair[chosen] for question, pair in ratings.items()}
    return {question: float(np.mean(pair)) for question, pair in values.items() if None not in pair}


def summarize(name: str, ratings: dict, first: dict | None, categories: dict) -> list[dict]:
    """A row per category (and over all questions) and turn, of one model.

    ratings, first: question -> [turn 1, turn 2] of the model and of the first model (None: it is the first);
    categories: question -> category. Intervals and differences are over questions; the difference is over
    those that both models have.
    """
    rows = []
    for category in [*dict.fromkeys(categories.values()), OVERALL]:
        of_category = [q for q in ratings if category in (categories[q], OVERALL)]
        for turn in TURNS:
            values = turn_values({q: ratings[q] for q in of_category}, turn)
            other = turn_values({q: first[q] for q in of_category if q in first}, turn) if first else {}
            changes = [values[q] - other[q] for q in values if q in other]
            low, high = shared.bootstrap_interval(list(values.values()))
            change_low, change_high = shared.bootstrap_interval(changes)
            rows.append(
                {
                    "model": name,
                    "category": category,
                    "turn": turn,
                    "n": len(values),
                    "unrated": len(of_category) - len(values),
                    "mean": float(np.mean(list(values.values()))) if values else math.nan,
                    "low": low,
                    "high": high,
                    "difference_n": len(changes),
                    "difference": float(np.mean(changes)) if changes else math.nan,
                    "difference_low": change_low,
                    "difference_high": change_high,
                }
            )
    return rows


def interval_text(value: float, low: float, high: float, sign: bool = False) -> str:
    texts = [shared.round_half_up(number) for number in (value, low, high)]
    if sign:
        texts = [text if text.startswith(("-", "–")) else f"+{text}" for text in texts]
    return "–" if math.isnan(value) else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def show_tables(tables: dict[str, list[dict]], how: str) -> str:
    """mtbench.md: the means over all questions, a row a model, and by category, a column a model."""
    first, overall, by_category = next(iter(tables)), [], {}
    for name, rows in tables.items():
        cells = {(row["category"], row["turn"]): row for row in rows}
        all_turns = [cells[OVERALL, turn] for turn in TURNS]
        means = [interval_text(row["mean"], row["low"], row["high"]) for row in all_turns]
        both = all_turns[-1]
        change = [both[key] for key in ("difference", "difference_low", "difference_high")]
        overall.append([name, str(both["n"]), str(both["unrated"]), *means, interval_text(*change, sign=True)])
        for category in dict.fromkeys(row["category"] for row in rows):
            mean = shared.round_half_up(cells[category, "both"]["mean"])
            by_category.setdefault(category, []).append(mean)
    header = ["Model", "n", "unrated", "turn 1", "turn 2", "both turns", f"both, minus {first}"]
    compared = f" Difference to {first}: paired by question."
    if len(tables) == 1:  # nothing to compare with
        compared, header, overall = "", header[:-1], [row[:-1] for row in overall]
    return "\n".join(
        [
            "# MT-Bench",
            "",
            f"Mean rating, 1 to 10, and its 95 % bootstrap interval over questions; {how}. Both turns: over "
            f"the n questions of which both were rated.{compared}",
            "",
            shared.markdown_table(header, overall),
            "",
            "Both turns, by category:",
            "",
            shared.markdown_table(["Category", *tables], [[c, *cells] for c, cells in by_category.items()]),
        ]
    )


def rating_counts(ratings: list) -> str:
    """How often each whole rating was given; a judge that always gives the same one tells nothing."""
    counts = Counter(math.floor(rating + 0.5) for rating in ratings if rating is not None)
    return "  ".join(f"{k}: {counts[k]}" for k in range(1, 11))


def main(args: Args) -> None:
    common.check_at_least(args, 1, "limit", "max_new_tokens", "judge_max_new_tokens")
    shared.check_no_run_dir(args)
    check(common.processes()[1] == 1, "start this with python: one process; --device_map uses several GPUs")
    models = name_models(args.models or ([args.model] if args.model else None))
    check(args.questions, "--questions FILE is wanted: FastChat's mt_bench question.jsonl")
    check(args.judge_model, "--judge_model is wanted: a local model, or a name and --judge_endpoint URL")
    common.read_files(args)
    questions = read_questions(args.questions, args.references, args.limit)
    judge = common.make_engine(args, "judge_")  # a wrong name ends this here, not after an hour of answers
    open_judge = functools.cache(judge.open)
    if args.judge_endpoint:
        open_judge()
    if not args.judge_endpoint and args.judge_model in models.values():
        common.warn(f"{args.judge_model} judges itself; judges prefer their own answers")

    answers = {}
    for name, model in models.items():
        answers[name] = answer_all(args, name, model, questions)
        gc.collect()  # its weights go before those of the next model come
    judgments = {name: judge_all(args, judge, open_judge, name, questions, rows) for name, rows in answers.items()}

    ratings = {name: {row["id"]: [] for row in rows} for name, rows in answers.items()}
    for name, rows in judgments.items():
        for row in rows:
            ratings[name][row["question_id"]].append(row["rating"])  # turn 1, then turn 2
    categories = {question["id"]: question["category"] for question in questions}
    first = next(iter(models))
    tables = {
        name: summarize(name, found, None if name == first else ratings[first], categories)
        for name, found in ratings.items()
    }
    text = show_tables(tables, f"{len(questions)} questions, judge {args.judge_model}")
    markdown = shared.output_path(args.output_dir, "mtbench.md")
    shared.write_text(markdown, text)
    shared.write_csv(markdown.with_suffix(".csv"), [row for table in tables.values() for row in table])
    print(text)

    graded = [row for rows in judgments.values() for row in rows]
    dropped = {
        "no rating in three tries (null)": sum(row["rating"] is None and row["tries"] > 0 for row in graded),
        "too long or refused (null)": sum(row["tries"] == 0 for row in graded),
    }
    common.show_funnel("judgments", ("answers", len(graded)), dropped, "rated")
    print(f"  ratings  {rating_counts([row['rating'] for row in graded])}")
    cut = [truncated for rows in answers.values() for row in rows for truncated in row["truncated"]]
    print(f"  answers cut off at --max_new_tokens or the context: {sum(cut)} of {len(cut)}")
    refused = len(questions) * len(models) - sum(map(len, answers.values()))
    if refused:
        common.warn(f"{refused} questions were refused by the models' server; they count nowhere")
    common.show_tokens(judge)
    print(f"\nwrote {markdown} and .csv; answers and judgments of {', '.join(models)} stand beside them")


if __name__ == "__main__":
    common.run_stage(main, Args)
