"""eval/: tables, intervals, RV, frontier, pairwise, reliability, against second formulas and the paper."""

import importlib
import itertools
import json
import math
import warnings

import frontier
import judge_table
import numpy as np
import pairwise
import pytest
import reliability
import rv
import shared
from conftest import read_rows, scored_row, write_rows
from eval_helpers import csv_rows, judge_by, refuse, succeed, table_lines, write_record
from scipy import stats

import common

X = np.array([[7, 6], [8, 5], [6, 8], [9, 9], [3, 4]])
Y = np.array([[8, 6], [9, 5], [7, 9], [10, 8], [2, 5]])
HARMLESS = {"objectives": ["harmlessness", "helpfulness"]}


def scored(folder, groups, texts=None, prompt="question {}", inputs=None, **args):
    """A run directory with 02_scores.jsonl: groups are the scores of each prompt's responses; args: of stage 2."""
    rows = []
    for i, group in enumerate(groups):
        named = [(texts or {}).get((i, j), f"answer {i} {j}") for j in range(len(group))]
        rows.append(scored_row(f"p{i}", group, None, named) | {"prompt": prompt.format(i)})
    write_rows(folder / "02_scores.jsonl", rows)
    if args:
        write_record(folder, "02_score", inputs=inputs, args=args)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Numbers behind all.


# Table 3 of the paper: harmlessness, helpfulness, HH5, HH10, HH20
TABLE_3 = {
    "Self-Cri.": (9.65, 7.68, "9.32", "9.47", "9.56"),
    "RS6:4": (9.87, 6.14, "9.25", "9.53", "9.69"),
    "RS7:3": (9.80, 5.94, "9.16", "9.45", "9.62"),
    "RS8:2": (9.30, 6.85, "8.89", "9.08", "9.18"),
    "RS9:1": (9.90, 6.17, "9.28", "9.56", "9.72"),
    "SPA": (9.90, 7.14, "9.44", "9.65", "9.77"),
}


def test_table_3_to_the_digit():
    for primary, secondary, *wanted in TABLE_3.values():
        assert [shared.round_half_up(judge_table.hh_score(primary, secondary, w)) for w in (5, 10, 20)] == wanted


def test_round_half_up():
    cases = {2.345: "2.35", 9.155: "9.16", 0.125: "0.13", -0.125: "-0.13", 2.0: "2.00", 9.994999: "9.99"}
    assert {value: shared.round_half_up(value) for value in cases} == cases
    assert shared.round_half_up(math.nan) == "–" and shared.round_half_up(0.00005, 4) == "0.0001"


def test_bootstrap_is_the_percentile_one_over_prompts():
    """By its definition: rows drawn with replacement, the middle 95 % of what the statistic is then."""
    values = np.random.default_rng(1).gamma(2.0, size=60)
    means = values[np.random.default_rng(0).integers(0, 60, (10_000, 60))].mean(axis=1)
    assert shared.bootstrap_interval(values) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    two = np.random.default_rng(2).normal(size=(40, 2)) @ [[1, 0.5], [0, 1]]
    drawn = np.random.default_rng(0).integers(0, 40, (500, 40))
    found = [stats.spearmanr(*two[rows].T).statistic for rows in drawn]
    interval = shared.bootstrap_interval(two, lambda sample: shared.spearman(*sample.T), draws=500)
    assert interval == pytest.approx(tuple(np.quantile(found, [0.025, 0.975])))
    assert all(map(math.isnan, shared.bootstrap_interval([1.0])))
    assert shared.bootstrap_interval(values, seed=-1) != shared.bootstrap_interval(values), "a seed that numpy refuses"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shared.bootstrap_interval([2.0, 2.0]) == (2.0, 2.0) and math.isnan(shared.spearman([1, 1], [2, 3]))
        assert shared.quantiles([1.0, math.nan, 1.0]) == (1.0, 1.0) and math.isnan(shared.quantiles([math.nan])[0])


def test_rv_fixture_and_invariance():
    for other in (Y, 3 * Y, Y + np.array([5, -2]), Y[:, ::-1], -Y):
        assert shared.rv_coefficient(X, other) == pytest.approx(0.951874, abs=5e-7)
    assert shared.rv_coefficient(X, X) == pytest.approx(1)
    assert math.isnan(shared.rv_coefficient(X, np.ones((5, 2))))
    one = shared.rv_coefficient(X[:, :1], Y[:, :1])  # a second formula: then RV is the squared correlation
    assert one == pytest.approx(np.corrcoef(X[:, 0], Y[:, 0])[0, 1] ** 2)


def test_permutation_mean_is_the_mean_over_all_permutations():
    every = [shared.rv_coefficient(X, Y[list(order)]) for order in itertools.permutations(range(5))]
    assert rv.permutation_mean(X, Y) == pytest.approx(np.mean(every))


# ---------------------------------------------------------------------------------------------------------------------
# Judge_table.


def test_judge_table(call, tmp_path):
    base = scored(tmp_path / "base", [[[5, 4]], [[6, 4]], [[7, 5]], [[5, 6]], [None]])
    better = scored(tmp_path / "better", [[[9, 4]], [[9, 3]], [[10, 6]], [[8, 6]], [[9, 9]]])
    out = succeed(call, "judge_table", "--runs", f"Vanilla={base}", f"S_A={better}", "--output_dir", tmp_path)
    lines = table_lines(out)
    assert lines["system"][2:] == ["objective 1", "objective 2", "HH5", "HH10", "HH20", "rep-4"]
    assert lines["Vanilla"][:2] == ["4", "1"] and lines["S_A"][:2] == ["5", "0"]
    assert lines["Vanilla"][2].startswith("5.75 [") and lines["S_A"][2].startswith("**9.00 [")
    assert "**" not in lines["S_A"][3], "helpfulness: the interval of the difference holds 0"
    difference = lines["S_A − Vanilla"]
    assert difference[0] == "4", "the prompts that both have scores of"
    assert difference[1].startswith("3.25 [") and difference[2].startswith("0.00 [")
    rows = csv_rows(tmp_path / "judge_table.csv", "system", "measure")
    assert float(rows["S_A", "HH10"]["mean"]) == pytest.approx((10 * 9 + 5.6) / 11)
    own = rows["S_A", "objective 1"]
    assert float(own["difference_low"]) <= 3.25 <= float(own["difference_high"]) and own["paired_prompts"] == "4"
    assert rows["Vanilla", "HH5"]["difference"] == "", "what is not defined is an empty cell"
    tex = (tmp_path / "judge_table.tex").read_text()
    assert r"S\_A & 5 & 0 & \textbf{9.00 [" in tex and tex.count(r"\toprule") == 2 and r"S\_A $-$ Vanilla & 4" in tex
    assert "S_A against Vanilla: objective 1 better, objective 2 not to be told apart.\n" in out
    text = (tmp_path / "judge_table.md").read_text()
    assert text.strip() in out and "10 cells are compared in 5 columns, 4 of them bold; about 0.25 would" in text


def test_repeated_words_stand_beside_the_scores(call, tmp_path):
    """seq-rep-4 by hand: "a b c d" three times has nine 4-grams, four of them different."""
    assert judge_table.repeated_ngrams("a b c d a b c e") == 0 and judge_table.repeated_ngrams("a b c") == 0
    assert judge_table.repeated_ngrams("a b c d " * 3) == pytest.approx(5 / 9)
    base, loop = (scored(tmp_path / name, [[[5, 4]]] * 2) for name in ("base", "loop"))
    text = "on and on and on and on"
    rows = read_rows(loop / "02_scores.jsonl")
    write_rows(loop / "02_scores.jsonl", [row | {"responses": [{**row["responses"][0], "text": text}]} for row in rows])
    out = succeed(call, "judge_table", "--runs", f"A={base}", f"B={loop}", "--output_dir", tmp_path)
    lines = table_lines(out)
    assert lines["A"][-1].startswith("0.00 [") and lines["B"][-1].startswith("0.50 ["), "never bold"
    assert lines["B − A"][-1].startswith("0.50 [") and "10 cells are compared in 5 columns, 0 of them bold" in out


def test_seeds_of_a_system_are_one_row(call, tmp_path):
    """A prompt counts with its mean over the seeds that have scored it; the means of the seeds stand beside."""
    base = scored(tmp_path / "base", [[[5, 4]], [[7, 4]]])
    seeds = [scored(tmp_path / "s0", [[[9, 4]], [[7, 2]]]), scored(tmp_path / "s1", [[[5, 2]], [None]])]
    specs = [f"Set:Vanilla={base}", *(f"Set:SPA={seed}" for seed in seeds)]
    out = succeed(call, "judge_table", "--runs", *specs, "--output_dir", tmp_path / "eval")
    lines = table_lines(out)
    assert lines["SPA"][:2] == ["2", "1"] and lines["SPA"][2].startswith("7.00 [")
    assert lines["SPA − Vanilla"][1].startswith("1.00 ["), "(7 − 5 + 7 − 7) / 2"
    assert "seeds of Set SPA (the intervals are over prompts alone): objective 1 8 5, objective 2 3 2" in out
    rows = {(r["system"], r["measure"]): r["seeds"] for r in csv_rows(tmp_path / "eval" / "judge_table.csv")}
    assert (rows["SPA", "objective 1"], rows["Vanilla", "objective 1"]) == ("8 5", "6")
    twice = ("--runs", f"Vanilla={base}", f"SPA={seeds[0]}", f"SPA={seeds[0]}")
    refuse(call, "judge_table", "'SPA' twice on one test set, from one folder", *twice)
    for seed, judge in zip(seeds, "jk", strict=True):
        write_record(seed, "02_score", args={"model": "m", "judge_model": judge})
    refuse(call, "judge_table", "several judges (Set:SPA: j, Set:SPA: k)", "--runs", *specs)


def test_how_many_cells_are_bold_by_chance():
    """By simulation: means of m equal systems, one more than 1.96 √2 above all others; exact for two."""
    assert judge_table.bold_by_chance(2) == pytest.approx(0.05) and judge_table.bold_by_chance(1) == 0
    best, second = np.sort(np.random.default_rng(0).normal(size=(400_000, 4)), axis=1)[:, -2:].T[::-1]
    assert judge_table.bold_by_chance(4) == pytest.approx(np.mean(best - second > 1.96 * 2**0.5), rel=0.05)


def test_table_1_of_several_test_sets_in_one_command(call, tmp_path):
    """Sets with objectives of their own, and refined answers; systems that a set lacks are a dash."""
    rows = [scored_row(f"p{i}", [[3, 3], [5, 3]], [9, 8]) for i in range(3)]
    write_rows(tmp_path / "a" / "03_refined.jsonl", rows)
    write_record(tmp_path / "a", "03_refine", args=HARMLESS)
    a = scored(tmp_path / "a", [[[3, 3], [5, 3]]] * 3, prompt="question p{}", **HARMLESS)
    h = scored(tmp_path / "h", [[[3, 3], [8, 3]]] * 3, objectives=["honesty", "helpfulness"])
    specs, out = (f"Safe:A={a}", f"Safe:R={a}+refined", f"Hone:A={h}"), tmp_path / "eval"
    text = succeed(call, "judge_table", "--runs", *specs, "--output_dir", out)
    whole, safe, hone = text.replace("### Hone", "### Safe").split("### Safe")
    lines = table_lines(whole)
    head = ["Safe: Harmlessness", "Safe: Helpfulness", "Hone: Honesty", "Hone: Helpfulness"]
    assert lines["system"] == head and lines["A"] == ["4.00", "3.00", "5.50", "3.00"]
    assert lines["R"] == ["**9.00**", "**8.00**", "–", "–"]
    assert "4.00 [" in safe and "**9.00 [9.00, 9.00]**" in safe and "5.50 [" in hone and "9.00" not in hone
    assert "10 cells are compared in 5 columns" in hone, "a column of one system compares nothing"
    tex = (out / "judge_table.tex").read_text()
    assert r"& \multicolumn{2}{c}{Safe} & \multicolumn{2}{c}{Hone} \\" in tex
    assert r"R & \textbf{9.00} & \textbf{8.00} & -- & -- \\" in tex
    specs = (f"Safe:A={a}", f"Safe:a={a}+refined", f"Hone:A={h}")  # names that differ in the case alone
    text = succeed(call, "judge_table", "--runs", *specs, "--output_dir", out)
    assert table_lines(text.split("###")[0])["a"] == ["**9.00**", "**8.00**", "–", "–"]
    assert r"a & \textbf{9.00} & \textbf{8.00} & -- & -- \\" in (out / "judge_table.tex").read_text()


def test_scores_of_answers_that_are_no_longer_there(call, tmp_path):
    """A stage before was redone: the old scores would stand under the new answers' name."""
    folder = scored(tmp_path / "a", [[[3, 3]]] * 2)
    rows = read_rows(folder / "02_scores.jsonl")
    write_rows(folder / "01_samples.jsonl", rows)
    write_rows(folder / "03_refined.jsonl", [row | {"refined": row["responses"][0]} for row in rows])
    for stage, before in (("02_score", "01_samples.jsonl"), ("03_refine", "02_scores.jsonl")):
        write_record(folder, stage, args=HARMLESS, inputs={"source": common.digest(folder / before)})
    for spec, before, stage in ((folder, "01_samples", "02_score"), (f"{folder}+refined", "02_scores", "03_refine")):
        succeed(call, "judge_table", "--runs", f"A={spec}", "--output_dir", tmp_path / "eval")
        write_rows(folder / f"{before}.jsonl", rows[::-1])
        words = f"made from another {before}.jsonl than is there now: run {stage}.py --overwrite"
        refuse(call, "judge_table", words, "--runs", f"A={spec}")
        write_rows(folder / f"{before}.jsonl", rows)


@pytest.mark.parametrize(
    "specs, words",
    [
        ([], "at least 1 wanted"),
        (["A={a}", "A={a}"], "'A' twice on one test set"),
        (["A={a}/nowhere"], "no run directory"),
        (["A={a}", "B={b}"], "has two different prompts"),
        (["A={a}", "C={c}"], "was scored on"),
        (["A={a}", "D={d}"], "several definitions of Helpfulness (A: x, D: y): score them alike"),
        (["A={a}+best"], "only +refined may stand behind DIR"),
        (["A={empty}"], "run 02_score.py first"),
    ],
)
def test_bad_runs_are_one_line(call, tmp_path, specs, words):
    x, y = ({"constitution": str([["Helpfulness", text]])} for text in "xy")
    scored(tmp_path / "a", [[[1, 2]]] * 2, inputs=x, **HARMLESS)
    scored(tmp_path / "b", [[[1, 2]]] * 2, prompt="other {}", **HARMLESS)
    scored(tmp_path / "c", [[[1, 2]]], objectives=["honesty", "helpfulness"])
    scored(tmp_path / "d", [[[1, 2]]] * 2, inputs=y, **HARMLESS)
    (tmp_path / "empty").mkdir()
    folders = {name: tmp_path / name for name in ("a", "b", "c", "d", "empty")}
    options = ["--runs", *(spec.format(**folders) for spec in specs)] if specs else []
    for script in ("judge_table", "pairwise") if "D={d}" in specs else ("judge_table",):
        refuse(call, script, words, *options, "--output_dir", tmp_path / "eval")


def test_three_objectives_and_paths_with_signs_in_them(call, tmp_path):
    """FAULTS section 4: = and + in the paths of runs."""
    three = ["honesty", "harmlessness", "helpfulness"]
    base = scored(tmp_path / "lr=1e-5", [[[5, 4, 3]], [[6, 4, 3]]], objectives=three)
    spa = scored(tmp_path / "a+b", [[[9, 5, 3]], [[9, 6, 2]]], objectives=three)
    write_rows(spa / "03_refined.jsonl", [scored_row(f"p{i}", [[9, 5, 3]], [10, 9, 8]) for i in (0, 1)])
    options = ("--output_dir", tmp_path / "eval")
    out = succeed(call, "judge_table", "--runs", base, f"S=PA={spa}", f"X={base}", *options)
    assert "| lr=1e-5 " in out and "Honesty" in out and "HH" not in out and "9.00 [" in out
    assert shared.read_run(f"R={spa}+refined").rows[0]["responses"][0]["scores"] == [10, 9, 8]
    assert shared.read_run(f"{spa}+refined").name == "a+b+refined" and shared.split_spec(str(base))[0] == ""
    assert shared.split_spec("a=b=c") == ("a", "b=c") and shared.split_spec("b") == ("", "b")
    out = succeed(call, "frontier", "--runs", base, spa, *options)
    assert "Harmlessness up" in out and "Helpfulness" not in out


@pytest.mark.parametrize("script", ["judge_table", "frontier"])
@pytest.mark.parametrize(
    "one, other, words",
    [
        ({"model": "m"}, {"model": "m", "judge_model": "j"}, "several judges (a: m, b: j)"),
        ({"model": "m", "inputs": {"--model": "1"}}, {"model": "m", "inputs": {"--model": "2"}},
         "several judges (a: m 1, b: m 2)"),  # trained again under the same name
        ({"score_mode": "expected"}, {"score_mode": "json"}, "several ways of reading scores (a: expected, b: json)"),
        ({"judge_template": "Rate {response}"}, {}, "several judge prompts (a: Rate {response}, b: None)"),
        ({"with_instruction": True}, {"with_instruction": False}, "with and without the instruction (a: True, b: Fa"),
        ({"model": "m", "chat_template": "A"}, {"model": "x", "judge_model": "m"},
         "several chat templates of the judge (a: A, b: None)"),  # of its own judge it is the model's
        ({"dtype": "auto"}, {"dtype": "bfloat16"}, "several types of the judge's numbers (a: auto, b: bfloat16)"),
    ],
)  # fmt: skip
def test_what_does_not_compare_is_refused_unless_asked_for(call, tmp_path, script, one, other, words):
    """FAULTS 24: other judges, ways of reading, judge prompts; other definitions are refused, see above."""
    a, b = (scored(tmp_path / n, [[[5, 4]]] * 2, **HARMLESS, **args) for n, args in (("a", one), ("b", other)))
    options = ("--runs", a, b, "--output_dir", tmp_path / "eval")
    assert "score them alike, or pass --allow_differences" in refuse(call, script, words, *options)
    code, out, err = call(script, *options, "--allow_differences")
    assert code == 0 and f"warning: {words}" in err.replace("several judge prompts with", "with")
    assert f"not alike: {words}" in out.replace("several judge prompts with", "with")


def test_an_edit_of_the_judge_s_prompt_in_common_py_is_told(call, tmp_path):
    folders = [scored(tmp_path / name, [[[5, 4]]] * 2) for name in "abc"]
    for folder, words, scorer in zip(folders, ("old", "new", "other"), (None, None, "x.py:f"), strict=True):
        write_record(folder, "02_score", args=HARMLESS | {"scorer": scorer}, code={"common.py": words})
    a, b, c = folders
    for runs, told in (([a, b], 1), ([a, f"again={a}"], 0), ([a, c], 0)):
        code, _, err = call("judge_table", "--allow_differences", "--output_dir", tmp_path / "eval", "--runs", *runs)
        assert code == 0 and err.count("common.py was edited between the scorings") == told, err


def test_a_judge_is_what_is_in_its_folder(call, tmp_path):
    """The same model as its own judge and, under another path, as the judge of another one's answers."""
    a = scored(tmp_path / "a", [[[5, 4]]] * 2, model="m", inputs={"--model": "1"}, **HARMLESS)
    args = {"model": "trained", "judge_model": "/else/m", "inputs": {"--model": "2", "--judge_model": "1"}}
    b = scored(tmp_path / "b", [[[5, 4]]] * 2, **args, **HARMLESS)
    assert "judge: /else/m, m" in succeed(call, "judge_table", "--runs", a, b, "--output_dir", tmp_path / "eval")


# ---------------------------------------------------------------------------------------------------------------------
# Rv, frontier.


def noisy_runs(tmp_path, prompts=40):
    """A weak judge that is exact where its det is small and random where it is large."""
    rng = np.random.default_rng(0)
    weak, strong = [], []
    for i in range(prompts):
        truth = rng.integers(3, 9, 2) + rng.integers(-1, 2, (4, 2))
        weak.append((truth if i % 2 else rng.integers(1, 11, (4, 2))).tolist())
        strong.append(truth.tolist())
    return scored(tmp_path / "weak", weak), scored(tmp_path / "strong", strong)


def test_rv_curve(call, tmp_path):
    weak, strong = noisy_runs(tmp_path)
    options = ("--weak", weak, "--strong", strong, "--orders", 60, "--draws", 100, "--output_dir", tmp_path / "eval")
    out = succeed(call, "rv", *options)
    rows = csv_rows(tmp_path / "eval" / "rv.csv")
    prompts = rv.paired_scores(shared.read_run(str(weak)), shared.read_run(str(strong)))
    dets = np.array([det for det, *_ in prompts])
    assert dets.tolist() == sorted(dets)
    every = [np.concatenate([prompt[side] for prompt in prompts]) for side in (1, 2)]
    assert float(rows[-1]["rv"]) == pytest.approx(shared.rv_coefficient(*every))
    assert int(rows[-1]["k"]) == 40 and int(rows[-1]["rows"]) == 160
    assert all(float(row["low"]) <= float(row["rv"]) <= float(row["high"]) for row in rows[10:])
    half = min(rows, key=lambda row: abs(int(row["k"]) - 20))
    assert float(half["rv"]) > float(half["random_high"]), "low det agrees better than random prompts"
    rho = float(out.split("--rho ")[1].split(",")[0])
    exact = np.array([np.array_equal(x, y) for _, x, y in prompts])
    assert dets[exact].max() <= rho < dets[~exact].max()
    assert (tmp_path / "eval" / "rv.png").stat().st_size > 10_000


def test_rv_bad_input_and_scores_that_never_vary(call, tmp_path):
    weak, strong = noisy_runs(tmp_path, 4)
    out = ("--output_dir", tmp_path / "eval")
    refuse(call, "rv", "4 prompts have two responses that both judges scored", "--weak", weak, "--strong", strong, *out)
    other = scored(tmp_path / "other", [[[1, 2], [2, 3]]] * 4, texts={(0, 0): "another answer"})
    refuse(call, "rv", "have other responses", "--weak", other, "--strong", strong, *out)
    write_record(other, "02_score", args={"objectives": ["honesty", "helpfulness"]})
    refuse(call, "rv", "--weak was scored on ['Honesty', ", "--weak", other, "--strong", strong, *out)
    flat = scored(tmp_path / "flat", [[[5, 5], [5, 5]]] * 6)  # RV is not defined anywhere
    code, text, err = call("rv", "--weak", flat, "--strong", flat, *out, "--orders", 5)
    assert code == 0 and "RV nan" in text and "no prefix agrees better" in text and "RuntimeWarning" not in err
    prefixes = {"fraction": [0.2, 0.4, 1.0], "rv": 0.9, "random_high": 0.5, "det": [0.0, 0.0, 3.0]}
    assert rv.suggest_rho(rv.pd.DataFrame(prefixes)) is None, "stage 4 refuses a ρ of 0"


def test_a_rho_that_chance_suggests_is_none():
    """Of 20 prefixes a random order has a few above its band of 95 %: one such alone says nothing."""
    rng, prompts = np.random.default_rng(0), []
    for i in range(24):
        weak = rng.integers(1, 11, (3, 2)).astype(float)
        prompts.append((i + 1.0, weak, weak + rng.normal(0, 3, (3, 2))))  # alike at any det
    rows = rv.curve(prompts, list(range(5, 25)), draws=2, orders=60, seed=0)
    assert 1 <= rows.attrs["by_chance"] < 10
    rows["rv"] = rows["random_high"] - 0.1
    rows.loc[3, "rv"] = 1.0
    assert rv.suggest_rho(rows) is None
    rows.loc[:15, "rv"] = 1.0
    assert rv.suggest_rho(rows) == prompts[19][0]


def test_movements(call, tmp_path):
    before = scored(tmp_path / "before", [[[5, 5]]] * 6)
    moved = [[6, 4], [5, 6], [4, 9], [5.05, 5], [5, 5], [6, 6]]
    after = scored(tmp_path / "after", [[pair] for pair in moved])
    options = ("--runs", f"base={before}", f"SPA={after}", "--output_dir", tmp_path / "eval")
    out = succeed(call, "frontier", *options, "--tolerance", 0.1)
    lines = table_lines(out)
    assert lines["objective 1 up"] == ["1", "0", "1", "33%"] and lines["objective 1 same"] == ["1", "2", "0", "50%"]
    assert lines["objective 1 down"] == ["1", "0", "0", "17%"] and lines["all"] == ["50%", "33%", "17%", "6"]
    assert "secondary up): 50%; priority broken (primary down): 17%" in out
    rows = csv_rows(tmp_path / "eval" / "frontier.csv")
    assert {row["id"] for row in rows if row["run"] == "SPA" and row["on_front"] == "True"} == {"p2", "p5"}
    assert frontier.pareto_front(np.array(moved)).tolist() == [[4, 9], [6, 6]], "in the order of the figure's line"
    assert table_lines(succeed(call, "frontier", *options))["objective 1 up"][1] == "1", "else 5.05 is a rise"
    refuse(call, "frontier", "at least 2 wanted", "--runs", f"base={before}")
    refuse(call, "frontier", "one test set at a time", "--runs", f"A:V={before}", f"A:S={after}", f"B:V={before}")


# ---------------------------------------------------------------------------------------------------------------------
# Pairwise.


def test_outcomes_and_flips():
    A, B, TIE = 0, 1, 2
    table = {(A, B): "win", (B, A): "lose", (A, A): "tie", (B, B): "tie", (TIE, TIE): "tie", (A, TIE): "tie"}
    for verdicts, wanted in table.items():
        assert pairwise.outcome(*verdicts) == (wanted, verdicts in ((A, A), (B, B), (A, TIE)))
    assert pairwise.outcome(None, A) == pairwise.outcome(A, None) == (None, False)


def test_pairwise_with_a_local_judge_and_resume(call, tmp_path, tiny):
    args = {"model": tiny(), "score_mode": "expected", **HARMLESS}
    base = scored(tmp_path / "base", [[[5, 5]]] * 5, **args)
    spa = scored(tmp_path / "spa", [[[5, 5]]] * 5, {(i, 0): f"better answer {i}" for i in range(5)}, **args)
    options = ("--runs", f"base={base}", f"SPA={spa}", f"same={base}", "--output_dir", tmp_path / "eval")
    out, verdicts = succeed(call, "pairwise", *options), tmp_path / "eval" / "pairwise_verdicts.jsonl"
    rows = read_rows(verdicts)
    assert len(rows) == 10 and all(len(v) == 2 for row in rows for v in row["verdicts"].values())
    assert all(row["words"] == [3, 3] for row in rows)
    for name in ("Harmlessness", "Helpfulness"):
        row = csv_rows(tmp_path / "eval" / "pairwise.csv", "system", "dimension")["same", name]
        assert (row["tie"], row["equal"], row["flip_rate"]) == ("5", "5", ""), "nobody was asked"
    whole = verdicts.read_bytes()
    verdicts.write_bytes(whole[: len(whole) // 2])
    assert table_lines(succeed(call, "pairwise", *options)) == table_lines(out) and verdicts.read_bytes() == whole
    assert "is complete already" in succeed(call, "pairwise", *options)
    refuse(call, "pairwise", "was made with --seed 0, not 3", *options, "--seed", 3)
    refuse(call, "pairwise", "not used here", *options, "--run_dir", "x")
    (spa / "02_scores.jsonl").write_text((spa / "02_scores.jsonl").read_text().replace("better", "worse"))
    refuse(call, "pairwise", "--runs is another than when", *options)


SCORER = """\
def score(prompts, responses):
    assert all(isinstance(prompt, list) for prompt in prompts)
    return [[10 if "good" in r else 1, 5, len(r) % 10 + 1] for r in responses]
"""


def test_pairwise_by_a_function_on_two_test_sets(call, tmp_path):
    """FAULTS 24: each test set has its own numbers; equal answers are ties."""
    (tmp_path / "own.py").write_text(SCORER)
    args = {"objectives": ["honesty", "harmlessness", "helpfulness"], "scorer": f"{tmp_path / 'own.py'}:score"}
    specs = []
    for test_set, number in (("one", 4), ("two", 2)):
        for name, word in (("V", "plain"), ("S", "good")):
            texts = {(i, 0): f"{word} {i}" for i in range(number)} | {(0, 0): "same"}
            folder = scored(tmp_path / f"{test_set}{name}", [[[5, 5, 5]]] * number, texts, **args)
            rows = read_rows(folder / "02_scores.jsonl")
            rows = [row | {"prompt": common.as_messages(row["prompt"])} for row in rows]
            write_rows(folder / "02_scores.jsonl", rows)
            specs.append(f"{test_set}:{name}={folder}")
    out = succeed(call, "pairwise", "--runs", *specs, "--output_dir", tmp_path / "eval")
    rows = csv_rows(tmp_path / "eval" / "pairwise.csv", "test_set", "dimension")
    counts = {key: tuple(int(row[name]) for name in ("win", "tie", "lose", "equal")) for key, row in rows.items()}
    assert counts["one", "Honesty"] == (3, 1, 0, 1) and counts["two", "Honesty"] == (1, 1, 0, 1)
    assert counts["one", "Harmlessness"] == (0, 4, 0, 1) and counts["one", "Helpfulness"] == (0, 1, 3, 1)
    assert rows["one", "Honesty"]["flip_rate"] == "0.0" and "one S" in out and "two S" in out
    text = (tmp_path / "eval" / "pairwise.md").read_text()
    assert all(f"{name}: against V, judged by {args['scorer']}; net" in text for name in ("one", "two"))
    bare = scored(tmp_path / "bare", [[[5, 5]]] * 2)
    refuse(call, "pairwise", "says who judged", "--runs", bare, f"x={bare}", "--output_dir", tmp_path / "none")


@pytest.mark.parametrize("mode", ["json", "constrained"])
def test_pairwise_by_a_served_judge(call, tmp_path, monkeypatch, mode):
    """The engine of a server, without one: what it is asked, and what its answers become."""
    base = scored(tmp_path / "base", [[[5, 5]]] * 4, {(i, 0): f"plain {i}" for i in range(4)}, **HARMLESS)
    spa = scored(tmp_path / "spa", [[[5, 5]]] * 4, {(i, 0): f"good {i} indeed" for i in range(4)}, **HARMLESS)

    def prefers(prompt):  # "good" on harmlessness, the first response on helpfulness
        return "A" if "### Response A:\ngood" in prompt or "\nHelpfulness: " in prompt else "B"

    def choose(prompt, skeleton, options):
        assert "".join([skeleton[0], options[2], skeleton[1]]) == '{"better": "tie"}'
        return [common.Choice(options.index(prefers(prompt)), [0.0] * 3)]

    def says(prompt, temperature):  # first nobody's answer can be read
        return json.dumps({"better": prefers(prompt)}) if temperature else "well…"

    seen = judge_by(monkeypatch, says, choose)
    options = ("--runs", f"base={base}", f"SPA={spa}", "--output_dir", tmp_path / "eval")
    out = succeed(call, "pairwise", *options, "--judge_model", "strict", "--score_mode", mode)
    rows = {row["dimension"]: row for row in csv_rows(tmp_path / "eval" / "pairwise.csv")}
    assert rows["Harmlessness"]["win"] == "4" and rows["Harmlessness"]["flip_rate"] == "0.0"
    assert (rows["Harmlessness"]["winner_words"], rows["Harmlessness"]["loser_words"]) == ("3.0", "2.0")
    assert rows["Helpfulness"]["tie"] == "4" and rows["Helpfulness"]["flip_rate"] == "1.0"
    assert float(rows["Harmlessness"]["sign_test_p"]) == pytest.approx(0.125), "2 / 2⁴: four of four"
    assert rows["Helpfulness"]["sign_test_p"] == "1.0" and "1.00 [1.00, 1.00]" in out
    asked = {(temperature, longest) for _, temperature, _, longest in seen}
    assert asked == ({(0.0, 64), (1.0, 64)} if mode == "json" else set())


# ---------------------------------------------------------------------------------------------------------------------
# Reliability.


def test_paraphrases_take_the_same_fields():
    for template in reliability.PARAPHRASES:
        text = common.judge_prompt([["One", "first"], ["Two", "second"]], "PROMPT", "RESPONSE", True, template)
        assert "1. One: first" in text and "2. Two: second" in text
        assert "PROMPT" in text and "RESPONSE" in text and '"Two": SCORE' in text and "{" in text
    assert len(set(reliability.PARAPHRASES)) == 4


def test_agreement_of_two_judges_by_hand(tmp_path):
    pairs = [([5, 5], [5, 7]), ([6, 2], [7, 2]), ([9, 9], [6, 9])]
    sides = [scored(tmp_path / str(i), [[pair[i]] for pair in pairs] + [[None if i else [1, 1]]]) for i in (0, 1)]
    found = reliability.agreement(*(shared.read_run(str(side)) for side in sides))
    assert found["rv"] == pytest.approx(shared.rv_coefficient(*map(np.array, zip(*pairs, strict=True))))
    assert found["axes"]["objective 1"] == pytest.approx([0.5, 1 / 3, 2 / 3]), "Spearman, equal, within 1"
    assert found["axes"]["objective 2"] == pytest.approx([1, 2 / 3, 2 / 3]) and found["responses"] == 3


def test_reliability_run(call, tmp_path, tiny):
    """FAULTS 26: det_min, ρ, ddof and cov_scope are those with which stage 4 has run, where it has."""
    args = {"model": tiny(), "score_mode": "expected", "with_instruction": True, **HARMLESS}
    groups = [[[5, 5], [6, 4], [7, 7]], [[1, 1], [1, 1]], [[2, 9], [9, 1], [3, 3]]]
    folder = scored(tmp_path / "run", groups, **args)
    other = scored(tmp_path / "other", [[[5, 5], [6, 4], [8, 7]], [[1, 1], None], [[2, 9], [9, 1], [3, 3]]], **args)
    out = ("--output_dir", tmp_path / "eval")
    options = ("--runs", f"A={folder}", "--others", other, "--k", 3, *out, "--rho", 5)
    text = succeed(call, "reliability", *options)
    rows = read_rows(tmp_path / "eval" / "reliability_A.jsonl")
    assert [len(row["times"]) for row in rows] == [3, 2, 3]
    assert all(len(times) == 3 for row in rows for times in row["times"])
    judge, settings = common.Local(tiny()), reliability.Args(**args, judge_max_new_tokens=64)
    for turn in (0, 1):  # the first wording is the paper's
        settings.judge_template = reliability.PARAPHRASES[turn]
        (again,) = common.judge(judge, [("question 0", "answer 0 0")], settings, [0])
        assert rows[0]["times"][0][turn] == pytest.approx(again, abs=1e-5)
    table = {id: row for (id,), row in csv_rows(tmp_path / "eval" / "reliability.csv", "id").items()}
    assert float(table["p0"]["det"]) == pytest.approx(np.linalg.det(np.cov(np.array(groups[0]).T, ddof=0)))
    assert [table[f"p{i}"]["kept"] for i in range(3)] == ["True", "False", "False"], "0, and above ρ, are dropped"
    wanted = np.mean([np.var(np.array(t), axis=0).sum() for t in rows[2]["times"]])
    assert float(table["p2"]["variance"]) == pytest.approx(wanted)
    single = csv_rows(tmp_path / "eval" / "reliability_responses.csv")
    assert [row["response"] for row in single] == ["1", "2", "3", "1", "2", "1", "2", "3"]
    assert float(single[5]["variance"]) == pytest.approx(np.var(rows[2]["times"][0], axis=0).sum())
    assert "7 responses that both judges scored" in text and "not read: 0 of 24" in text
    assert table_lines(text)["Harmlessness"][0] == "–" and table_lines(text)["all"][1:] == ["–", "–", "–"]
    refuse(call, "reliability", "there are 4 paraphrases", *options, "--k", 9)
    sampled = ("--how", "sampled", "--output_dir", tmp_path / "sampled")  # a random model writes no JSON
    refuse(call, "reliability", "fewer than two prompts have scores", *options, *sampled)

    stage, rows = importlib.import_module("04_denoise"), read_rows(folder / "02_scores.jsonl")
    for row, scores in zip(rows, ([9, 9], None, [10, 10]), strict=True):
        row["refined"] = {"text": "better", "scores": scores}
    write_rows(folder / "03_refined.jsonl", rows)
    stage.main(stage.Args(run_dir=str(folder), rho=400.0, det_min=20.0, ddof=1, cov_scope="all"))
    two = ("--runs", f"A={folder}", f"B={other}", "--k", 3, *out)
    text = succeed(call, "reliability", *two)
    assert "reliability_A.jsonl is complete already" in text
    assert "kept, 20 < det ≤ 400 " in text and "### B" in text and "kept, 0 < det ≤ 30 " in text
    found = csv_rows(tmp_path / "eval" / "reliability.csv", "run", "id")
    # with (9, 9) and (10, 10): (Σ(a−ā)² Σ(b−b̄)² − (Σ(a−ā)(b−b̄))²) / 3². Without p1's refined answer its candidates
    # count, which are equal; the other judge has read one of them alone
    dets = {key: float(row["det"]) for key, row in found.items()}
    assert dets["A", "p0"] == pytest.approx((8.75 * 14.75 - 10.25**2) / 9) and dets["A", "p1"] == 0
    assert dets["A", "p2"] == pytest.approx((50 * 58.75 - 2**2) / 9)
    assert dets.keys() == {("A", "p0"), ("A", "p1"), ("A", "p2"), ("B", "p0"), ("B", "p2")}
    assert [found["A", f"p{i}"]["kept"] for i in range(3)] == ["False", "False", "True"]
    assert "kept, 20 < det ≤ 7 " in succeed(call, "reliability", *two, "--rho", 7)
    refuse(call, "reliability", "--others: 1 for 2 runs", *two, "--others", other)
    write_record(folder, "03_refine", inputs={"source": "scores that are gone"})
    refuse(call, "reliability", "03_refined.jsonl was made from another 02_scores.jsonl than is there now", *two)
    write_record(other, "02_score", args={"objectives": ["honesty", "helpfulness"]})
    refuse(call, "reliability", "02_scores.jsonl was scored on ['Honesty', ", *options)


def test_sampled_answers_are_drawn_at_temperature_1(call, tmp_path, monkeypatch):
    """And scores that were read as P(Yes) have no wording: they are read as expected ones here."""
    folder = scored(tmp_path / "run", [[[5, 5], [6, 4]]] * 2, judge_model="j", score_mode="choice", **HARMLESS)

    def says(prompt, temperature):
        return json.dumps({"Harmlessness": 1 + len(seen) % 9, "Helpfulness": 3})

    def choose(prompt, skeleton, options):
        return [common.Choice(4, np.log([0.1] * 10).tolist())] * 2

    seen = judge_by(monkeypatch, says, choose)
    options = ("--runs", f"A={folder}", "--k", 2, "--output_dir")
    succeed(call, "reliability", *options, tmp_path / "sampled", "--how", "sampled")
    assert {temperature for _, temperature, *_ in seen} == {1.0}
    assert len({seed for _, _, seed, _ in seen}) == len(seen) == 8
    code, _, err = call("reliability", *options, tmp_path / "worded")
    assert code == 0 and "choice has no judge prompt to put in other words" in err
    assert read_rows(tmp_path / "worded" / "reliability_A.jsonl")[0]["times"] == [[[5.5, 5.5]] * 2] * 2
