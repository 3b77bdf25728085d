"""MMLU accuracy of one or several models (arXiv 2009.03300; the paper's Table 2).

Each question stands behind `--shots` answered ones of its subject (the first of the dev split). Two readings:

    --read logprob   of the four letters the one with the highest log-probability after "Answer:" (default)
    --read generate  the letter in a greedy answer of at most 16 tokens, under the chat template; an answer
                     without a letter is wrong, and counted

    reads   --data: a data set of the hub, or a folder of its layout (all/test-*.parquet, all/dev-*.parquet,
            or SUBJECT/ instead of all/), or one test file with dev-*.parquet beside it. Columns: question,
            subject, choices (four texts), answer (0 to 3)
    writes  OUTPUT_DIR/mmlu.md and mmlu.csv: accuracy with standard error by subject, over all questions
            (micro) and over the subjects (macro), and each model's paired difference to the first one
            OUTPUT_DIR/mmlu_answers.jsonl, a row per question and model, where an interrupted run goes on:
            {"key": "…", "id": "anatomy/0", "subject": "anatomy", "model": "SPA", "answer": "B",
             "predicted": "C", "shots": 5, "logprobs": [-2.1, -1.9, -0.8, -3.0]}
            `key` is made of the model's files, the settings and the prompt: a row whose key fits is never
            computed again, rows of other settings stay where they are
    run     python eval/mmlu.py --models Vanilla=smollm2-135m SPA=runs/x/06_model --subjects anatomy virology

For numbers to publish, lm-evaluation-harness is the better choice. It loads our checkpoints as they are:
    lm_eval --model hf --model_args pretrained=runs/x/06_model --tasks mmlu --num_fewshot 5
Ours has its prompt and needs no other package. A BOS token stands before plain text where the tokenizer puts
one; special tokens spelled in a question are read as text; a prompt that exceeds the context loses its last
shots (as in its own code).

Hardware: one GPU that holds the model, or a patient CPU: 14,042 questions of about 700 tokens each.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import shared

import common
from common import UserError, arg, check

LETTERS = "ABCD"
HEADER = "The following are multiple choice questions (with answers) about {subject}.\n\n"
QUESTION = "{question}\nA. {choices[0]}\nB. {choices[1]}\nC. {choices[2]}\nD. {choices[3]}\nAnswer:"
ANSWER_TOKENS = 16  # of --read generate
MICRO, MACRO = "all questions (micro)", "mean of subjects (macro)"


@dataclass
class Args:
    models: list[str] | None = arg(None, "NAME=MODEL or MODEL each: hub name, folder or smollm2-135m")
    data: str = arg("cais/mmlu", "data set of the hub, or a local folder or test file of its layout")
    subjects: list[str] | None = arg(None, "only these (anatomy, virology, …); default: all")
    limit: int | None = arg(None, "only the first questions of each subject")
    shots: int = arg(5, "answered questions of the dev split before each question (arXiv 2009.03300)")
    read: str = arg("logprob", "how the letter is read", ("logprob", "generate"))
    chat: bool = arg(
        False, "the chat template also for logprob; plain text is lm-evaluation-harness's default"
    )
    chat_template: str | None = arg(None, "file with a Jinja chat template, for models that have none")
    dtype: str = arg(
        "auto", "weights; auto: bfloat16 on a GPU, else float32", ("auto", "float32", "bfloat16")
    )
    device_map: str | None = arg(
        None, "auto spreads a model too large for one GPU over all", ("auto", "balanced", "sequential")
    )
    batch_size: int = arg(16, "questions read at a time (ours)")
    output_dir: str = arg("runs/eval", "folder of the tables")
    overwrite: bool = arg(False, "answer again what mmlu_answers.jsonl already has")


# ---------------------------------------------------------------------------------------------------
# Questions: {"id", "subject", "question", "choices", "answer"}, from the hub or from files.


def split_files(data: Path, split: str, subjects: list[str] | None) -> list[Path]:
    """The files of one split, in a folder of the hub's layout or beside one test file."""
    if data.is_file():
        return [data] if split == "test" else sorted(data.parent.glob(f"{split}*.parquet"))
    places = subjects or sorted(path.name for path in data.iterdir() if path.is_dir())
    if (data / "all").is_dir():
        places = ["all"]
    if any(data.glob("test*.parquet")):
        places = ["."]
    return [file for place in places for file in sorted((data / place).glob(f"{split}*.parquet"))]


def read_file(path: Path) -> list[tuple[str, dict]]:
    """(where it stands, row) of a Parquet file. Raises UserError if it can't be read."""
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.Dataset.from_parquet(str(path), keep_in_memory=True).to_list()
    except Exception as error:  # pyarrow's and datasets' errors share no base class
        raise UserError(f"{path}: not a readable Parquet file ({common.first_line(error)})") from None
    return [(f"{path}, row {i}", row) for i, row in enumerate(rows, 1)]


def read_hub(name: str, split: str, subjects: list[str] | None) -> list[tuple[str, dict]]:
    """(where it stands, row) of one split of a hub data set: its configuration "all", or one a subject."""
    import datasets

    common.quiet_libraries()
    rows = []
    for configuration in subjects or ["all"]:
        try:
            table = datasets.load_dataset(name, configuration, split=split)
        except Exception as error:  # offline, renamed, no such subject: the client raises many kinds
            raise UserError(
                f"--data {name}: '{configuration}' can't be loaded ({type(error).__name__}: "
                f"{common.first_line(error)}); check --subjects and the network, or pass a downloaded folder"
            ) from None
        rows += [(f"{name}/{configuration}/{split}, row {i}", row) for i, row in enumerate(table, 1)]
    return rows


def check_question(where: str, row: dict) -> None:
    for column in ("question", "subject", "choices", "answer"):
        check(column in row, f"{where}: no column '{column}'; MMLU has question, subject, choices, answer")
    for column in ("question", "subject"):
        text = row[column]
        check(isinstance(text, str) and bool(text.strip()), f"{where}: '{column}' is empty or not text")
    choices, answer = row["choices"], row["answer"]
    four = isinstance(choices, list) and len(choices) == 4 and all(isinstance(c, str) for c in choices)
    check(four, f"{where}: 'choices' must be four texts")
    whole = isinstance(answer, int) and not isinstance(answer, bool)
    check(whole and 0 <= answer <= 3, f"{where}: 'answer' is {answer!r}; 0, 1, 2 or 3 is wanted")


def load_split(data: str, split: str, subjects: list[str] | None) -> dict[str, list[dict]]:
    """subject -> its questions in file order, checked. Raises UserError with file and row."""
    if Path(data).exists():
        files = split_files(Path(data), split, subjects)
        layout = f"{split}-*.parquet, all/{split}-*.parquet or SUBJECT/{split}-*.parquet"
        of = f" for --subjects {' '.join(subjects)}" if subjects else ""
        check(bool(files), f"--data {data}: no {split} questions{of}; {layout} is wanted")
        rows = [row for file in files for row in read_file(file)]
    else:
        outside = data.count("/") == 1 and not data.startswith((".", "/"))
        check(outside, f"--data {data}: no such file or folder, nor a name of the hub (ORG/NAME)")
        rows = read_hub(data, split, subjects)
    found: dict[str, list[dict]] = {}
    for where, row in rows:
        check_question(where, row)
        if not subjects or row["subject"] in subjects:
            of_subject = found.setdefault(row["subject"], [])
            kept = {key: row[key] for key in ("subject", "question", "choices")}
            of_subject.append(
                {"id": f"{row['subject']}/{len(of_subject)}", **kept, "answer": LETTERS[row["answer"]]}
            )
    for subject in subjects or []:
        check(subject in found, f"--subjects {subject}: --data {data} has no {split} question of it")
    check(bool(found), f"--data {data}: its {split} split is empty")
    return dict(sorted(found.items()))


# ---------------------------------------------------------------------------------------------------
# Prompts, and the two readings of the answer.


def mmlu_prompt(row: dict, shots: list[dict]) -> str:
    """The question behind its subject's header and the answered `shots`, up to and with "Answer:"."""

    def ask(row: dict) -> str:
        return QUESTION.format(question=row["question"].strip(), choices=row["choices"])

    answered = "".join(f"{ask(shot)} {shot['answer']}\n\n" for shot in shots)
    return HEADER.format(subject=row["subject"].replace("_", " ")) + answered + ask(row)


ALONE = r"[\s(\[*\"']*([A-Da-d])[\s)\]*\"'.:]*"  # nothing else is said, so a small letter counts too
CUE = r"(?i:\b(?:answer|option|choice)(?:\s+is)?)[\s:=*(\[\"']*"  # "Answer: (", "the answer is **"
# neither "D-Day", "C++" and "B's" nor the article: "A bird" is not the letter A, "A because" is
LETTER = r"(?<![\w-])([B-D]|A(?![ \t]+(?!because\b|since\b)[A-Za-z]))(?![\w+-]|['’]s)"


def parse_letter(text: str) -> str | None:
    """The letter that a free answer gives, or None: alone, else behind a cue, else the first one."""
    match = re.fullmatch(ALONE, text) or re.search(CUE + LETTER, text) or re.search(LETTER, text)
    return match[1].upper() if match else None


def start_tokens(tokenizer) -> list[int]:
    """What the tokenizer puts before a plain text of its own accord: a BOS token, or nothing."""
    plain = tokenizer("A", add_special_tokens=False).input_ids
    whole = tokenizer("A").input_ids
    return whole[: whole.index(plain[0])]


def letter_tokens(tokenizer, prompt: str, chat: bool) -> tuple[list[int], list[list[int]]]:
    """(the tokens that the prompt with " A", " B", " C" and " D" behind it share, the rest of each).

    Whole strings are tokenized, so it does not matter if the space is part of the letter's token. Under a
    chat template the letter begins the assistant's turn, with no space where the template ends with one.
    """
    pieces = [(prompt, True)]
    if chat:
        pieces = common.render_chat(tokenizer, [{"role": "user", "content": prompt}], True)
    *before, (last, is_plain) = pieces
    space = "" if last[-1:].isspace() else " "
    rows = [common.encode_pieces(tokenizer, [*before, (f"{last}{space}{x}", is_plain)]) for x in LETTERS]
    stem = common.shared_prefix(rows)
    check(min(map(len, rows)) > stem, "this tokenizer does not tell A, B, C and D apart; use --read generate")
    start = [] if chat else start_tokens(tokenizer)
    return start + rows[0][:stem], [row[stem:] for row in rows]


def read_letters(reader: common.Reader, rests: list[list[list[int]]]):
    """log P of the letters A to D after each of the reader's rows, float (B, 4) as lists.

    rests: (B, 4) token lists, of mostly one token each.
    """
    import torch

    after = torch.log_softmax(reader.read([[]] * len(rests))[:, 0], dim=-1).cpu()
    sums = [[0.0] * 4 for _ in rests]
    for step in range(max(len(rest) for four in rests for rest in four)):
        for letter in range(4):
            logprobs = after
            if step:
                paths = [four[letter][:step] for four in rests]
                logprobs = torch.log_softmax(reader.look(paths), dim=-1).cpu()
            for i, four in enumerate(rests):
                if step < len(four[letter]):
                    sums[i][letter] += float(logprobs[i, four[letter][step]])
    return sums


def letter_reader(backend: common.LocalModel, rows: list[dict]):
    """A function from some of `rows`, all of one subject, to their answers by log-probability.

    What all prompts of the rows share (the subject's header and shots) is read once.
    """
    stems = [row["tokens"][0] for row in rows]
    trunk = {"tokens": stems[0][: common.shared_prefix(stems)]}

    def read(batch: list[dict]) -> list[dict]:
        stems, rests = zip(*(row["tokens"] for row in batch), strict=True)
        reader = common.Reader(backend.model, list(stems), [0] * len(stems), trunk)
        logprobs = read_letters(reader, rests)
        backend.count(reader.tokens_read, 0)
        finite = all(math.isfinite(value) for four in logprobs for value in four)
        check(finite, f"'{backend.name}' gives no finite probabilities; try --dtype float32")
        return [
            {"predicted": LETTERS[four.index(max(four))], "logprobs": [round(value, 6) for value in four]}
            for four in logprobs
        ]

    return read


def text_reader(backend: common.LocalModel, rows: list[dict]):
    """As `letter_reader`, from greedy answers under the chat template."""

    def read(batch: list[dict]) -> list[dict]:
        requests = [common.Request(row["prompt"], None, 1, 0) for row in batch]
        answers = backend.complete(requests, temperature=0.0, max_new_tokens=ANSWER_TOKENS)
        return [{"predicted": parse_letter(answer.text), "text": answer.text} for (answer,) in answers]

    return read


def nothing_to_read(backend: common.LocalModel, rows: list[dict]):
    """As `letter_reader`, for rows that exceed the context even without a shot."""
    return lambda batch: [{"predicted": None}] * len(batch)


def fit_context(args: Args, backend: common.LocalModel, row: dict) -> None:
    """Adds to a row its `prompt`, `length` in tokens and `used`, the shots that fit; None if not even 0 do.

    With --read logprob also its `tokens`: what `letter_tokens` gives.
    """
    for row["used"] in range(args.shots, -1, -1):
        row["prompt"] = mmlu_prompt(row, row["shots"][: row["used"]])
        if args.read == "logprob":
            row["tokens"] = letter_tokens(backend.tokenizer, row["prompt"], args.chat)
            row["length"] = len(row["tokens"][0]) + max(map(len, row["tokens"][1]))
        else:
            row["length"] = backend.length(row["prompt"]) + ANSWER_TOKENS
        if row["length"] <= backend.context:
            return
    row["used"] = None


# ---------------------------------------------------------------------------------------------------
# Models and resume.


def answer_questions(args: Args, backend, name: str, rows: list[dict], done: dict, file) -> None:
    """Adds the model's missing answers to `done` and `file`, batch by batch; each row has its `key`.

    Batches are planned over all rows, so an interruption changes none; the longest come first, since then
    memory is known early.
    """
    from tqdm import tqdm

    missing = sum(row["key"] not in done for row in rows)
    if not missing:
        return
    backend.open()
    groups: dict = {}
    for row in rows:
        fit_context(args, backend, row)
        of_subject = row["subject"] if args.read == "logprob" else ""
        groups.setdefault((row["used"] is None, of_subject, row["used"]), []).append(row)
    usual = letter_reader if args.read == "logprob" else text_reader
    longest_first = sorted(groups.items(), key=lambda group: -max(row["length"] for row in group[1]))
    with tqdm(total=len(rows), initial=len(rows) - missing, unit="question", desc=f"mmlu {name}") as bar:
        for (too_long, *_), group in longest_first:
            if all(row["key"] in done for row in group):
                continue
            read = (nothing_to_read if too_long else usual)(backend, group)
            lengths = [row["length"] for row in group]
            for batch in common.plan_batches(lengths, [1] * len(group), args.batch_size):
                chosen = [group[i] for i in batch]
                if all(row["key"] in done for row in chosen):
                    continue
                for row, answer in zip(chosen, read(chosen), strict=True):
                    if row["key"] not in done:
                        about = {key: row[key] for key in ("key", "id", "subject")} | {"model": name}
                        about |= {"answer": row["answer"], "predicted": None, "shots": row["used"]}
                        done[row["key"]] = about | answer
                        file.write(common.dump_row(done[row["key"]]))
                        bar.update()
                file.flush()
                bar.set_postfix_str(backend.rates())


# ---------------------------------------------------------------------------------------------------
# Tables.


def standard_error(share: float, n: int) -> float:
    """Of a share p of n questions: √(p (1 − p) / n)."""
    return math.sqrt(share * (1 - share) / n)


def summarize(answers: list[dict], first: list[dict]) -> list[dict]:
    """A row per subject, then one over all questions and one over the subjects, of one model.

    answers, first: (N,) rows of the model and of the first model, of the same questions. The difference is
    the mean over questions of "right" minus "right of the first", with its bootstrap interval. For the mean
    of subjects a question counts N / (subjects · questions of its subject), and the standard error is
    √(Σ se²) / subjects.
    """
    subjects = np.array([row["subject"] for row in answers])
    right = np.array([row["predicted"] == row["answer"] for row in answers], dtype=float)  # (N,)
    change = right - np.array([row["predicted"] == row["answer"] for row in first])
    unread = np.array([row["predicted"] is None for row in answers])

    def line(subject: str, chosen, weights) -> dict:
        n, low, high = int(chosen.sum()), math.nan, math.nan
        if answers is not first:
            low, high = shared.bootstrap_interval((change * weights)[chosen])
        return {
            "model": answers[0]["model"],
            "subject": subject,
            "n": n,
            "correct": int(right[chosen].sum()),
            "unread": int(unread[chosen].sum()),
            "accuracy": float((right * weights)[chosen].mean()),
            "standard_error": standard_error(float(right[chosen].mean()), n),
            "difference": math.nan if answers is first else float((change * weights)[chosen].mean()),
            "difference_low": low,
            "difference_high": high,
        }

    names, every, ones = sorted(set(subjects)), np.full(len(right), True), np.ones(len(right))
    lines = [line(str(name), subjects == name, ones) for name in names]
    sizes = {row["subject"]: row["n"] for row in lines}
    shares = np.array([len(right) / (len(names) * sizes[subject]) for subject in subjects])
    macro_error = math.sqrt(sum(row["standard_error"] ** 2 for row in lines)) / len(names)
    overall = [line(MICRO, every, ones), line(MACRO, every, shares) | {"standard_error": macro_error}]
    return lines + overall


def percent(value: float) -> str:
    return shared.round_half_up(100 * value, 1)


def difference_text(row: dict) -> str:
    if math.isnan(row["difference"]):
        return "–"
    texts = [percent(row[key]) for key in ("difference", "difference_low", "difference_high")]
    texts = [text if text.startswith(("-", "–")) else f"+{text}" for text in texts]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def show_tables(tables: dict[str, list[dict]], how: str) -> str:
    """mmlu.md: the overall accuracies, a row a model, and those by subject, a column a model."""
    first = next(iter(tables))

    def cell(row: dict) -> str:
        return f"{percent(row['accuracy'])} ± {percent(row['standard_error'])}"

    overall = []
    for name, rows in tables.items():
        micro, macro = rows[-2:]
        numbers = [str(micro["n"]), str(micro["unread"]), cell(micro), difference_text(micro)]
        overall.append([name, *numbers, cell(macro), difference_text(macro)])
    header = ["Model", "n", "unread", MICRO, f"minus {first}", MACRO, f"minus {first}"]
    compared = f" Difference to {first}, paired by question, with its 95 % bootstrap interval over questions."
    if len(tables) == 1:  # nothing to compare with
        compared, header = "", [cell for cell in header if not cell.startswith("minus")]
        overall = [[*row[:4], row[5]] for row in overall]
    by_subject = [
        [rows[0]["subject"], str(rows[0]["n"]), *map(cell, rows)]
        for rows in zip(*(table[:-2] for table in tables.values()), strict=True)
    ]
    return "\n".join(
        [
            "# MMLU",
            "",
            f"Accuracy in percent ± standard error; {how}.{compared} Guessing gives 25. An unread answer (no "
            "letter in it, or the prompt exceeds the context) is wrong.",
            "",
            shared.markdown_table(header, overall),
            "",
            shared.markdown_table(["Subject", "n", *tables], by_subject),
        ]
    )


def main(args: Args) -> None:
    common.check_at_least(args, 1, "limit", "batch_size")
    common.check_at_least(args, 0, "shots")
    check(common.processes()[1] == 1, "start this with python: one process; --device_map uses several GPUs")
    models = shared.name_models(args.models)
    tests = load_split(args.data, "test", args.subjects)
    shots = {subject: [] for subject in tests}
    if args.shots:
        shots |= load_split(args.data, "dev", args.subjects)
    for subject in tests:
        few = f"--shots {args.shots}, but {args.data} has {len(shots[subject])} dev questions of '{subject}'"
        check(len(shots[subject]) >= args.shots, few)
        shots[subject] = shots[subject][: args.shots]
    questions = [row | {"shots": shots[subject]} for subject in tests for row in tests[subject][: args.limit]]

    chat = args.chat or args.read == "generate"
    how = {"chat": chat, "read": args.read, "dtype": args.dtype}
    output = shared.output_path(args.output_dir, "mmlu_answers.jsonl")
    backends = {
        name: common.LocalModel(
            model, args.chat_template, args.dtype, args.device_map, False, args.batch_size
        )
        for name, model in models.items()
    }
    template = Path(args.chat_template).read_text(encoding="utf-8") if args.chat_template and chat else None
    keyed = {}
    for name, model in models.items():
        settings = [name, model, shared.model_state(model), how, template]
        keyed[name] = [
            row | {"key": f"{common.derive_seed(*settings, row['id'], mmlu_prompt(row, row['shots'])):016x}"}
            for row in questions
        ]
    wanted = {row["key"] for rows in keyed.values() for row in rows}
    done = shared.read_done(output)
    if args.overwrite:
        done = {key: row for key, row in done.items() if key not in wanted}
    with open(output, "a", encoding="utf-8", newline="\n") as file:
        for name, backend in backends.items():
            answer_questions(args, backend, name, keyed[name], done, file)
            common.show_tokens(backend)
            shared.release(backend)
    others = [row for key, row in done.items() if key not in wanted]
    answers = {name: [done[row["key"]] for row in rows] for name, rows in keyed.items()}
    with common.replace_file(output) as file:
        file.writelines(common.dump_row(row) for rows in (others, *answers.values()) for row in rows)

    first = next(iter(answers.values()))
    tables = {name: summarize(rows, first) for name, rows in answers.items()}
    kind = "chat template" if chat else "plain text"
    reading = "by letter log-probability" if args.read == "logprob" else "by generated letter"
    text = show_tables(tables, f"{args.shots}-shot, {reading}, {kind}, {args.data}")
    markdown, numbers = output.with_name("mmlu.md"), output.with_name("mmlu.csv")
    shared.write_text(markdown, text)
    shared.write_csv(numbers, [row for rows in tables.values() for row in rows])
    print(text)
    fewer = sum(row["shots"] != args.shots for rows in answers.values() for row in rows)
    if fewer:
        print(f"\n  fewer than {args.shots} shots, to fit the context: {fewer} answers")
    print(f"\nwrote {markdown}\nwrote {numbers}\nwrote {output}")


if __name__ == "__main__":
    common.run_stage(main, Args)
