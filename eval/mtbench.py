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
            OUTPUT_DIR/mtbench_answers.jsonl and mtbench_judgments.jsonl, where an interrupted run goes on:
            {"key": "…", "model": "SPA", "question_id": 101, "category": "reasoning", "turns": ["…", "…"], …}
            {"key": "…", "model": "SPA", "question_id": 101, "turn": 2, "rating": 7, "judgment": "…", …}
            `key` is made of the model's files, the settings and the prompt: a row whose key fits is never
            made again, rows of other settings stay where they are
    run     python eval/mtbench.py --questions question.jsonl --references gpt-4.jsonl \\
                --models Vanilla=ORG/NAME SPA=runs/x/06_model --judge_model gpt-4 --judge_endpoint URL

Published scores have GPT-4 as the judge; those of another one compare only with each other.

Hardware: one GPU that holds the models one after the other, and the judge if it is local.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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
RETRIES = 2  # sampled, after the greedy judgment
TURNS = ("1", "2", "both")
OVERALL = "all questions"


@dataclass
class Args:
    models: list[str] | None = arg(None, "NAME=MODEL or MODEL each: hub name, folder or smollm2-135m")
    questions: str | None = arg(None, "FastChat's mt_bench question file")
    references: str | None = arg(None, "FastChat's file of reference answers, for math, reasoning and coding")
    limit: int | None = arg(None, "only the first questions of each category")
    max_new_tokens: int = arg(1024, "longest answer in tokens (FastChat)")
    judge_model: str | None = arg(None, "the judge: a local model, or its name at --judge_endpoint")
    judge_endpoint: str | None = arg(None, "URL of the judge's server; its key: SPA_JUDGE_API_KEY")
    judge_chat_template: str | None = arg(None, "file with the judge's Jinja chat template")
    judge_max_new_tokens: int = arg(2048, "longest judgment in tokens (FastChat)")
    judge_system: bool = arg(True, "--no-…: no system prompt, for a judge whose template refuses one (ours)")
    chat_template: str | None = arg(None, "file with a Jinja chat template, for models that have none")
    dtype: str = arg(
        "auto", "weights; auto: bfloat16 on a GPU, else float32", ("auto", "float32", "bfloat16")
    )
    device_map: str | None = arg(
        None, "auto spreads a model too large for one GPU over all", ("auto", "balanced", "sequential")
    )
    continuous_batching: bool = arg(True, "on a GPU where it works: transformers' own")
    batch_size: int = arg(16, "answers or judgments written at a time (ours)")
    concurrency: int = arg(32, "requests under way at the judge's endpoint")
    request_timeout: float = arg(600.0, "seconds that an endpoint may take for an answer")
    retries: int = arg(6, "further tries of a request that failed, after 1, 2, 4 … seconds")
    output_dir: str = arg("runs/eval", "folder of the tables")
    seed: int = arg(0, "seed of sampled answers, and of a judgment's second and third try")
    overwrite: bool = arg(False, "answer and judge again what is already there")


# ---------------------------------------------------------------------------------------------------
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
    """[{"question_id", "category", "turns", "references"}, …], `references` two texts or None."""
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
            question = {"question_id": id, "category": category, "turns": turns}
            questions.append(question | {"references": answers[id] if needs else None})
    return questions


# ---------------------------------------------------------------------------------------------------
# Answers.


def encode_conversation(tokenizer, texts: list[str]) -> list[int]:
    """Token ids of a conversation (user, assistant, user, …) up to where the assistant begins to write."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return common.encode_pieces(tokenizer, common.render_chat(tokenizer, messages, True))


def write_turn(
    backend: common.LocalModel, prompts: list[list[int]], seeds: list[int], temperature: float, longest: int
) -> list[common.Completion]:
    """An answer to each tokenized conversation, of at most `longest` tokens and within the context."""
    rooms = [max(0, min(longest, backend.context - len(prompt))) for prompt in prompts]
    answers = [common.Completion("", 0, True)] * len(prompts)  # what it is where no room is left
    for room in sorted(set(rooms) - {0}):
        places = [i for i, found in enumerate(rooms) if found == room]
        groups = backend.decode(
            [prompts[i] for i in places],
            [1] * len(places),
            [seeds[i] for i in places],
            temperature=temperature,
            max_new_tokens=room,
        )
        for i, (answer,) in zip(places, groups, strict=True):
            answers[i] = answer
    return answers


def answer_batch(args: Args, backend: common.LocalModel, batch: list[dict]) -> list[dict]:
    """The rows of some questions of one temperature: both turns, the second after the first."""
    temperature = TEMPERATURES.get(batch[0]["category"], OTHER_TEMPERATURE)
    texts, cut = [[] for _ in batch], [[] for _ in batch]
    for turn in (0, 1):
        for text, row in zip(texts, batch, strict=True):
            text.append(row["turns"][turn])
        prompts = [encode_conversation(backend.tokenizer, text) for text in texts]
        seeds = [common.derive_seed(args.seed, row["question_id"], turn) for row in batch]
        for i, answer in enumerate(write_turn(backend, prompts, seeds, temperature, args.max_new_tokens)):
            texts[i].append(answer.text)
            cut[i].append(answer.truncated)
    return [{"turns": text[1::2], "truncated": ends} for text, ends in zip(texts, cut, strict=True)]


def answer_questions(args: Args, backend, name: str, rows: list[dict], done: dict, file) -> None:
    """Adds the model's missing answers to `done` and `file`; each row is a question with its `key`.

    Batches are planned over all questions, so an interruption changes none.
    """
    from tqdm import tqdm

    missing = sum(row["key"] not in done for row in rows)
    if not missing:
        return
    backend.open()
    groups: dict[float, list[dict]] = {}
    for row in rows:
        groups.setdefault(TEMPERATURES.get(row["category"], OTHER_TEMPERATURE), []).append(row)
    with tqdm(total=len(rows), initial=len(rows) - missing, unit="question", desc=f"answers {name}") as bar:
        for group in groups.values():
            lengths = [len(encode_conversation(backend.tokenizer, row["turns"][:1])) for row in group]
            made = [row["key"] in done for row in group]

            def work(batch: list[int], group=group) -> list[dict]:
                return answer_batch(args, backend, [group[i] for i in batch])

            batches = common.plan_batches(lengths, [1] * len(group), backend.sequences())
            for i, answer in common.run_batches(backend, batches, made, work):
                if not made[i]:
                    row = group[i]
                    about = {"key": row["key"], "model": name, "question_id": row["question_id"]}
                    done[row["key"]] = about | {"category": row["category"]} | answer
                    file.write(common.dump_row(done[row["key"]]))
                    file.flush()
                    bar.update()
                bar.set_postfix_str(backend.rates())


# ---------------------------------------------------------------------------------------------------
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
    """The first [[number]] of a judgment, else its first [number]; None if it isn't from 1 to 10.

    The patterns are FastChat's. A whole number comes as an int.
    """
    number = r"(\d+\.?\d*)"
    match = re.search(rf"\[\[{number}\]\]", text) or re.search(rf"\[{number}\]", text)
    value = float(match[1]) if match else math.nan
    if not 1 <= value <= 10:
        return None
    return int(value) if value == int(value) else value


def judge_batch(args: Args, judge: common.Backend, batch: list[dict]) -> list[dict]:
    """{"rating", "judgment", "tries"} of each item; judgment None: too long for the judge, or refused."""
    found = [{"rating": None, "judgment": None, "tries": 0} for _ in batch]
    longest = judge.context - args.judge_max_new_tokens
    todo = [i for i, item in enumerate(batch) if judge.length(item["prompt"], item["system"]) <= longest]
    for attempt in range(1 + RETRIES):
        answers = judge.complete(
            [
                common.Request(
                    batch[i]["prompt"],
                    batch[i]["system"],
                    1,
                    common.derive_seed(args.seed, batch[i]["key"], attempt),
                )
                for i in todo
            ],
            temperature=0.0 if attempt == 0 else 1.0,
            max_new_tokens=args.judge_max_new_tokens,
        )
        for i, (answer,) in zip(todo, answers, strict=True):
            if answer:
                rating = parse_rating(answer.text)
                found[i] = {"rating": rating, "judgment": answer.text, "tries": attempt + 1}
        todo = [
            i for i, (answer,) in zip(todo, answers, strict=True) if answer and found[i]["rating"] is None
        ]
    return found


def judge_answers(args: Args, judge: common.Backend, items: list[dict], done: dict, file) -> None:
    """Adds the missing judgments to `done` and `file`; an item has key, model, question_id, turn, prompts."""
    made = [item["key"] in done for item in items]
    if all(made):
        return
    judge.open()
    lengths = [judge.length(item["prompt"], item["system"]) for item in items]
    batches = common.plan_batches(lengths, [1] * len(items), judge.sequences())

    def work(batch: list[int]) -> list[dict]:
        return judge_batch(args, judge, [items[i] for i in batch])

    with common.progress("judgments", batches, made) as bar:
        for i, found in common.run_batches(judge, batches, made, work):
            if not made[i]:
                about = {key: items[i][key] for key in ("key", "model", "question_id", "turn")}
                done[about["key"]] = about | {"judge": args.judge_model} | found
                file.write(common.dump_row(done[about["key"]]))
                file.flush()
                bar.update()
            bar.set_postfix_str(judge.rates())


# ---------------------------------------------------------------------------------------------------
# Models and resume.


def complete_file(args: Args, path: Path, keys: list[str], make) -> list[dict]:
    """The rows `keys` of a file, in order. make(done, file) adds those that are missing to both.

    At the end the file has the rows of other settings first, then these.
    """
    done, wanted = shared.read_done(path), set(keys)
    if args.overwrite:
        done = {key: row for key, row in done.items() if key not in wanted}
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        make(done, file)
    rows = [done[key] for key in keys]
    with common.replace_file(path) as file:
        others = [row for key, row in done.items() if key not in wanted]
        file.writelines(common.dump_row(row) for row in (*others, *rows))
    return rows


# ---------------------------------------------------------------------------------------------------
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
            other = turn_values({q: first[q] for q in of_category}, turn) if first else {}
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
        overall.append(
            [name, str(both["n"]), str(both["unrated"]), *means, interval_text(*change, sign=True)]
        )
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
    common.check_at_least(args, 1, "limit", "max_new_tokens", "judge_max_new_tokens", "batch_size")
    check(common.processes()[1] == 1, "start this with python: one process; --device_map uses several GPUs")
    models = shared.name_models(args.models)
    check(bool(args.questions), "--questions FILE is wanted: FastChat's mt_bench question.jsonl")
    check(
        bool(args.judge_model), "--judge_model is wanted: a local model, or a name and --judge_endpoint URL"
    )
    questions = read_questions(args.questions, args.references, args.limit)
    answers_file = shared.output_path(args.output_dir, "mtbench_answers.jsonl")
    judgments_file = answers_file.with_name("mtbench_judgments.jsonl")
    judge = common.make_backend(args, "judge_")
    if not args.judge_endpoint and args.judge_model in models.values():
        common.warn(f"{args.judge_model} judges itself; judges prefer their own answers")
    how = (args.dtype, args.device_map, args.continuous_batching, args.batch_size)
    backends = {name: common.LocalModel(model, args.chat_template, *how) for name, model in models.items()}

    template = Path(args.chat_template).read_text(encoding="utf-8") if args.chat_template else None
    rows = {}
    for name, model in models.items():
        settings = [
            name,
            model,
            shared.model_state(model),
            template,
            args.dtype,
            args.max_new_tokens,
            args.seed,
        ]
        rows[name] = [
            row | {"key": f"{common.derive_seed(*settings, row['question_id'], row['turns']):016x}"}
            for row in questions
        ]

    def answer(done: dict, file) -> None:
        missing = any(row["key"] not in done for group in rows.values() for row in group)
        if missing and args.judge_endpoint:
            judge.open()  # a wrong address ends this here, not after an hour of answers
        for name, backend in backends.items():
            answer_questions(args, backend, name, rows[name], done, file)
            common.show_tokens(backend)
            shared.release(backend)

    keys = [row["key"] for group in rows.values() for row in group]
    answers = complete_file(args, answers_file, keys, answer)

    template = args.judge_chat_template and Path(args.judge_chat_template).read_text(encoding="utf-8")
    state = [] if args.judge_endpoint else [shared.model_state(args.judge_model), args.dtype, template]
    settings = [args.judge_model, bool(args.judge_endpoint), state, args.judge_max_new_tokens, args.seed]
    items = []
    for row, question in zip(answers, questions * len(models), strict=True):
        for turn in (1, 2):
            system, prompt = judge_request(question, row["turns"], turn, args.judge_system)
            about = {"model": row["model"], "question_id": row["question_id"], "turn": turn}
            key = f"{common.derive_seed(*settings, about, system, prompt):016x}"
            items.append({"key": key, **about, "system": system, "prompt": prompt})
    judgments = complete_file(
        args,
        judgments_file,
        [item["key"] for item in items],
        lambda done, file: judge_answers(args, judge, items, done, file),
    )

    ratings: dict[str, dict] = {name: {} for name in models}
    for row in judgments:
        ratings[row["model"]].setdefault(row["question_id"], []).append(row["rating"])  # turn 1, then turn 2
    categories = {question["question_id"]: question["category"] for question in questions}
    first = next(iter(models))
    tables = {
        name: summarize(name, found, None if name == first else ratings[first], categories)
        for name, found in ratings.items()
    }
    text = show_tables(tables, f"{len(questions)} questions, judge {args.judge_model}")
    markdown, numbers = answers_file.with_name("mtbench.md"), answers_file.with_name("mtbench.csv")
    shared.write_text(markdown, text)
    shared.write_csv(numbers, [row for table in tables.values() for row in table])
    print(text)

    unparsed = sum(row["rating"] is None and row["judgment"] is not None for row in judgments)
    unasked = sum(row["judgment"] is None for row in judgments)
    dropped = {"no rating in three tries (null)": unparsed, "too long or refused (null)": unasked}
    common.show_funnel("judgments", ("answers", len(judgments)), dropped, "rated")
    print(f"  ratings  {rating_counts([row['rating'] for row in judgments])}")
    cut = sum(sum(row["truncated"]) for row in answers)
    print(f"  answers cut off at --max_new_tokens or the context: {cut} of {2 * len(answers)}")
    common.show_tokens(judge)
    print(f"\nwrote {markdown}\nwrote {numbers}\nwrote {answers_file}\nwrote {judgments_file}")


if __name__ == "__main__":
    common.run_stage(main, Args)
