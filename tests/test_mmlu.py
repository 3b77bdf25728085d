"""eval/mmlu.py: prompts, log-probabilities against plain forward passes, the letter parser, resume."""

import csv
import json
import math
import shutil

import datasets
import mmlu
import pytest
import torch
from conftest import read_rows, run_script

import common

QUESTIONS = {
    "abstract_algebra": [
        ("What is 1 + 1?", ["0", "1", "2", "3"], 2),
        (" Is Z a ring? \n", ["Yes", "No", "Never", "Only mod 10, since a ring needs ten parts"], 0),
        ("Which group {x} is cyclic?", ["S3", "Z/7", "Q8", "D4"], 1),
    ],
    "virology": [
        ("Which of these is a virus?", ["Dog", "Cat", "Oak", "Flu"], 3),
        ("RNA means <s> what?", ["a", "b", "c", "d"], 1),
    ],
}
SHOTS = {
    "abstract_algebra": [("2 + 2 = ?", ["4", "5", "6", "7"], 0), ("3 - 2 = ?", ["0", "1", "2", "3"], 1)],
    "virology": [("HIV is a", ["virus", "plant", "bird", "stone"], 0), ("DNA is", ["w", "x", "y", "z"], 3)],
}


def table(questions, subjects):
    return [
        {"question": question, "subject": subject, "choices": choices, "answer": answer}
        for subject in subjects
        for question, choices, answer in questions[subject]
    ]


def save(rows, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(path))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads cost tiny models more than they give, above all beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of the hub's layout: SUBJECT/{dev,test}-00000-of-00001.parquet."""
    folder = tmp_path_factory.mktemp("mmlu")
    for subject in QUESTIONS:
        save(table(SHOTS, [subject]), folder / subject / "dev-00000-of-00001.parquet")
        save(table(QUESTIONS, [subject]), folder / subject / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture
def run(call, data, tmp_path):
    def start(*options):
        return call("mmlu", "--data", data, "--shots", 2, "--output_dir", tmp_path / "out", *options)

    return start


def answers(tmp_path, model=None):
    rows = read_rows(tmp_path / "out" / "mmlu_answers.jsonl")
    return [row for row in rows if model in (None, row["model"])]


# ---------------------------------------------------------------------------------------------------
# Prompts and data.

PROMPT = """\
The following are multiple choice questions (with answers) about abstract algebra.

2 + 2 = ?
A. 4
B. 5
C. 6
D. 7
Answer: A

3 - 2 = ?
A. 0
B. 1
C. 2
D. 3
Answer: B

Is Z a ring?
A. Yes
B. No
C. Never
D. Only mod 10, since a ring needs ten parts
Answer:"""


def test_prompt_is_hendrycks_format_to_the_character(data):
    shots = mmlu.load_split(str(data), "dev", None)["abstract_algebra"]
    rows = mmlu.load_split(str(data), "test", None)["abstract_algebra"]
    assert mmlu.mmlu_prompt(rows[1], shots) == PROMPT
    alone = mmlu.mmlu_prompt(rows[2], [])
    assert alone.startswith(
        "The following are multiple choice questions (with answers) about abstract algebra."
    )
    assert "\n\nWhich group {x} is cyclic?\nA. S3\n" in alone, "braces stay"


def test_every_layout_gives_the_same_questions(data, tmp_path):
    wanted = mmlu.load_split(str(data), "test", None)
    assert [row["id"] for row in wanted["virology"]] == ["virology/0", "virology/1"]
    assert [row["answer"] for row in wanted["abstract_algebra"]] == ["C", "A", "B"]
    for split, questions in (("test", QUESTIONS), ("dev", SHOTS)):
        rows = table(questions, QUESTIONS)
        save(rows[:2], tmp_path / "all" / f"{split}-00000-of-00002.parquet")
        save(rows[2:], tmp_path / "all" / f"{split}-00001-of-00002.parquet")
    assert mmlu.load_split(str(tmp_path), "test", None) == wanted
    assert mmlu.load_split(str(tmp_path / "all"), "test", None) == wanted
    only = mmlu.load_split(str(tmp_path), "test", ["virology"])
    assert only == {"virology": wanted["virology"]} == mmlu.load_split(str(data), "test", ["virology"])
    file = str(data / "virology" / "test-00000-of-00001.parquet")
    assert mmlu.load_split(file, "test", None) == only
    assert mmlu.load_split(file, "dev", None) == mmlu.load_split(str(data), "dev", ["virology"])


def test_hub_data_set_is_asked_by_configuration(monkeypatch):
    asked = []

    def load(name, configuration, split):
        asked.append((name, configuration, split))
        return table(QUESTIONS, QUESTIONS if configuration == "all" else [configuration])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(mmlu.load_split("cais/mmlu", "test", None)) == ["abstract_algebra", "virology"]
    assert list(mmlu.load_split("cais/mmlu", "dev", ["virology"])) == ["virology"]
    assert asked == [("cais/mmlu", "all", "test"), ("cais/mmlu", "virology", "dev")]


GOOD = {"question": "Q?", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": 4}, "row 2: 'answer' is 4"),
        ({"answer": -1}, "row 2: 'answer' is -1"),
        ({"answer": None}, "row 2: 'answer' is None"),
        ({"choices": ["a", "b", "c"]}, "row 2: 'choices' must be four texts"),
        ({"question": " "}, "row 2: 'question' is empty"),
        ({"subject": None}, "row 2: 'subject' is empty"),
    ],
)
def test_bad_rows_are_named(call, tmp_path, change, said):
    save([GOOD, GOOD | change], tmp_path / "all" / "test-0.parquet")
    code, _, err = call("mmlu", "--models", "x", "--data", tmp_path, "--output_dir", tmp_path / "out")
    assert code == 2 and f"test-0.parquet, {said}" in err and len(err.splitlines()) == 1, err


def test_bad_files_and_options_are_one_line(call, data, tmp_path, tiny):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "test-0.parquet").write_text("nothing")
    (tmp_path / "empty").mkdir()
    save([{k: v for k, v in GOOD.items() if k != "answer"}], tmp_path / "less" / "test-0.parquet")
    model = ("--models", tiny())
    cases = [
        ((*model, "--data", tmp_path / "broken"), "test-0.parquet: not a readable Parquet file"),
        ((*model, "--data", tmp_path / "empty"), "no test questions"),
        ((*model, "--data", tmp_path / "less"), "row 1: no column 'answer'"),
        ((*model, "--data", tmp_path / "absent"), "absent: no such file or folder"),
        ((*model, "--data", data, "--subjects", "anatomy"), "no test questions for --subjects anatomy"),
        ((*model, "--data", data, "--shots", 3), "--shots 3, but"),
        ((*model, "--data", data, "--shots", -1), "--shots -1: at least 0"),
        (("--data", data, "--shots", 2), "--models: at least one"),
        ((*model, tiny(), "--data", data, "--shots", 2), "twice; give each a NAME=MODEL"),
        (("--models", "x=", "--data", data, "--shots", 2), "--models x=: NAME=MODEL"),
        ((*model, "--data", data, "--shots", 2, "--chat_template", "no.jinja"), "no.jinja: no such file"),
        (("--models", tmp_path / "empty", "--data", data, "--shots", 2), "can't be loaded"),
        ((*model, "--data", data, "--shots", 2, "--read", "guess"), "invalid choice"),
    ]
    for options, said in cases:
        code, _, err = call("mmlu", *options, "--output_dir", tmp_path / "out")
        assert code == 2 and said in err and len(err.splitlines()) == 1, (options, err)


# ---------------------------------------------------------------------------------------------------
# The two readings.


def plain_logprobs(model, tokenizer, prompt, chat=False):
    """log P of the whole strings prompt + " A" …, minus that of what all four share: one pass a string."""
    if chat:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        rows = [tokenizer(text + x, add_special_tokens=False).input_ids for x in "ABCD"]
    else:
        rows = [tokenizer(f"{prompt} {x}", split_special_tokens=True).input_ids for x in "ABCD"]
    common_part = 0
    while len({row[common_part] for row in rows}) == 1:
        common_part += 1
    found = []
    for row in rows:
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([row])).logits[0].double(), dim=-1)
        found.append(sum(float(logprobs[i - 1, row[i]]) for i in range(common_part, len(row))))
    return found


@pytest.mark.parametrize("kind", ["plain", "bos"])
@pytest.mark.parametrize("chat", [False, True])
def test_logprobs_are_those_of_plain_forward_passes(run, tmp_path, tiny, data, kind, chat):
    code, out, err = run("--models", f"m={tiny(kind)}", "--batch_size", 2, *(["--chat"] if chat else []))
    assert code == 0, err
    backend = common.LocalModel(tiny(kind))
    backend.open()
    shots, tests = (mmlu.load_split(str(data), split, None) for split in ("dev", "test"))
    questions = [(row, shots[subject]) for subject in tests for row in tests[subject]]
    rows = answers(tmp_path)
    assert len(rows) == len(questions) == 5
    right = 0
    for (row, before), found in zip(questions, rows, strict=True):
        if chat and "<s>" in row["question"]:
            continue  # `plain_logprobs` can't render that as text
        wanted = plain_logprobs(backend.model, backend.tokenizer, mmlu.mmlu_prompt(row, before), chat)
        assert found["logprobs"] == pytest.approx(wanted, abs=2e-5)
        assert found["predicted"] == "ABCD"[wanted.index(max(wanted))] and found["answer"] == row["answer"]
    right = sum(row["predicted"] == row["answer"] for row in rows)
    assert f"{100 * right / 5:.1f} ±" in out


def test_shots_are_read_once_a_subject(run, tiny, monkeypatch):
    read, read_tokens = [], common.read_tokens
    monkeypatch.setattr(common, "read_tokens", lambda *a: read.append(tuple(a[3].shape)) or read_tokens(*a))
    code, out, err = run("--models", tiny(), "--batch_size", 1)
    assert code == 0, err
    tokenizer = common.load_tokenizer(tiny())
    header = PROMPT[: PROMPT.index("Is Z")]
    once = len(tokenizer(header).input_ids)
    algebra = [width for _, width in read[:4]]  # the longer prompts come first: shots, then three questions
    assert len(read) == 2 + 5 and once - 2 <= algebra[0] <= once + 2
    assert sum(algebra) == algebra[0] + sum(width for width in algebra[1:] if width < once)
    assert f"{sum(rows * width for rows, width in read)} tokens in, 0 out" in out


def test_letter_tokens_of_several_pieces_are_scored_as_whole_strings(tiny):
    """Letters that take one, two and three tokens, in one batch with different paddings."""
    backend = common.LocalModel(tiny("plain"))
    backend.open()
    stems = [[7, 8, 9, 10, 11], [7, 8, 9], [7, 8, 5, 6]]
    rests = [
        [[20], [21, 30], [22, 31, 32], [21, 33]],
        [[20], [21], [22], [23]],
        [[40, 41]] * 2 + [[42], [43]],
    ]
    trunk = {"tokens": [7, 8]}
    readers = [common.Reader(backend.model, stems, [0] * 3, trunk) for _ in range(2)]
    found = [mmlu.read_letters(reader, rests) for reader in readers]
    assert found[0] == found[1], "the cache of the prefix is left as it was"
    assert readers[1].tokens_read == readers[0].tokens_read - 2, "and used again"
    for stem, four, values in zip(stems, rests, found[0], strict=True):
        for rest, value in zip(four, values, strict=True):
            with torch.no_grad():
                logprobs = torch.log_softmax(backend.model(torch.tensor([stem + rest])).logits[0], dim=-1)
            wanted = sum(float(logprobs[len(stem) + i - 1, token]) for i, token in enumerate(rest))
            assert value == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize(("kind", "starts"), [("plain", ""), ("bos", "<s>")])
def test_one_bos_where_the_tokenizer_adds_one_and_none_twice(tiny, kind, starts):
    tokenizer = common.load_tokenizer(tiny(kind))
    stem, rests = mmlu.letter_tokens(tokenizer, "Is <s> a tag?\nAnswer:", False)
    assert tokenizer.decode(stem + rests[2]) == f"{starts}Is <s> a tag?\nAnswer: C"
    assert stem.count(1) == bool(starts), "the question's <s> is text"
    stem, rests = mmlu.letter_tokens(tokenizer, "Hi\nAnswer:", True)
    text = "<|im_start|>user\nHi\nAnswer:<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(stem + rests[1]) == f"{starts}{text}B", (
        "no space where the template ends with one"
    )


def test_space_before_the_letter_follows_the_template(tiny):
    tokenizer = common.load_tokenizer(tiny("plain"))
    tokenizer.chat_template = "[INST] {{ messages[0]['content'] }} [/INST]"
    stem, rests = mmlu.letter_tokens(tokenizer, "Hi", True)
    assert [tokenizer.decode(stem + rest) for rest in rests] == [f"[INST] Hi [/INST] {x}" for x in "ABCD"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (" (B) ", "B"),
        ("**C**", "C"),
        ("D.", "D"),
        ("A", "A"),
        ("A.", "A"),
        ("A\n\nThe sum is 4", "A"),
        ("A. Paris", "A"),
        ("A) Paris", "A"),
        ("A, because it is", "A"),
        ("A because it is", "A"),
        ("Answer: B", "B"),
        ("Answer: A", "A"),
        ("answer:C", "C"),
        ("The answer is B.", "B"),
        ("The answer is (D), not A", "D"),
        ("The correct answer is: **A**", "A"),
        ("A bird, so the answer is C", "C"),
        ("I'd go with option D", "D"),
        ("B is right", "B"),
        ("'C'", "C"),
        ("A bird", None),
        ("The answer is a bird", None),
        ("The answer is A bird", None),
        ("Answer: none of them", None),
        ("D-Day", None),
        ("C++", None),
        ("B's", None),
        ("AB", None),
        ("E", None),
        ("", None),
    ],
)
def test_letter_parser(text, letter):
    assert mmlu.parse_letter(text) == letter


def test_generate_reads_letters_and_counts_what_has_none(run, tmp_path, tiny, monkeypatch):
    said = iter(["C", "The answer is B.", "Plants", "(D)", ""])
    seen = []

    def complete(self, requests, *, temperature, max_new_tokens):
        seen.extend((r.prompt, r.system, temperature, max_new_tokens) for r in requests)
        return [[common.Completion(next(said), 3, False)] for _ in requests]

    monkeypatch.setattr(common.LocalModel, "complete", complete)
    code, out, err = run("--models", tiny(), "--read", "generate", "--batch_size", 1)
    assert code == 0, err
    assert {call[1:] for call in seen} == {(None, 0.0, 16)} and PROMPT in [call[0] for call in seen]
    rows = answers(tmp_path)
    by_text = {row["text"]: row["predicted"] for row in rows}
    assert by_text == {"C": "C", "The answer is B.": "B", "Plants": None, "(D)": "D", "": None}
    (overall,) = [row for row in table_of(tmp_path) if row["subject"] == mmlu.MICRO]
    assert overall["unread"] == "2" and overall["n"] == "5"
    assert "by generated letter, chat template" in out and "minus" not in out, "one model has no difference"


def table_of(tmp_path):
    with open(tmp_path / "out" / "mmlu.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_too_long_prompts_lose_shots_from_the_end_then_count_as_wrong(run, tmp_path, tiny, monkeypatch):
    tokenizer = common.load_tokenizer(tiny())
    long = len(tokenizer(PROMPT + " A", split_special_tokens=True).input_ids)
    monkeypatch.setattr(common, "context_length", lambda config: long - 1)
    code, out, err = run("--models", tiny(), "--subjects", "abstract_algebra")
    assert code == 0, err
    assert [row["shots"] for row in answers(tmp_path)] == [2, 1, 2]
    assert "fewer than 2 shots, to fit the context: 1 answers" in out
    one_shot = PROMPT.replace(PROMPT[PROMPT.index("3 - 2") : PROMPT.index("Is Z")], "")
    model = common.load_model(tiny())
    wanted = plain_logprobs(model, tokenizer, one_shot)
    assert answers(tmp_path)[1]["logprobs"] == pytest.approx(wanted, abs=2e-5)
    monkeypatch.setattr(common, "context_length", lambda config: 20)
    code, out, err = run("--models", tiny(), "--overwrite")
    assert code == 0, err
    assert all(row["predicted"] is None and row["shots"] is None for row in answers(tmp_path))
    assert table_of(tmp_path)[-1]["accuracy"] == "0.0" and "fit the context: 5 answers" in out


# ---------------------------------------------------------------------------------------------------
# Tables.


def marked(model, marks):
    """Answers of a model: subject -> right (1) or wrong (0)."""
    return [
        {"model": model, "subject": subject, "answer": "A", "predicted": "A" if mark else "B"}
        for subject, group in marks.items()
        for mark in group
    ]


def test_accuracies_errors_and_differences_by_hand():
    first = marked("a", {"x": [1, 1, 1, 0, 0, 0, 0, 0], "y": [1, 0]})
    other = marked("b", {"x": [1, 1, 1, 1, 0, 0, 0, 0], "y": [1, 1]})
    x, y, micro, macro = mmlu.summarize(first, first)
    assert (x["n"], x["correct"], x["accuracy"]) == (8, 3, 0.375)
    assert x["standard_error"] == pytest.approx(math.sqrt(0.375 * 0.625 / 8))
    assert micro["accuracy"] == pytest.approx(0.4) and macro["accuracy"] == pytest.approx((0.375 + 0.5) / 2)
    assert micro["standard_error"] == pytest.approx(0.15491933), "√(0.4 · 0.6 / 10)"
    assert y["standard_error"] == pytest.approx(0.35355339), "√(0.5 · 0.5 / 2)"
    wanted = math.sqrt(x["standard_error"] ** 2 + y["standard_error"] ** 2) / 2
    assert macro["standard_error"] == pytest.approx(wanted)
    assert math.isnan(micro["difference"]) and mmlu.difference_text(micro) == "–"
    x, y, micro, macro = mmlu.summarize(other, first)
    assert [row["difference"] for row in (x, y, micro)] == pytest.approx([1 / 8, 1 / 2, 2 / 10])
    assert macro["difference"] == pytest.approx((1 / 8 + 1 / 2) / 2)
    # the bootstrap of 2 ones among 10: quantiles of Binomial(10, 0.2) / 10
    assert (micro["difference_low"], micro["difference_high"]) == (0.0, 0.5)
    assert mmlu.difference_text(micro) == "+20.0 [+0.0, +50.0]"
    (worse,) = [row for row in mmlu.summarize(first, other) if row["subject"] == mmlu.MICRO]
    assert mmlu.difference_text(worse) == "-20.0 [-50.0, +0.0]" and worse["difference"] == pytest.approx(-0.2)


def test_several_models_side_by_side(run, tmp_path, tiny):
    code, out, err = run("--models", f"one={tiny('plain')}", f"two={tiny('bos')}", "--limit", 2)
    assert code == 0, err
    rows = table_of(tmp_path)
    subjects = ["abstract_algebra", "virology", mmlu.MICRO, mmlu.MACRO]
    assert [(r["model"], r["subject"]) for r in rows] == [(m, s) for m in ("one", "two") for s in subjects]
    text = (tmp_path / "out" / "mmlu.md").read_text(encoding="utf-8")
    assert text.strip() in out and "2-shot, by letter log-probability, plain text" in text
    assert "minus one" in text and "| virology" in text
    for name in ("mmlu.md", "mmlu.csv", "mmlu_answers.jsonl"):
        assert f"wrote {tmp_path / 'out' / name}" in out
    right = {m: [r["predicted"] == r["answer"] for r in answers(tmp_path, m)] for m in ("one", "two")}
    for row in rows:
        if row["subject"] == mmlu.MICRO:
            assert float(row["accuracy"]) == sum(right[row["model"]]) / 4


# ---------------------------------------------------------------------------------------------------
# Resume.


def test_resume_reads_only_what_is_missing_and_ends_with_the_same_bytes(run, tmp_path, tiny, monkeypatch):
    file = tmp_path / "out" / "mmlu_answers.jsonl"
    options = ("--models", f"m={tiny()}", "--batch_size", 1)
    assert run(*options)[0] == 0
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[1:3], lines[4][:20]]))  # the last line was half written
    read, letters = [], mmlu.read_letters
    monkeypatch.setattr(mmlu, "read_letters", lambda *a: read.append(len(a[1])) or letters(*a))
    assert run(*options)[0] == 0
    assert read == [1, 1, 1] and file.read_bytes() == whole
    monkeypatch.setattr(common.LocalModel, "open", lambda self: pytest.fail("nothing is missing"))
    assert run(*options)[0] == 0
    monkeypatch.undo()
    monkeypatch.setattr(mmlu, "read_letters", lambda *a: read.append(len(a[1])) or letters(*a))
    read.clear()
    assert run(*options, "--overwrite")[0] == 0
    assert sum(read) == 5 and file.read_bytes() == whole


def test_other_settings_and_other_weights_are_other_rows(run, tmp_path, tiny):
    folder = tmp_path / "model"
    shutil.copytree(tiny(), folder)
    assert run("--models", f"m={folder}")[0] == 0
    assert run("--models", f"m={folder}", "--shots", 1)[0] == 0
    assert len(answers(tmp_path)) == 10, "rows of 2 shots are kept"
    assert run("--models", f"m={folder}", "--shots", 1, "--limit", 1)[0] == 0
    assert len(answers(tmp_path)) == 10, "a part of what is there needs nothing"
    shutil.copytree(tiny("bos"), folder, dirs_exist_ok=True)
    assert run("--models", f"m={folder}", "--shots", 1)[0] == 0
    rows = answers(tmp_path)
    assert len(rows) == 15 and rows[-1]["logprobs"] != rows[-6]["logprobs"]


def test_a_file_that_is_not_ours_is_refused(run, tmp_path, tiny):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mmlu_answers.jsonl").write_text('{"id": 1}\n')
    code, _, err = run("--models", tiny())
    assert code == 2 and "line 1: not a row of this script" in err


def test_as_a_user_runs_it(data, tmp_path, tiny):
    options = ("--data", data, "--shots", 1, "--subjects", "virology", "--output_dir", tmp_path / "out")
    done = run_script("eval/mmlu.py", "--models", f"m={tiny()}", *options, "--read", "generate")
    assert done.returncode == 0, done.stderr
    row = answers(tmp_path)[0]
    assert row["id"] == "virology/0" and isinstance(row["text"], str) and "logprobs" not in row
    assert json.dumps(row, ensure_ascii=False) in (tmp_path / "out" / "mmlu_answers.jsonl").read_text("utf-8")
    assert "| m" in done.stdout and "Traceback" not in done.stderr
