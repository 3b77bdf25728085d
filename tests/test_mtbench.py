"""eval/mtbench.py: FastChat's files and prompts, two turns, ratings, tables, resume."""

import csv
import hashlib
import json
import math
import re
import types
from collections import Counter

import mtbench
import pytest
import torch
from conftest import ROOT, TEMPLATES, make_model, make_tokenizer, read_rows, run_script, write_rows

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
def run(call, models, tmp_path):
    """Runs the script on QUESTIONS with both models; answers have at most 6 tokens, judgments 5."""
    questions = write_rows(tmp_path / "question.jsonl", QUESTIONS)
    references = write_rows(tmp_path / "reference.jsonl", REFERENCES)

    def start(*options):
        usual = ["--models", f"one={models['plain']}", f"two={models['bos']}"]
        usual += ["--questions", questions, "--references", references, "--output_dir", tmp_path / "out"]
        usual += ["--max_new_tokens", 6, "--judge_max_new_tokens", 5, "--judge_model", models["pad_eos"]]
        return call("mtbench", *usual, *options)

    return start


@pytest.fixture
def judge_says(monkeypatch):
    """judge_says(function of a request and its temperature): what the judge answers; -> what it was asked."""
    seen, make_engine = [], common.make_engine

    def start(says):
        class Judge(common.Engine):
            def complete(self, chats, seeds, *, temperature, max_new_tokens):
                asked = []
                for chat, seed in zip(chats, seeds, strict=True):
                    system = chat[0]["content"] if chat[0]["role"] == "system" else None
                    asked.append(types.SimpleNamespace(system=system, prompt=chat[-1]["content"], seed=seed))
                seen.extend((request, temperature) for request in asked)
                return [common.Completion(says(request, temperature), 3, False) for request in asked]

        make = lambda args, prefix="": Judge("judge") if prefix else make_engine(args)  # noqa: E731
        monkeypatch.setattr(common, "make_engine", make)
        return seen

    return start


def rows_of(tmp_path, what, model="one"):
    return read_rows(tmp_path / "out" / f"mtbench_{what}_{model}.jsonl")


def table_of(tmp_path):
    with open(tmp_path / "out" / "mtbench.csv", encoding="utf-8", newline="") as file:
        return {(r["model"], r["category"], r["turn"]): r for r in csv.DictReader(file)}


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
    code, _, err = call("mtbench", "--models", models["plain"], "--judge_model", "x", *options)
    assert code == 2 and said in err and len(err.splitlines()) == 1, err


def test_options_that_are_missing_or_wrong_are_one_line(run, call, tmp_path):
    cases = [
        (run("--judge_model", tmp_path / "absent"), "no such folder"),
        (run("--questions", tmp_path / "absent.jsonl"), "absent.jsonl: no such file"),
        (run("--models", "a=x", "a=y"), "'a' twice"),
        (run("--limit", 0), "--limit 0: at least 1"),
        (run("--models", "a/b=x"), "files have it"),
        (run("--run_dir", tmp_path), "not used here"),
        (call("mtbench", "--models", "a"), "--questions FILE is wanted"),
        (call("mtbench", "--models", "a", "--questions", "q"), "--judge_model is wanted"),
        (call("mtbench"), "--models: at least one"),
    ]
    for (code, _, err), said in cases:
        assert code == 2 and said in err and len(err.splitlines()) == 1, (said, err)


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
    question = GOOD | {"references": REFERENCES[0]["choices"][0]["turns"]}
    fields = {"question_1": "1 + 1?", "question_2": "And + 1?", "reference_1": "2.", "reference_2": "It is 3."}

    def wanted(name, **fields):
        system, text = mtbench.JUDGE_PROMPTS[name]
        for key, value in fields.items():
            text = text.replace(f"{{{key}}}", value)
        return system, text

    first = wanted("single-math-v1", **fields, answer_1="{two}")
    second = wanted("single-math-v1-multi-turn", **fields, answer_1="{two}", answer_2="4")
    for turn, (system, text) in enumerate((first, second), 1):
        assert mtbench.judge_request(question, ["{two}", "4"], turn, True) == (system, text) and "{two}" in text
        text = f"[Instruction]\n{system.strip()}\n\n{text}" if turn == 2 else text
        assert mtbench.judge_request(question, ["{two}", "4"], turn, False) == (None, text)
    plain, fields = QUESTIONS[0] | {"references": None}, {"question_1": "Write {a} poem.", "question_2": "Shorter!"}
    for turn, name in ((1, "single-v1"), (2, "single-v1-multi-turn")):
        request = mtbench.judge_request(plain, ["one", "two"], turn, True)
        assert request == wanted(name, **fields, answer_1="one", answer_2="two")


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[5]]", 5),
        ("Good. [[10]]", 10),
        ("[[5.5]]", 5.5),
        ("[[7.0]]", 7),
        ("[[8.]]", 8),
        ("a list [3], yet Rating: [[6]]", 6),
        ("Rating: [4]", 4),
        ("first [[2]], then [[9]]", None),
        ("[[9]], so: [[9]]", 9),
        ("<think>[[2]]?</think> Rating: [[9]]", 9),
        ("Rating: 5", None),
        ("[[rating]]", None),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[-3]]", None),
        ("[[8/10]]", None),
        ("see [3]: [[7-8]]", None),
        ("a list [3]. Rating: 6", None),
        ("as [[rating]]: **Rating**: [9]", 9),
        ("", None),
    ],
)
def test_rating_parser(text, rating):
    """FAULTS 13: null if more than one is named."""
    found = mtbench.parse_rating(text)
    assert found == rating and type(found) is type(rating)


# ---------------------------------------------------------------------------------------------------------------------
# Answers.


def test_second_turn_has_the_first_answer_in_its_context(run, tmp_path, judge_says, models, monkeypatch):
    judge_says(lambda request, temperature: "[[7]]")
    read, generate = [], common.generate

    def spy(model, tokenizer, prompts, seeds, **options):
        read.extend((tokenizer.decode(prompt), options["temperature"]) for prompt in prompts)
        assert options["max_new_tokens"] == 6
        return generate(model, tokenizer, prompts, seeds, **options)

    monkeypatch.setattr(common, "generate", spy)
    code, _, err = run("--models", f"one={models['plain']}", "--batch_size", 2)
    assert code == 0, err
    rows, asked = {row["id"]: row for row in rows_of(tmp_path, "answers")}, set()
    assert list(rows) == [81, 82, 111, 131]
    for question in QUESTIONS:
        first, second = question["turns"]
        answer = rows[question["question_id"]]["turns"][0]
        turn_1 = f"<|im_start|>user\n{first}<|im_end|>\n<|im_start|>assistant\n"
        turn_2 = f"{turn_1}{answer}<|im_end|>\n<|im_start|>user\n{second}<|im_end|>\n<|im_start|>assistant\n"
        temperature = {"writing": 0.7, "math": 0.0, "extraction": 0.0}[question["category"]]
        asked |= {(turn_1, temperature), (turn_2, temperature)}
    assert set(read) == asked and len(read) == 8
    # greedy answers by transformers' own generation
    model, tokenizer = common.load_model(models["plain"]), common.load_tokenizer(models["plain"])
    texts = ("user", "1 + 1?"), ("assistant", rows[111]["turns"][0]), ("user", "And + 1?")
    chat = [{"role": role, "content": text} for role, text in texts]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    ids = tokenizer.apply_chat_template(chat, **options).input_ids
    with torch.no_grad():
        written = model.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
    assert tokenizer.decode(written, skip_special_tokens=True).strip() == rows[111]["turns"][1]


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


def test_judge_sees_each_turn_once_and_greedily(run, tmp_path, judge_says, models):
    seen = judge_says(lambda request, temperature: "Rating: [[7]]")
    code, out, err = run("--models", f"one={models['plain']}")
    assert code == 0, err
    assert len(seen) == 8 and {temperature for _, temperature in seen} == {0.0}
    answers, wanted = {row["id"]: row["turns"] for row in rows_of(tmp_path, "answers")}, set()
    for question in QUESTIONS:
        whole = question | {"references": ["2.", "It is 3."] if question["category"] == "math" else None}
        wanted |= {mtbench.judge_request(whole, answers[question["question_id"]], turn, True) for turn in (1, 2)}
    assert {(request.system, request.prompt) for request, _ in seen} == wanted
    assert table_of(tmp_path)["one", mtbench.OVERALL, "both"]["mean"] == "7.0"
    assert "7: 8" in out and "rated" in out and "minus" not in out, "one model has no difference"


def test_unparsed_is_asked_twice_more_then_null(run, tmp_path, judge_says, models):
    tries = {}

    def says(request, temperature):
        tries.setdefault(request.prompt, []).append((temperature, request.seed))
        if "1 + 1" in request.prompt:
            return "I would say 5 of 10"
        return "[[4]]" if temperature else "well…"

    judge_says(says)
    code, out, err = run("--models", f"one={models['plain']}")
    assert code == 0, err
    rows = rows_of(tmp_path, "judgments")
    assert [row["rating"] for row in rows] == [4, 4, 4, 4, None, None, 4, 4]
    assert [row["tries"] for row in rows] == [2, 2, 2, 2, 3, 3, 2, 2]
    assert rows[4]["judgment"] == "I would say 5 of 10" and rows[4]["turn"] == 1
    for prompt, asked in tries.items():
        count = 3 if "1 + 1" in prompt else 2
        assert [temperature for temperature, _ in asked] == [0.0, 1.0, 1.0][:count]
        assert len({seed for _, seed in asked}) == count
    assert re.search(r"no rating in three tries \(null\) +2\n", out)
    table = table_of(tmp_path)
    overall = table["one", mtbench.OVERALL, "both"]
    assert (overall["n"], overall["unrated"], overall["mean"]) == ("3", "1", "4.0"), "null is no number"
    assert table["one", "math", "1"]["mean"] == "" and "| math" in out and "–" in out


def test_means_intervals_and_differences_by_hand():
    def table(ratings):
        return mtbench.rating_table(
            [
                {"question_id": q, "turn": turn, "rating": r}
                for q, own in ratings.items()
                for turn, r in enumerate(own, 1)
            ]
        )

    def rows(name, found, first=None):
        lines = mtbench.summarize(name, table(found), first and table(first), {1: "x", 2: "x", 3: "y"})
        return {(row["category"], row["turn"]): row for row in lines}

    first = {1: [4, 6], 2: [2, 3], 3: [None, 9]}
    one, other = rows("a", first), rows("b", {1: [5, 6], 2: [3, None], 3: [8, 9]}, first)
    assert one["x", "1"]["mean"] == 3 and one["x", "2"]["mean"] == 4.5 and one["x", "both"]["mean"] == 3.75
    assert (one["x", "both"]["low"], one["x", "both"]["high"]) == (2.5, 5.0), "of two: the smaller, the larger"
    assert one["y", "1"]["n"] == 0 and math.isnan(one["y", "1"]["mean"]) and one["y", "1"]["unrated"] == 1
    assert one[mtbench.OVERALL, "2"]["mean"] == 6 and one[mtbench.OVERALL, "2"]["n"] == 3
    assert one[mtbench.OVERALL, "both"]["n"] == 2 and math.isnan(one["x", "1"]["difference"])
    assert other["x", "1"]["difference"] == 1 and other["x", "1"]["difference_n"] == 2
    assert other["x", "2"]["difference_n"] == 1, "only questions that both models have"
    assert other[mtbench.OVERALL, "both"]["difference"] == 0.5, "question 1 alone has all four ratings"


def test_several_models_side_by_side(run, tmp_path, judge_says):
    judge_says(lambda request, temperature: f"[[{3 + len(request.prompt) % 5}]]")
    code, out, err = run()
    assert code == 0, err
    text = (tmp_path / "out" / "mtbench.md").read_text(encoding="utf-8")
    assert text.strip() in out and "both, minus one" in text
    assert f"wrote {tmp_path / 'out' / 'mtbench.md'} and .csv" in out
    header = next(line for line in text.splitlines() if line.startswith("| Category"))
    assert [cell.strip() for cell in header.split("|")[1:-1]] == ["Category", "one", "two"]
    means, table = [], table_of(tmp_path)
    for model in ("one", "two"):  # all questions have both turns, so the mean over questions is that over turns
        ratings = [row["rating"] for row in rows_of(tmp_path, "judgments", model)]
        means.append(sum(ratings) / 8)
        assert float(table[model, mtbench.OVERALL, "both"]["mean"]) == pytest.approx(means[-1])
    assert float(table["two", mtbench.OVERALL, "both"]["difference"]) == pytest.approx(means[1] - means[0])


def test_what_a_server_refuses_is_counted(run, tmp_path, judge_says, models, monkeypatch):
    """Answers and judgments of engines that may refuse: None."""
    judge_says(lambda request, temperature: "[[8]]")
    complete = common.Local.complete

    def refusing(self, chats, seeds, **sampling):
        found = complete(self, chats, seeds, **sampling)
        return [None if "1 + 1?" in chat[0]["content"] else one for chat, one in zip(chats, found, strict=True)]

    monkeypatch.setattr(common.Local, "complete", refusing)
    code, out, err = run()
    assert code == 0 and "2 questions were refused" in err, err
    assert [row["id"] for row in rows_of(tmp_path, "answers")] == [81, 82, 131]
    assert table_of(tmp_path)["two", mtbench.OVERALL, "both"]["n"] == "3" and "| math" in out


def test_a_judge_without_room_gives_null(run, tmp_path, models):
    code, out, err = run("--judge_max_new_tokens", 4000, "--models", f"one={models['plain']}")
    assert code == 0, err
    assert all(row["rating"] is None and row["judgment"] is None for row in rows_of(tmp_path, "judgments"))
    assert re.search(r"too long or refused \(null\) +8\n", out) and re.search(r"rated +0\n", out)


def test_self_judging_is_warned_of_and_a_template_without_system_works(run, models, tmp_path):
    code, _, err = run("--judge_model", models["plain"])
    assert code == 0 and "judges itself" in err
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (tmp_path / "x.jinja").write_text(refuses + TEMPLATES["plain"])
    options = ("--judge_chat_template", tmp_path / "x.jinja", "--limit", 1, "--output_dir", tmp_path / "other")
    code, _, err = run(*options)
    assert code == 2 and "the chat template refuses the conversation: no system" in err
    code, _, err = run(*options, "--no-judge_system", "--overwrite")
    assert code == 0 and "judges itself" not in err, err


# ---------------------------------------------------------------------------------------------------------------------
# Resume.


def test_resume_ends_with_the_same_bytes(run, tmp_path, judge_says, monkeypatch):
    seen = judge_says(lambda request, temperature: f"[[{3 + len(request.prompt) % 5}]]")
    names = ("mtbench_answers_two.jsonl", "mtbench_judgments_two.jsonl", "mtbench.md", "mtbench.csv")
    files = [tmp_path / "out" / name for name in names]
    assert run("--batch_size", 2)[0] == 0
    whole = [file.read_bytes() for file in files]
    lines = whole[0].splitlines(keepends=True)
    files[0].write_bytes(b"".join([*lines[:2], lines[3][:30]]))  # the last line was half written
    files[1].write_bytes(b"".join(whole[1].splitlines(keepends=True)[2:7]))
    seen.clear()
    assert run("--batch_size", 2)[0] == 0
    assert [file.read_bytes() for file in files] == whole and 3 <= len(seen) <= 6, "only batches with a missing one"
    monkeypatch.setattr(common.Local, "open", lambda self: pytest.fail("nothing is missing"))
    assert run()[0] == 0
    assert [file.read_bytes() for file in files] == whole


def test_another_judge_finds_the_answers_and_other_answers_are_refused(run, tmp_path, judge_says, models):
    seen, one = judge_says(lambda request, temperature: "[[5]]"), ("--models", f"one={models['plain']}")
    assert run(*one)[0] == 0
    before = (tmp_path / "out" / "mtbench_answers_one.jsonl").read_bytes()
    code, _, err = run(*one, "--judge_max_new_tokens", 6)
    assert code == 2 and "was made with --judge_max_new_tokens 5, not 6" in err and "--overwrite" in err
    code, _, err = run(*one, "--output_dir", tmp_path / "other")
    assert code == 0 and (tmp_path / "other" / "mtbench_answers_one.jsonl").read_bytes() == before
    code, _, err = run(*one, "--max_new_tokens", 7)
    assert code == 2 and "was made with --max_new_tokens 6, not 7" in err
    code, _, err = run(*one, "--limit", 1)
    assert code == 2 and "--questions is another than when" in err
    count = len(seen)
    code, _, err = run("--models", f"one={models['plain']}", f"two={models['bos']}")
    assert code == 0 and len(seen) == count + 8, "a further model: only its answers are new"
    assert run(*one, "--overwrite", "--limit", 1)[0] == 0 and len(rows_of(tmp_path, "answers")) == 3


def test_as_a_user_runs_it(tmp_path, models):
    """No mock: a tiny judge finds hardly any rating, and the tables say so."""
    questions = write_rows(tmp_path / "question.jsonl", QUESTIONS)
    references = write_rows(tmp_path / "reference.jsonl", REFERENCES)
    done = run_script(
        *("eval/mtbench.py", "--models", f"one={models['plain']}", f"two={models['bos']}", "--limit", 1),
        *("--questions", questions, "--references", references, "--output_dir", tmp_path / "out"),
        *("--judge_model", models["pad_eos"], "--max_new_tokens", 6, "--judge_max_new_tokens", 5),
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path, "judgments") + rows_of(tmp_path, "judgments", "two")
    assert len(rows) == 12 and all(isinstance(row["judgment"], str) for row in rows)
    unread = sum(row["rating"] is None for row in rows)
    assert re.search(rf"no rating in three tries \(null\) +{unread}\n", done.stdout)
    assert "| one" in done.stdout and "both, minus one" in done.stdout and "Traceback" not in done.stderr
