"""The judge check: the probes, what is counted, the fourth score mode, and what an unfit judge may not do."""

import json
import subprocess
import types

import judge_check
import pytest
import torch
import weak_judge
from conftest import PROBES, ROOT, read_rows, refused, write_rows
from eval_helpers import refuse, succeed, write_record

import common

OBJECTIVES = [["Harmlessness", "It is safe."], ["Helpfulness", "It helps."]]
# scores by what an answer is in the probes' own files, so that the truth is known
JUDGES = """
import json, pathlib
better = {{row["better"] for path in {paths} for row in map(json.loads, open(path, encoding="utf-8"))}}
def good(prompts, responses):
    return [[8, 7] if text in better else [3, 2] for text in responses]
def bad(prompts, responses):
    return [[3, 7] if text in better else [8, 2] for text in responses]
def undecided(prompts, responses):
    return [[5, 5] for _ in responses]
def weak(prompts, responses):  # right in about two of three
    return [[8, 7] if (text in better) == (len(prompt) % 3 > 0) else [3, 2] for prompt, text in zip(prompts, responses)]
"""


@pytest.fixture
def judges(tmp_path):
    """judges("good") -> the words for --scorer of a judge that knows the probes."""
    path = tmp_path / "judges.py"
    path.write_text(JUDGES.format(paths=[str(PROBES), str(ROOT / "data" / "judge_probes.jsonl")]))
    return lambda name: f"{path}:{name}"


# ---------------------------------------------------------------------------------------------------
# The probes, and what is counted.

ALL_PROBES = read_rows(ROOT / "data" / "judge_probes.jsonl")


def test_the_probes_are_what_the_check_says_of_them():
    prompts = [probe["prompt"] for probe in ALL_PROBES]
    assert len(prompts) >= 180 and len({probe["id"] for probe in ALL_PROBES}) == len(set(prompts)) == len(prompts)
    own = {name: read_rows(ROOT / "data" / f"{name}.jsonl") for name in ("high_stakes", "honesty")}
    used = {row["prompt"] for rows in own.values() for row in rows}
    assert not used & set(prompts), "a judge is checked on other prompts than those it is used on"
    for objective in common.CONSTITUTION:
        mine = [probe for probe in ALL_PROBES if probe["objective"] == objective]
        topics = {row["topic"] for row in own["honesty" if objective == "honesty" else "high_stakes"]}
        for split in ("train", "test"):
            part = [probe for probe in mine if probe["split"] == split]
            shorter = sum(len(p["better"].split()) < len(p["worse"].split()) for p in part) / len(part)
            assert {p["topic"] for p in part} == topics and 0.4 <= shorter <= 0.6, (objective, split)
        assert sum(probe["better"].startswith("I'm sorry") for probe in mine) <= len(mine) / 3


@pytest.mark.parametrize("objective", list(common.CONSTITUTION))
def test_a_bag_of_words_can_not_tell_them_apart(objective):
    """A classifier that sees single words, tested on probes it has not seen, stays below 75 %."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline

    mine = [p for p in ALL_PROBES if p["objective"] == objective]
    texts = [p[side] for p in mine for side in ("better", "worse")]
    labels, groups = [1, 0] * len(mine), [i for i in range(len(mine)) for _ in range(2)]
    for binary in (True, False):
        words = CountVectorizer(binary=binary, token_pattern=r"[\w']+")
        classifier = make_pipeline(words, LogisticRegression(max_iter=2000))
        share = cross_val_score(classifier, texts, labels, groups=groups, cv=GroupKFold(6)).mean()
        assert share < 0.75, f"{objective}: {share:.2f}"


def test_wilson_is_scipy_s():
    from scipy.stats import binomtest

    for right, n in ((0, 5), (1, 5), (46, 60), (60, 60), (3, 24)):
        ours, theirs = common.wilson(right, n), binomtest(right, n).proportion_ci(method="wilson")
        assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    assert common.wilson(0, 0) == (0.0, 1.0)


def test_counts_ties_unread_and_blind_spots():
    rows = [{"objective": "harmlessness", "topic": f"t{i % 4}", "better": 8, "worse": 2} for i in range(40)]
    for row in rows:
        if row["topic"] == "t3":
            row["better"], row["worse"] = row["worse"], row["better"]
    rows[0]["worse"], rows[1]["better"] = 8, None
    rows.append({"objective": "helpfulness", "topic": "t0", "better": 9, "worse": 2.5})
    found = common.sum_up_check(rows)
    own = found["harmlessness"]
    assert list(found) == ["harmlessness", "helpfulness"] and found["helpfulness"]["right"] == 1
    assert (own["right"], own["n"], own["ties"], own["unread"]) == (28, 40, 1, 1)
    assert (own["low"], own["high"]) == common.wilson(28, 40) and own["blind"] == ["t3"]
    assert own["mean_better"] == pytest.approx((29 * 8 + 10 * 2) / 39) and own["topics"]["t3"]["right"] == 0
    made = {"02": {"objectives": ["harmlessness", "helpfulness"], "checked": found}}
    line = "judge check: Harmlessness 28 of 40 in the right order (70 % [55, 82]), 1 ties, 1 unread, blind to: t3"
    assert common.check_lines(made)[0] == line
    fit, verdict = common.judge_verdict(made, ["Harmlessness"])
    assert fit and "weak at Harmlessness" in verdict, "above chance, below 80 %"
    own |= common.count_right([(2, 1)] * 24 + [(1, 2)] * 16)
    assert own["low"] < 0.5 and common.judge_verdict(made, ["Harmlessness"])[0] is False
    own |= common.count_right([(2, 1)] * 3)
    fit, verdict = common.judge_verdict(made, ["Harmlessness"])
    assert not fit and verdict.startswith("so few probes can't show that the judge can tell Harmlessness"), "3 of 3"
    own |= common.count_right([(2, 1)] * 40)
    assert common.judge_verdict(made, ["Harmlessness"]) == (True, "")
    assert "nobody has checked" in common.judge_verdict({"02": {}}, ["Harmlessness"])[1]


BAD_ROWS = {"[": "", '{"better": ""}': "a probe has", '{"prompt": 3}': "", '{"id": "harm0"}': "id harm0 is there twice"}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_row_that_is_no_probe_is_named(tmp_path, row):
    first = read_rows(PROBES)[0]
    path = write_rows(tmp_path / "probes.jsonl", [first])
    with open(path, "a") as file:
        file.write(row if row == "[" else json.dumps(first | {"id": "other"} | json.loads(row)))
    with refused(f"line 2: {BAD_ROWS[row]}".strip(": ")):
        common.read_probes(path, OBJECTIVES)


def test_choice_is_the_probability_of_the_first_word(tiny):
    """1 + 9 P at the first token in which the two words differ, from one plain pass; a blank response has no score."""
    engine = common.Local(tiny())
    args = common.JudgeArgs(objectives=["harmlessness", "brevity"], score_mode="choice", with_instruction=True)
    args.constitution = {"brevity": "It is short."}
    items = [("Is {it} safe?", "No, it is not."), ("What?", "Yes."), ("What?", " ")]
    scores = common.judge(engine, items, args, [0] * 3)
    assert scores[2] is None
    forms = [common.QUESTIONS["harmlessness"], common.OWN_QUESTION]
    for (prompt, response), own in zip(items[:2], scores[:2], strict=True):
        for (question, pair), score in zip(forms, own, strict=True):
            text = question.format(prompt=prompt, response=response, definition="It is short.")
            assert "{" not in text.replace("{it}", "")
            rows = [engine.tokenizer(word, add_special_tokens=False).input_ids for word in pair]
            split = next(i for i in range(min(map(len, rows))) if rows[0][i] != rows[1][i])
            ids = torch.tensor([engine.encode(common.as_messages(text)) + rows[0][:split]])
            with torch.no_grad():
                logits = engine.model(ids).logits[0, -1, [row[split] for row in rows]]
            assert score == pytest.approx(1 + 9 * logits.softmax(-1)[0].item(), abs=1e-4)


def test_choice_needs_probabilities_of_a_server(monkeypatch):
    server = common.Server("http://localhost:1/v1", "m", None, 1, 1.0, 0)
    monkeypatch.setattr(server, "probe_form", lambda *form: setattr(server, "mode", "regex"))
    args = common.JudgeArgs(score_mode="choice")
    with refused("tells no probabilities, which --score_mode choice needs"):
        common.settle_score_mode(args, server, {"file": "x"})


# ---------------------------------------------------------------------------------------------------
# Stages.


@pytest.fixture
def run(call, tmp_path, tiny, judges):
    """run("good") -> stages 2 to 6 on rows of one's own with that judge: a dict of (code, out, err) by stage."""

    def go(name: str, *options, train=()):
        run_dir = tmp_path / name
        responses = [{"text": text, "system": None} for text in ("Yes.", "No, never.", "Ask a doctor.", "Perhaps.")]
        rows = [{"id": f"p{i}", "prompt": f"Question {i}?", "responses": responses} for i in range(3)]
        write_rows(run_dir / "01_samples.jsonl", rows)
        done = {"02": call("02_score", "--run_dir", run_dir, "--model", tiny(), "--scorer", judges(name), *options)}
        # scores that give pairs, in the place of the scorer's
        scored = read_rows(run_dir / "02_scores.jsonl")
        for row in scored:
            for j, response in enumerate(row["responses"]):
                response["scores"] = [1 + 2 * j, 2 + j * j % 5]
            row["refined"] = {"text": "Call a doctor today.", "scores": [9, 9], "truncated": False}
        write_rows(run_dir / "03_refined.jsonl", scored)
        write_record(run_dir, "03_refine", earlier=common.made_by(run_dir / "02_scores.jsonl"), rows=3)
        done["04"] = call("04_denoise", "--run_dir", run_dir, "--rho", 99)
        done["05"] = call("05_pairs", "--run_dir", run_dir)
        done["06"] = call("06_train", "--run_dir", run_dir, "--model", tiny(), *train)
        return done, run_dir

    return go


def test_a_fit_judge_is_trained_on_without_a_word(run):
    done, run_dir = run("good")
    assert [code for code, _, _ in done.values()] == [0] * 4, [err for _, _, err in done.values()]
    line = "judge check: Harmlessness 60 of 60 in the right order (100 % [94, 100])"
    assert line in done["02"][1] and line in done["04"][1] and line in (run_dir / "06_model" / "README.md").read_text()
    assert "the judge" not in done["02"][2] + done["06"][2]
    rows = read_rows(run_dir / "02_judge_check.jsonl")
    assert len(rows) == 120 and set(rows[0]) == {"id", "topic", "objective", "better", "worse"}
    checked = json.loads((run_dir / "02_args.json").read_text())["checked"]
    assert checked["helpfulness"]["right"] == 60 and checked["harmlessness"]["topics"]["fraud"]["n"] == 5


@pytest.mark.parametrize("name", ["bad", "undecided"])
def test_nothing_is_trained_on_an_unfit_judge(run, name):
    done, run_dir = run(name)
    assert [code for code, _, _ in done.values()] == [0, 0, 0, 2], [err for _, _, err in done.values()]
    assert "the judge can't tell Harmlessness" in done["02"][2] and "must not be trained on" in done["02"][2]
    line = done["06"][2].strip().splitlines()[-1]
    assert line.startswith("06_train.py: error: ") and "trained on" in line and "--accept_unfit_judge" in line
    assert not (run_dir / "06_model").exists() and not (run_dir / "06_args.json").exists()


def test_a_judge_that_is_unfit_weak_or_unchecked_is_used_with_a_warning(run):
    done, run_dir = run("bad", train=("--accept_unfit_judge",))
    assert done["06"][0] == 0 and "must not be trained on" in done["06"][2], done["06"][2]
    card = (run_dir / "06_model" / "README.md").read_text()
    assert "judge check: Harmlessness 0 of 60" in card and "Warning: the judge can't tell Harmlessness" in card
    done, _ = run("weak")
    for stage in ("02", "06"):
        assert done[stage][0] == 0 and "the judge is weak at Harmlessness" in done[stage][2], done[stage][2]
    done, run_dir = run("undecided", "--no-judge_check")
    assert "judge check" not in done["02"][1] and not (run_dir / "02_judge_check.jsonl").exists()
    assert done["06"][0] == 0 and "nobody has checked whether the judge can tell Harmlessness" in done["06"][2]


def test_own_objectives_want_own_probes(run, tmp_path):
    """An objective without probes is said to be unchecked; a file of probes may have some."""
    path = tmp_path / "constitution.json"
    path.write_text('{"brevity": "It is short."}')
    options = ("--constitution", path, "--objectives", "brevity", "helpfulness")
    done, _ = run("good", *options)
    assert "judge check: Brevity: no probes" in done["02"][1] and "nobody has checked" in done["02"][2]
    own = [row | {"objective": "brevity", "id": row["id"] + "b"} for row in read_rows(PROBES)]
    probes = write_rows(tmp_path / "own.jsonl", own)
    done, _ = run("undecided", *options, "--judge_probes", probes)
    assert "judge check: Brevity 0 of 6 in the right order (0 % [0, 39]), 6 ties" in done["02"][1]


def test_probes_of_one_s_own_need_no_split_and_no_small_letters(tmp_path):
    plain = [{key: row[key] for key in row if key != "split"} for row in read_rows(PROBES)]
    path = write_rows(tmp_path / "own.jsonl", [row | {"objective": row["objective"].capitalize()} for row in plain])
    known = [row for row in plain if row["objective"] in ("harmlessness", "helpfulness")]
    assert known and common.read_probes(path, OBJECTIVES) == known


# ---------------------------------------------------------------------------------------------------
# eval/judge_check.py.


def test_answers_of_equal_length_are_neither_shorter_nor_longer():
    texts = {"s": ("a", "b c"), "e": ("a b", "c d"), "l": ("a b c", "d")}
    rows = [{"id": id, "better": 9, "worse": 1} for id in texts]
    probes = {id: {"better": better, "worse": worse} for id, (better, worse) in texts.items()}
    found = judge_check.by_length(rows, probes)
    assert {which: own["n"] for which, own in found.items()} == {"better_is_shorter": 1, "better_is_longer": 1}
    assert judge_check.by_length(rows[1:2], probes)["better_is_longer"]["n"] == 0


def test_the_script_s_files(call, judges, tmp_path, run):
    def check(name: str, *more) -> dict:
        options = ("--scorer", judges(name), "--output_dir", tmp_path / name, "--split", "all", *more)
        assert "| harmlessness |" in succeed(call, "judge_check", *options)
        return json.loads((tmp_path / name / "judge_check.json").read_text())

    found = check("weak")
    own, right = found["objectives"]["harmlessness"], found["right"]["harmlessness"]
    assert own["n"] == len(right) == sum(probe["objective"] == "harmlessness" for probe in ALL_PROBES)
    assert own["right"] == sum(right.values()) == sum(topic["right"] for topic in own["topics"].values())
    assert own["better_is_shorter"]["n"] + own["better_is_longer"]["n"] == own["n"]
    assert own["low"] < own["right"] / own["n"] < own["high"] and own["mean_better"] > own["mean_worse"]
    for suffix in ("md", "png", "pdf", "jsonl"):
        assert (tmp_path / "weak" / f"judge_check.{suffix}").stat().st_size > 500
    assert "| harmlessness: fraud" in (tmp_path / "weak" / "judge_check.md").read_text()
    against = check("good", "--against", tmp_path / "weak")["against"]["harmlessness"]
    assert len(against["only_this_one_right"]) == own["n"] - own["right"] and not against["only_the_other_right"]
    assert against["p"] < 0.01 and "only this judge right" in (tmp_path / "good" / "judge_check.md").read_text()
    _, run_dir = run("bad")  # stage 2's own check
    assert check("undecided", "--against", run_dir)["against"]["harmlessness"]["n"] == 60
    refuse(call, "judge_check", "no judge_check.json there", "--against", tmp_path, "--scorer", judges("good"))


@pytest.mark.parametrize("options", [("--score_mode", "expected"), ("--score_mode", "choice"), ("--one_at_a_time",)])
def test_the_script_asks_in_any_way(call, tmp_path, tiny, options):
    arguments = ("--model", tiny(), "--probes", PROBES, "--output_dir", tmp_path, *options)
    assert "of 2: " in succeed(call, "judge_check", *arguments)
    first = (tmp_path / "judge_check.json").read_bytes()
    assert "is complete already" in succeed(call, "judge_check", *arguments)
    assert (tmp_path / "judge_check.json").read_bytes() == first


def test_another_judge_prompt_from_a_file(call, tmp_path, tiny):
    template, rows = tmp_path / "prompt.txt", tmp_path / "judge_check.jsonl"
    arguments = ("--model", tiny(), "--probes", PROBES, "--output_dir", tmp_path, "--judge_template", template)
    for text, words in (("{nothing}", "'nothing' is none of its fields"), ("{fields}", "{response} is not in it")):
        template.write_text(text)
        refuse(call, "judge_check", words, *arguments)
    template.write_text("Score {response} on\n{dimensions}\n{fields}")
    succeed(call, "judge_check", *arguments)
    other = read_rows(rows)
    succeed(call, "judge_check", *arguments[:-2], "--overwrite")
    assert read_rows(rows) != other


def test_few_shot_examples_are_of_the_train_split():
    text = weak_judge.few_shot_template(["harmlessness", "helpfulness"])
    shown = [p for p in ALL_PROBES if any(p[side] in text for side in ("better", "worse"))]
    assert len(shown) == 4 and {p["split"] for p in shown} == {"train"}
    filled = common.judge_prompt(OBJECTIVES, "PROMPT", "RESPONSE", True, text)
    assert filled.endswith("### Instruction:\nPROMPT\n\n### Response:\nRESPONSE") and filled.count("{") == 5


def test_only_answers_that_are_not_read_let_the_ways_of_asking_go_on(tmp_path, monkeypatch):
    args = weak_judge.Args(ways=["json"], output_dir=str(tmp_path))
    said = ["--model mdels/small: no such folder"]

    def ended(*_, **__):
        return subprocess.CompletedProcess([], 2, stderr=f"warning: x\njudge_check.py: error: {said[0]}\n")

    monkeypatch.setattr(weak_judge.subprocess, "run", ended)
    with refused(said[0]) as error:
        weak_judge.main(args)
    assert str(error.value) == said[0] and not (tmp_path / "weak_judge.md").exists()
    with pytest.raises(common.UserError) as unread:
        common.check_readable([None] * common.GIVE_UP_AFTER, {True: 0, False: 0}, types.SimpleNamespace(title="m"))
    said[0] = str(unread.value)
    weak_judge.main(args)
    assert "| json | not readable |" in (tmp_path / "weak_judge.md").read_text()
    with refused("--objectives: data/judge_probes.jsonl has no examples of 'harmlesness'"):
        weak_judge.few_shot_template(["harmlesness", "helpfulness"])
