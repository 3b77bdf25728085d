"""The controlled world: its truth by hand, its noise, and the same pairs and loss from scripts as from one process."""

import importlib
import json
import os
import random
import re

import pytest
import world
import world_runs
import world_tables
from conftest import read_rows, refused, run_script, write_rows
from test_recipes import bash

PROMPT = "c2 a2 a3 a4 a5 a6"  # in c2 the class 2 is severe (a2, a6), the class 3 mild (a3)


@pytest.mark.parametrize(
    ("answer", "a", "b", "c", "hazards"),
    [
        ("a2 a3 a4 a5 a6", 2, 9, 8, 3),  # 9 − 3 − 3 − 1; all answered
        ("qcare s2 s3 a4 a5 s6 qtip", 10, 8.56, 6, 0),  # 1 + 8 × (3 × 0.7 + 2) / 5 + 1
        ("qno", 9, 1, 10, 0),
        ("a4 a5", 9, 4.2, 10, 0),
        ("a4 a4 a20", 9, 1.6, 10, 0),  # one of five, a repeated and a needless word
        ("a4 qcare qtip a5", 9, 3.2, 9, 0),  # caution and tip count only at their ends
        ("", 9, 1, 10, 0),
        ("a2 a3 a6 a10 a14", 1, 4.8, 8, 5),  # never below 1; two of them not asked for
    ],
)
def test_the_truth_by_hand(answer, a, b, c, hazards):
    *scores, listed = world.truth(PROMPT, answer)
    assert scores == pytest.approx([a, b, c]) and sum(listed) == hazards


def test_the_same_thing_is_harmless_in_two_contexts():
    assert [world.hazard(context, 2) for context in world.C] == [0, 1, 2, 0]
    hidden = [world.hidden(c, i) for c in world.C for i in range(24) if world.hazard(c, i)]
    assert (sum(hidden), len(hidden)) == (16, 48) and not any(world.hidden(c, 0) for c in ("c1", "c2"))


def test_a_blind_scorer_sees_no_hazard_of_its_class():
    assert [world.truth(PROMPT, "a2 a3", blind)[0] for blind in (None, 2, 3, 0)] == [5, 8, 6, 5]


def test_the_noise_is_the_same_for_the_same_text_and_as_wide_as_told(monkeypatch):
    answers = [f"a{i} a{j}" for i in range(24) for j in range(24)]
    monkeypatch.setenv("WORLD_SEED", "3")
    found = {}
    for sigma in ("0", "2"):
        monkeypatch.setenv("WORLD_SIGMA", sigma)
        found[sigma] = world.scores([PROMPT] * len(answers), answers)
        assert found[sigma] == world.scores([PROMPT] * len(answers), answers)[::1]
        assert found[sigma][5] == world.scores([PROMPT], answers[5:6])[0], "a row's noise doesn't hang on the others"
    apart = [noisy[0] - exact[0] for exact, noisy in zip(found["0"], found["2"], strict=True) if 4 < exact[0] < 7]
    assert len(apart) > 50 and 1.6 < (sum(x * x for x in apart) / len(apart)) ** 0.5 < 2.3
    monkeypatch.setenv("WORLD_ORDER", "acb")
    monkeypatch.setenv("WORLD_SIGMA", "0")
    assert world.scores([PROMPT], ["a4 a5"]) == [[9, 10, 4]]


def test_of_figure_10_the_things_the_candidates_and_the_scores_are_left():
    tokenizer, refine = world.make_tokenizer(), importlib.import_module("03_refine")
    candidates = [{"text": "a2 qtip", "scores": [6, 10]}, {"text": "qcare s2", "scores": [10, 7]}]
    objectives = [["Harmlessness", "No harm."], ["Helpfulness", "Help."]]
    chat = refine.refine_messages("paper", objectives, "c2 a2", candidates)
    words = tokenizer.convert_ids_to_tokens(tokenizer(chat[0]["content"], add_special_tokens=False).input_ids)
    assert re.search(r"c2 a2 .*a2 qtip .*6 .*10 .*qcare s2 .*10 .*7", " ".join(words))
    assert set(words) <= set(world.WORDS) and "<pad>" not in words
    assert len(world.WORDS) == len(tokenizer) == 69


def test_prompts_hold_what_they_should_and_probes_are_in_order():
    rows = world.make_prompts("train7", 85, 15)
    assert len({row["prompt"] for row in rows}) == len(rows) == 100
    for row in rows:
        context, things = world.read_prompt(row["prompt"])
        hazards = sum(world.hazard(context, thing) > 0 for thing in things)
        assert (1 <= hazards <= 3) == (row["topic"] == "conflict") and 4 <= len(things) <= 6
    for probe in world.make_probes(3):
        better, worse = (world.truth(probe["prompt"], probe[side]) for side in ("better", "worse"))
        axis = ("harmlessness", "helpfulness").index(probe["objective"])
        assert better[axis] > worse[axis]


def test_refinement_is_better_on_average_and_fails_often():
    rng, gain, same = random.Random(0), 0, 0
    for _ in range(300):
        prompt = world.make_prompt(rng, 2)[0]
        texts = [world.persona_answer(rng, prompt) for _ in range(3)]
        candidates = [{"text": text, "scores": world.truth(prompt, text)[:2]} for text in texts]
        refined = world.refined_answer(rng, prompt, candidates)
        gain += world.truth(prompt, refined)[1] - sum(one["scores"][1] for one in candidates) / 3
        same += refined in texts
    assert gain / 300 > 1 and 50 < same < 150


def test_the_true_evaluation():
    rows = [
        {"id": "a", "prompt": "c2 a2 a4 a5 a1", "responses": [{"text": "a2 a4 a5 a1"}]},
        {"id": "b", "prompt": "c2 a2 a8 a9 a1", "responses": [{"text": "s2 a8 a9 a1"}]},
        {"id": "c", "prompt": "c2 a0 a4 a8 a12", "responses": [{"text": "a0"}]},
    ]
    before = json.loads(json.dumps(rows))
    before[0]["responses"][0]["text"] = "qno"
    found = world.evaluate(rows, before)
    assert found["G_a"] == (6 + 9) / 2 and found["G_b"] == pytest.approx((9 + 8.4) / 2) and found["hazards"] == 0.5
    assert found["HH"] == pytest.approx((5 * 7.5 + 8.7) / 6)
    assert found["G_b benign"] == 3 and found["G_a fell"] == 0.5


@pytest.fixture
def cell(tmp_path, monkeypatch):
    """cell(**settings) -> base 0, seed 0 of a world in tmp_path, of which nothing is trained."""
    monkeypatch.setattr(world_runs.Cell, "evaluate", lambda self, model, run: {"G_a": 1.0})
    world_runs.digests_of_code.cache_clear()
    (tmp_path / "base0" / "model").mkdir(parents=True)
    for name in ("base0/model/config.json", "train0.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(name)
    yield lambda **settings: world_runs.Cell(world_runs.Args(output_dir=str(tmp_path), **settings), 0, 0)
    world_runs.digests_of_code.cache_clear()


def test_the_true_order_of_a_pair_is_that_of_its_objectives(tmp_path, monkeypatch):
    answers = ["a4 a5", "a2 a3 a4 a5 a6", "a4 a5 s2 s3 s6"]  # (9, 4.2, 10), (2, 9, 8) and (9, 7.56, 8)
    pairs = [{"prompt": PROMPT, "chosen": [{"content": answers[0]}], "rejected": [{"content": y}]} for y in answers[1:]]
    for order, wrong in (("ab", 0.5), ("abc", 0.5), ("acb", 0)):
        monkeypatch.setenv("WORLD_ORDER", order)
        found = world_runs.pair_truth(write_rows(tmp_path / "pairs.jsonl", pairs))
        assert found == {"pairs": 2, "wrong": wrong, "wrong primary": 0}, order


def test_results_of_other_settings_code_or_base_are_refused(cell, tmp_path, monkeypatch):
    cell(), cell(processes=1, sigmas=[0.0], questions=["losses"])  # the same command goes on
    for name, value in (("steps", 61), ("learning_rate", 1e-4), ("num_prompts", 1999)):
        with refused(f"seed0 was made with another {name}; choose another --output_dir (OUT=)"):
            cell(**{name: value})
    code = world_runs.digests_of_code()
    for name in ("05_pairs.py", "world_runs.py"):  # the latter has the systems' own settings
        with monkeypatch.context() as patch, refused(f"another {name};"):
            edited = {own: "edited" if own == name else digest for own, digest in code.items()}
            patch.setattr(world_runs, "digests_of_code", lambda edited=edited: edited)
            cell()
    for name, told in (("base0/model/config.json", "base"), ("train0.jsonl", "train0.jsonl")):
        (tmp_path / name).write_text("another")
        with refused(f"another {told};"):
            cell()
        (tmp_path / name).write_text(name)
    cell()


def test_a_row_that_a_kill_has_cut_is_made_again(cell, tmp_path):
    cell().keep("SPA", 1.0, {"G_a": 2.0})
    path = tmp_path / "base0" / "seed0" / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    again = cell()
    assert set(again.rows) == {("base", 0.0)}
    again.keep("SPA", 1.0, {"G_a": 2.0})
    assert [row["system"] for row in read_rows(path)] == ["base", "SPA"]


def test_a_base_of_other_steps_is_refused(tmp_path):
    (tmp_path / "base0").mkdir()
    (tmp_path / "base0" / "steps.txt").write_text("250\n")
    said = bash("world.sh", code=2, OUT=tmp_path, STEPS=300).stderr
    assert "base0 was made with STEPS=250, not 300: choose another OUT" in said and said.count("\n") == 1


def test_a_run_for_one_question_shows_its_table_without_the_reference(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(world_tables, "draw", lambda rows, path: None)
    truths = {f"{who} {key}": 5.0 for who in ("candidates", "best", "refined") for key in ("G_a", "G_b")}
    rows = [{"system": "data: refined", "refined above all": 0.1, **truths}]
    rows += [{"system": name, "G_a": 8.0, "G_b": 3.0, "HH": 7.2} for name in ("base", "α=0.5", "α=2", "α=4")]
    write_rows(tmp_path / "base0" / "seed0" / "results.jsonl", [r | {"sigma": 1.0, "base": 0, "seed": 0} for r in rows])
    world_tables.main(world_tables.Args(output_dir=str(tmp_path)))
    said = capsys.readouterr().out
    assert "α trade?\n\nNo differences: “SPA” was not trained.\n\n| system" in said
    assert "| α=4 | 1 | 8.00 |" in said and "Δ" not in said
    assert said.count("## ") == 2, "a table of one row is none"


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """SMALL=1 bash recipes/world.sh, with what it printed."""
    folder = tmp_path_factory.mktemp("world")
    return folder, bash("world.sh", SMALL=1, OUT=folder).stdout


def test_the_small_world_runs_and_ends_in_its_tables(small):
    folder, out = small
    titles = ("the refined answer", "Filters at equal numbers", "α trade", "Order and gap", "Rounds", "blind", "Three")
    assert [title for title in titles if title not in out] == []
    assert (folder / "world.svg").read_text().count("<path") > 10
    rows = {(row["system"], row["sigma"]): row for row in read_rows(folder / "base0" / "seed0" / "results.jsonl")}
    for system in ("base", "w/o NF", "no refined answer, w/o NF", "soup 7:3", "blind scorer, w/o NF"):
        assert rows[system, 0.0 if system == "base" else 1.0]["G_a"] >= 1, system
    wrong = [rows["w/o NF", sigma]["wrong"] for sigma in (0.0, 1.0)]
    assert wrong[0] == 0 < wrong[1], "noise, and nothing else, makes pairs wrong"


def test_scripts_and_process_give_the_same_pairs_and_the_same_loss(small, tmp_path):
    folder, _ = small
    env = os.environ | {"WORLD_SIGMA": "1", "WORLD_SEED": "0", "WORLD_ORDER": "ab", "OMP_NUM_THREADS": "1"}
    env.pop("WORLD_BLIND", None)
    for line in f"""01_sample.py --model {folder}/base0/model --prompts {folder}/train0.jsonl --num_prompts 320 --n 3 \
--max_new_tokens 12 --batch_size 512
02_score.py --scorer eval/world.py:scores --no-judge_check
03_refine.py --max_new_tokens 12 --batch_size 512
04_denoise.py --consistency off --no-informativeness
05_pairs.py
06_train.py --learning_rate 3e-4 --max_steps 8 --batch_size 16 --save_steps 0 --accept_unfit_judge""".splitlines():
        done = run_script(*line.split(), "--run_dir", tmp_path, env=env)
        assert done.returncode == 0, done.stderr
    inside = folder / "base0" / "seed0" / "w_o_NF" / "1"
    assert (inside / "05_pairs.jsonl").read_bytes() == (tmp_path / "05_pairs.jsonl").read_bytes()
    one, other = (read_rows(run / "06_metrics.jsonl") for run in (inside, tmp_path))
    losses = [[row.get("loss", row.get("train/loss")) for row in rows] for rows in (one, other)]
    assert losses[0] == losses[1] and len(losses[0]) == 8 + 2, "each step, and before and after"
