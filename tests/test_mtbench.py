"""eval/mtbench.py: FastChat's files and prompts, two turns, ratings, tables, resume."""

import hashlib
import json
import math
import re
from collections import Counter

import mtbench
import pytest
import torch
from conftest import ROOT, TEMPLATES, make_model, make_tokenizer, read_rows, write_rows
from eval_helpers import csv_rows, judge_by, refuse, succeed

import common

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write {a} poem.", "Shorter!"]},
    {"question_id": 82, "category": "writing", "turns": ["Write a long letter about harm.", "In rhymes."]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1?", "And + 1?"], "reference": ["2", "3"]},
    {"question_id": 131, "category": "extraction", "turns": ["List: a, b", "As <|im_end|> JSON"]},
]
REFERENCES = [{"question_id": 111, "model_id": "gpt-4", "choices": [{"index": 0, "turns": ["2.", "It is 3."]}]}]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny models with room for a judge's prompt, and a judge that is neither."""
    made = {}
    for seed, kind in enumerate(("plain", "bos", "pad_eos")):
        folder = tmp_path_factory.mktemp(kind)
        tokenizer = make_tokenizer(kind)
        tokenizer.save_pretrained(folder)
        make_model(len(tokenizer), seed=seed, context=4096).save_pretrained(folder)
        made[kind] = str(folder)
    return made


@pytest.fixture
def options(models, tmp_path):
    """QUESTIONS for one model; answers of 6 tokens, judgments of 5. A later option stands, one of a list is added."""
    questions = write_rows(tmp_path / "question.jsonl", QUESTIONS)
    references = write_rows(tmp_path / "reference.jsonl", REFERENCES)
    usual = ["--questions", questions, "--references", references, "--output_dir", tmp_path / "out"]
    usual += ["--max_new_tokens", 6, "--judge_max_new_tokens", 5, "--judge_model", models["pad_eos"]]
    return [*usual, "--models", f"one={models['plain']}"]


@pytest.fixture
def two(models):
    return ["--models", f"two={models['bos']}"]  # beside that of the options


def rows_of(tmp_path, what, model="one"):
    return read_rows(tmp_path / "out" / f"mtbench_{what}_{model}.jsonl")


def table_of(tmp_path):
    return csv_rows(tmp_path / "out" / "mtbench.csv", "model", "category", "turn")


# ---------------------------------------------------------------------------------------------------------------------
# Files and prompts.


def test_the_published_files():
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "mt_bench_question.jsonl").exists():
        pytest.skip("the published files are not here")
    paths = [str(folder / f"mt_bench_{name}.jsonl") for name in ("question", "reference_gpt4")]
    questions = mtbench.read_questions(*paths, None)
    assert len({q["id"] for q in questions}) == 80 and len(mtbench.read_questions(*paths, 1)) == 8
    assert Counter(q["category"] for q in questions) == dict.fromkeys(mtbench.TEMPERATURES, 10)
    assert Counter(q["category"] for q in questions if q["references"]) == {"math": 10, "reasoning": 10, "coding": 10}
    (race,) = [q for q in questions if q["id"] == 101]
    assert race["references"][0].startswith("If you have just overtaken the second person")


GOOD = QUESTIONS[2]
TURNS = "line 1: 'question_id', 'category' and 'turns', two texts, are wanted"


@pytest.mark.parametrize(
    "text, references, said",
    [
        ("not json\n", None, "question.jsonl, line 1: broken JSON"),
        (json.dumps({"category": "math"}), None, "line 1: no 'question_id'"),
        (json.dumps(GOOD | {"turns": ["one"]}), REFERENCES, TURNS),
        (json.dumps(GOOD | {"turns": ["one", " "]}), REFERENCES, TURNS),
        (json.dumps(GOOD | {"category": 3}), REFERENCES, TURNS),
        (json.dumps(GOOD | {"question_id": [3]}), REFERENCES, TURNS),
        (f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}", REFERENCES, "line 2: question_id 111 again"),
        (json.dumps(GOOD), None, "question 111 (math) needs a reference answer; pass --references"),
        (json.dumps(GOOD | {"question_id": 112}), REFERENCES, "question 112 (math) needs a reference answer"),
        (json.dumps(GOOD), [{"question_id": 111, "choices": []}], "two texts at choices[0].turns are wanted"),
        ("", None, "question.jsonl has no rows"),
    ],
)
def test_bad_files_are_one_line_with_file_and_line(call, tmp_path, models, text, references, said):
    (tmp_path / "question.jsonl").write_text(text)
    options = ["--questions", tmp_path / "question.jsonl", "--output_dir", tmp_path / "out"]
    if references:
        options += ["--references", write_rows(tmp_path / "reference.jsonl", references)]
    refuse(call, "mtbench", said, "--models", models["plain"], "--judge_model", "x", *options)


def test_options_that_are_missing_or_wrong_are_one_line(options, call, tmp_path):
    for words, *more in (
        ("no such folder", "--judge_model", tmp_path / "absent"),
        ("absent.jsonl: no such file", "--questions", tmp_path / "absent.jsonl"),
        ("'a' twice", "--models", "a=x", "a=y"),
        ("--limit 0: at least 1", "--limit", 0),
        ("files have it", "--models", "a/b=x"),
        ("not used here", "--run_dir", tmp_path),
    ):
        refuse(call, "mtbench", words, *options, *more)
    refuse(call, "mtbench", "--questions FILE is wanted", "--models", "a")
    refuse(call, "mtbench", "--judge_model is wanted", "--models", "a", "--questions", "q")
    refuse(call, "mtbench", "--models: at least one")


def test_prompts_and_temperatures_are_the_published_ones():
    """Digests of FastChat's judge_prompts.jsonl: system prompt, NUL, prompt, with our names of the fields."""
    published = {"single-v1": "8c7844f341b1bfe4", "single-math-v1": "2b8fcf76605333c1"}
    published |= {"single-v1-multi-turn": "a91a5b4266b4e377", "single-math-v1-multi-turn": "c7a521f26967cf14"}
    found = {name: hashlib.sha256("\0".join(pair).encode()).hexdigest() for name, pair in mtbench.JUDGE_PROMPTS.items()}
    assert {name: digest[:16] for name, digest in found.items()} == published
    wanted = {"writing": 0.7, "roleplay": 0.7, "extraction": 0, "math": 0, "coding": 0, "reasoning": 0}
    assert wanted | {"stem": 0.1, "humanities": 0.1} == mtbench.TEMPERATURES


def test_judge_request_of_a_worked_example():
    """Which of the published prompts, and what stands where; braces in an answer stay as they are."""
    math, plain = GOOD | {"references": ["2.", "It is 3."]}, QUESTIONS[0] | {"references": None}
    for question, name in ((math, "single-math-v1"), (plain, "single-v1")):
        for turn, kind in ((1, name), (2, f"{name}-multi-turn")):
            system, text = mtbench.JUDGE_PROMPTS[kind]
            pairs = {"question": question["turns"], "answer": ["{two}", "4"], "reference": question["references"] or []}
            for key, pair in pairs.items():
                for i, value in enumerate(pair, 1):
                    text = text.replace(f"{{{key}_{i}}}", value)
            assert "{two}" in text
            assert mtbench.judge_request(question, ["{two}", "4"], turn, True) == common.as_messages(text, system)
            alone = f"[Instruction]\n{system.strip()}\n\n{text}" if turn == 2 else text
            assert mtbench.judge_request(question, ["{two}", "4"], turn, False) == common.as_messages(alone)


# ---------------------------------------------------------------------------------------------------------------------
# Answers.


def test_what_the_model_and_the_judge_read(call, options, tmp_path, models, monkeypatch):
    """The second turn has the first answer in its context; the judge sees each turn once, and greedily."""
    seen = judge_by(monkeypatch, lambda prompt, temperature: "Rating: [[7]]")
    read, generate = [], common.generate

    def spy(model, tokenizer, prompts, seeds, **options):
        read.extend((tokenizer.decode(prompt), options["temperature"]) for prompt in prompts)
        assert options["max_new_tokens"] == 6
        return generate(model, tokenizer, prompts, seeds, **options)

    monkeypatch.setattr(common, "generate", spy)
    out = succeed(call, "mtbench", *options, "--batch_size", 2)
    rows, asked, judged = {row["id"]: row["turns"] for row in rows_of(tmp_path, "answers")}, [], []
    assert list(rows) == [81, 82, 111, 131]
    for question in QUESTIONS:
        first, second = question["turns"]
        answers = rows[question["question_id"]]
        turn_1 = f"<|im_start|>user\n{first}<|im_end|>\n<|im_start|>assistant\n"
        turn_2 = f"{turn_1}{answers[0]}<|im_end|>\n<|im_start|>user\n{second}<|im_end|>\n<|im_start|>assistant\n"
        temperature = {"writing": 0.7, "math": 0.0, "extraction": 0.0}[question["category"]]
        asked += [(turn_1, temperature), (turn_2, temperature)]
        whole = question | {"references": ["2.", "It is 3."] if question["category"] == "math" else None}
        judged += [(mtbench.judge_request(whole, answers, turn, True), 0.0) for turn in (1, 2)]
    assert sorted(read) == sorted(asked)
    assert sorted(map(str, judged)) == sorted(str((chat, temperature)) for chat, temperature, *_ in seen)
    assert table_of(tmp_path)["one", mtbench.OVERALL, "both"]["mean"] == "7.0"
    assert "7: 8" in out and "rated: 8" in out and "minus" not in out, "one model has no difference"
    # greedy answers by transformers' own generation
    model, tokenizer = common.load_model(models["plain"]), common.load_tokenizer(models["plain"])
    texts = ("user", "1 + 1?"), ("assistant", rows[111][0]), ("user", "And + 1?")
    chat = [{"role": role, "content": text} for role, text in texts]
    ids = torch.tensor([common.encode_chat(tokenizer, chat)])
    with torch.no_grad():
        written = model.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
    assert tokenizer.decode(written, skip_special_tokens=True).strip() == rows[111][1]


def test_answers_end_where_the_context_does(models):
    engine = common.Local(models["plain"])
    chats = [common.as_messages(text) for text in ("a", "b " * 20, "c " * 40, "d " * 18)]
    lengths = [engine.length(chat) for chat in chats]
    engine.context = lengths[1] + 3
    answers = mtbench.write_turn(engine, chats, [0] * 4, [0.0] * 4, 5)
    wanted = [max(0, min(5, engine.context - length)) for length in lengths]
    assert [answer.tokens for answer in answers] == wanted and wanted[:3] == [5, 3, 0]
    assert answers[2] == common.Completion("", 0, True)
    assert answers[1:2] == engine.complete(chats[1:2], [0], temperature=0.0, max_new_tokens=3)


# ---------------------------------------------------------------------------------------------------------------------
# Judgments and tables.


def test_unparsed_is_asked_twice_more_then_null(call, options, tmp_path, monkeypatch):
    def says(prompt, temperature):
        return "Rating: 5 of 10" if "1 + 1" in prompt else "[[4]]" if temperature else "well…"

    seen = judge_by(monkeypatch, says)
    out = succeed(call, "mtbench", *options)
    rows = rows_of(tmp_path, "judgments")
    assert [row["rating"] for row in rows] == [4, 4, 4, 4, None, None, 4, 4]
    assert [row["tries"] for row in rows] == [2, 2, 2, 2, 3, 3, 2, 2]
    assert rows[4]["judgment"] == "Rating: 5 of 10" and rows[4]["turn"] == 1
    for prompt in {chat[-1]["content"] for chat, *_ in seen}:
        tries = [(temperature, seed) for chat, temperature, seed, _ in seen if chat[-1]["content"] == prompt]
        assert [temperature for temperature, _ in tries] == [0.0, 1.0, 1.0][: 3 if "1 + 1" in prompt else 2]
        assert len(set(tries)) == len({seed for _, seed in tries}) == len(tries)
    assert "no rating in three tries (null): 2;" in out and "answers to judge; " in out
    table = table_of(tmp_path)
    overall = table["one", mtbench.OVERALL, "both"]
    assert (overall["n"], overall["unrated"], overall["mean"]) == ("3", "1", "4.0"), "null is no number"
    assert table["one", "math", "1"]["mean"] == "" and "| math" in out and "–" in out


def test_means_intervals_and_differences_by_hand():
    ratings = {"a": {1: [4, 6], 2: [2, 3], 3: [None, 9]}, "b": {1: [5, 6], 2: [3, None], 3: [8, 9]}}
    tables = {}
    for name, of in ratings.items():
        rows = [{"question_id": q, "turn": turn, "rating": own[turn - 1]} for q, own in of.items() for turn in (1, 2)]
        tables[name] = mtbench.rating_table(rows)
    lines = mtbench.summarize(tables, {1: "x", 2: "x", 3: "y"})
    one, other = ({(row["category"], row["turn"]): row for row in lines if row["model"] == name} for name in "ab")
    assert one["x", "1"]["mean"] == 3 and one["x", "2"]["mean"] == 4.5 and one["x", "both"]["mean"] == 3.75
    assert (one["x", "both"]["low"], one["x", "both"]["high"]) == (2.5, 5.0), "of two: the smaller, the larger"
    assert one["y", "1"]["n"] == 0 and math.isnan(one["y", "1"]["mean"]) and one["y", "1"]["unrated"] == 1
    assert one[mtbench.OVERALL, "2"]["mean"] == 6 and one[mtbench.OVERALL, "2"]["n"] == 3
    assert one[mtbench.OVERALL, "both"]["n"] == 2 and math.isnan(one["x", "1"]["difference"])
    assert other["x", "1"]["difference"] == 1 and other["x", "1"]["difference_n"] == 2
    assert other["x", "2"]["difference_n"] == 1, "only questions that both models have"
    assert other[mtbench.OVERALL, "both"]["difference"] == 0.5, "question 1 alone has all four ratings"


def test_several_models_side_by_side_and_refusals(call, options, two, tmp_path, monkeypatch):
    judge_by(monkeypatch, lambda prompt, temperature: f"[[{3 + len(prompt) % 5}]]")
    out = succeed(call, "mtbench", *options, *two)
    text = (tmp_path / "out" / "mtbench.md").read_text(encoding="utf-8")
    assert text.strip() in out and "both, minus one" in text
    assert f"wrote {tmp_path / 'out' / 'mtbench.md'} and .csv" in out
    assert re.search(r"\| Category +\| +one \| +two \|\n", text)
    means, table = [], table_of(tmp_path)
    for model in ("one", "two"):  # all questions have both turns, so the mean over questions is that over turns
        means.append(sum(row["rating"] for row in rows_of(tmp_path, "judgments", model)) / 8)
        assert float(table[model, mtbench.OVERALL, "both"]["mean"]) == pytest.approx(means[-1])
    assert float(table["two", mtbench.OVERALL, "both"]["difference"]) == pytest.approx(means[1] - means[0])

    complete = common.Local.complete  # a server may refuse a question

    def refusing(self, chats, seeds, **sampling):
        found = complete(self, chats, seeds, **sampling)
        return [None if "1 + 1?" in chat[0]["content"] else one for chat, one in zip(chats, found, strict=True)]

    monkeypatch.setattr(common.Local, "complete", refusing)
    code, out, err = call("mtbench", *options, *two, "--overwrite")
    assert code == 0 and "2 questions were refused" in err, err
    assert [row["id"] for row in rows_of(tmp_path, "answers")] == [81, 82, 131]
    assert table_of(tmp_path)["two", mtbench.OVERALL, "both"]["n"] == "3" and "| math" in out


def test_a_judge_without_room_gives_null(call, options, tmp_path):
    out = succeed(call, "mtbench", *options, "--judge_max_new_tokens", 4000)
    assert all(row["rating"] is None and row["judgment"] is None for row in rows_of(tmp_path, "judgments"))
    assert "too long or refused (null): 8; rated: 0" in out


def test_self_judging_is_warned_of_and_a_template_without_system_works(call, options, models, tmp_path):
    code, _, err = call("mtbench", *options, "--judge_model", models["plain"])
    assert code == 0 and "judges itself" in err
    assert all(isinstance(row["judgment"], str) for row in rows_of(tmp_path, "judgments")), "of no mock"
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (tmp_path / "x.jinja").write_text(refuses + TEMPLATES["plain"])
    more = ("--judge_chat_template", tmp_path / "x.jinja", "--limit", 1, "--output_dir", tmp_path / "other")
    refuse(call, "mtbench", "the chat template refuses the conversation: no system", *options, *more)
    code, _, err = call("mtbench", *options, *more, "--no-judge_system", "--overwrite")
    assert code == 0 and "judges itself" not in err, err


# ---------------------------------------------------------------------------------------------------------------------
# Resume.


def test_resume_ends_with_the_same_bytes(call, options, two, tmp_path, monkeypatch):
    seen = judge_by(monkeypatch, lambda prompt, temperature: f"[[{3 + len(prompt) % 5}]]")
    names = ("mtbench_answers_two.jsonl", "mtbench_judgments_two.jsonl", "mtbench.md", "mtbench.csv")
    files = [tmp_path / "out" / name for name in names]
    succeed(call, "mtbench", *options, *two, "--batch_size", 2)
    whole = [file.read_bytes() for file in files]
    lines = whole[0].splitlines(keepends=True)
    files[0].write_bytes(b"".join([*lines[:2], lines[3][:30]]))  # the last line was half written
    files[1].write_bytes(b"".join(whole[1].splitlines(keepends=True)[2:7]))
    seen.clear()
    succeed(call, "mtbench", *options, *two, "--batch_size", 2)
    assert [file.read_bytes() for file in files] == whole and 3 <= len(seen) <= 6, "only batches with a missing one"
    monkeypatch.setattr(common.Local, "open", lambda self: pytest.fail("nothing is missing"))
    succeed(call, "mtbench", *options, *two)
    assert [file.read_bytes() for file in files] == whole


def test_another_judge_finds_the_answers_and_other_answers_are_refused(call, options, two, tmp_path, monkeypatch):
    seen = judge_by(monkeypatch, lambda prompt, temperature: "[[5]]")
    succeed(call, "mtbench", *options)
    before = (tmp_path / "out" / "mtbench_answers_one.jsonl").read_bytes()
    said = "was made with --judge_max_new_tokens 5, not 6"
    assert "--overwrite" in refuse(call, "mtbench", said, *options, "--judge_max_new_tokens", 6)
    refuse(call, "mtbench", "was made with --max_new_tokens 6, not 7", *options, "--max_new_tokens", 7)
    refuse(call, "mtbench", "--questions is another than when", *options, "--limit", 1)
    succeed(call, "mtbench", *options, "--output_dir", tmp_path / "other")
    assert (tmp_path / "other" / "mtbench_answers_one.jsonl").read_bytes() == before
    count = len(seen)
    succeed(call, "mtbench", *options, *two)
    assert len(seen) == count + 8, "a further model: only its answers are new"
    succeed(call, "mtbench", *options, "--overwrite", "--limit", 1)
    assert len(rows_of(tmp_path, "answers")) == 3
