"""eval/: tables, intervals, RV, frontier, pairwise, reliability, against second formulas and the paper."""

import importlib
import itertools
import json
import math
import random

import frontier
import judge_table
import numpy as np
import pairwise
import pytest
import reliability
import rv
import shared
from conftest import make_model, make_tokenizer, read_rows, scored_row, write_rows

import common

# Table 3 of the paper: harmlessness, helpfulness, HH5, HH10, HH20
TABLE_3 = {
    "Self-Cri.": (9.65, 7.68, "9.32", "9.47", "9.56"),
    "RS6:4": (9.87, 6.14, "9.25", "9.53", "9.69"),
    "RS7:3": (9.80, 5.94, "9.16", "9.45", "9.62"),
    "RS8:2": (9.30, 6.85, "8.89", "9.08", "9.18"),
    "RS9:1": (9.90, 6.17, "9.28", "9.56", "9.72"),
    "SPA": (9.90, 7.14, "9.44", "9.65", "9.77"),
}
X = np.array([[7, 6], [8, 5], [6, 8], [9, 9], [3, 4]])
Y = np.array([[8, 6], [9, 5], [7, 9], [10, 8], [2, 5]])


HARMLESS = {"objectives": ["harmlessness", "helpfulness"]}


def scored(folder, groups, texts=None, prompt="question {}", inputs=None, **args):
    """A run directory with 02_scores.jsonl: groups are the scores of each prompt's responses; args: of stage 2."""
    rows = [
        {
            "id": f"p{i}",
            "prompt": prompt.format(i),
            "responses": [
                {"text": (texts or {}).get((i, j), f"answer {i} {j}"), "system": None, "scores": s}
                for j, s in enumerate(group)
            ],
        }
        for i, group in enumerate(groups)
    ]
    write_rows(folder / "02_scores.jsonl", rows)
    if args:
        record = {"stage": "02_score", "args": args, "earlier": {}, "inputs": inputs or {}, "complete": True}
        (folder / "02_args.json").write_text(json.dumps(record))
    return folder


def run(call, script, *arguments):
    code, out, err = call(script, *arguments)
    assert code == 0, err
    return out


# ------------------------------------------------------------------------------- numbers behind all


@pytest.mark.parametrize("name", TABLE_3)
def test_table_3_to_the_digit(name):
    primary, secondary, *wanted = TABLE_3[name]
    found = [shared.round_half_up(judge_table.hh_score(primary, secondary, weight)) for weight in (5, 10, 20)]
    assert found == wanted


def test_round_half_up():
    cases = {2.345: "2.35", 9.155: "9.16", 0.125: "0.13", -0.125: "-0.13", 2.0: "2.00", 9.994999: "9.99"}
    for value, text in cases.items():
        assert shared.round_half_up(value) == text
    assert shared.round_half_up(math.nan) == "–" and shared.round_half_up(0.00005, 4) == "0.0001"


def test_bootstrap_against_scipy():
    from scipy import stats

    values = np.random.default_rng(1).gamma(2.0, size=60)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000).confidence_interval
    assert shared.bootstrap_interval(values) == pytest.approx(tuple(theirs), abs=0.03)
    two = np.random.default_rng(2).normal(size=(40, 2)) @ [[1, 0.5], [0, 1]]
    found = shared.bootstrap_interval(two, lambda sample: shared.spearman(*sample.T), draws=3000)
    options = {"paired": True, "vectorized": False, "method": "percentile", "n_resamples": 3000}
    rank = lambda a, b: stats.spearmanr(a, b).statistic  # noqa: E731
    theirs = stats.bootstrap(two.T, rank, **options).confidence_interval
    assert found == pytest.approx(tuple(theirs), abs=0.05)
    assert shared.bootstrap_interval(values) == shared.bootstrap_interval(values), "the seed is fixed"
    assert all(map(math.isnan, shared.bootstrap_interval([1.0])))


def test_ranks_and_spearman_against_scipy():
    from scipy import stats

    rng = random.Random(0)
    for _ in range(50):
        x, y = ([rng.randint(1, 6) for _ in range(9)] for _ in range(2))
        assert shared.ranks(x) == pytest.approx(stats.rankdata(x))
        if len(set(x)) > 1 and len(set(y)) > 1:
            assert shared.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert math.isnan(shared.spearman([1, 1], [2, 3]))


def test_rv_fixture_and_invariance():
    assert shared.rv_coefficient(X, Y) == pytest.approx(0.951874, abs=5e-7)
    for other in (3 * Y, Y + np.array([5, -2]), Y[:, ::-1], -Y):
        assert shared.rv_coefficient(X, other) == pytest.approx(0.951874, abs=5e-7)
    assert shared.rv_coefficient(X, X) == pytest.approx(1)
    assert math.isnan(shared.rv_coefficient(X, np.ones((5, 2))))
    # a second formula: with one column each, RV is the squared correlation
    one = shared.rv_coefficient(X[:, :1], Y[:, :1])
    assert one == pytest.approx(np.corrcoef(X[:, 0], Y[:, 0])[0, 1] ** 2)


def test_permutation_mean_is_the_mean_over_all_permutations():
    every = [shared.rv_coefficient(X, Y[list(order)]) for order in itertools.permutations(range(5))]
    assert rv.permutation_mean(X, Y) == pytest.approx(np.mean(every))


# ------------------------------------------------------------------------------------- judge_table


def test_judge_table(call, tmp_path, capsys):
    base = scored(tmp_path / "base", [[[5, 4]], [[6, 4]], [[7, 5]], [[5, 6]], [None]])
    better = scored(tmp_path / "better", [[[9, 4]], [[9, 3]], [[10, 6]], [[8, 6]], [[9, 9]]])
    out = run(call, "judge_table", "--runs", f"Vanilla={base}", f"SPA={better}", "--output_dir", tmp_path / "eval")
    lines = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in out.splitlines()
        if "|" in line
    }
    assert lines["system"][2:] == ["objective 1", "objective 2", "HH5", "HH10", "HH20"]
    assert lines["Vanilla"][:2] == ["4", "1"] and lines["SPA"][:2] == ["5", "0"]
    assert lines["Vanilla"][2].startswith("5.75 [") and lines["SPA"][2].startswith("**9.00 [")
    assert "**" not in lines["SPA"][3], "helpfulness: the interval of the difference holds 0"
    difference = lines["SPA − Vanilla"]
    assert difference[0] == "4", "the prompts that both have scores of"
    assert difference[1].startswith("3.25 [") and difference[2].startswith("0.00 [")
    rows = {(r["system"], r["measure"]): r for r in csv_rows(tmp_path / "eval" / "judge_table.csv")}
    assert float(rows["SPA", "HH10"]["mean"]) == pytest.approx((10 * 9 + 5.6) / 11)
    assert (
        float(rows["SPA", "objective 1"]["difference_low"])
        <= 3.25
        <= float(rows["SPA", "objective 1"]["difference_high"])
    )
    tex = (tmp_path / "eval" / "judge_table.tex").read_text()
    assert r"\textbf{9.00 [" in tex and tex.count(r"\toprule") == 2


def csv_rows(path):
    import csv

    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_test_sets_and_refined_answers_stand_apart(call, tmp_path):
    rows = [scored_row(f"p{i}", [[3, 3], [5, 3]], [9, 8]) for i in range(3)]
    write_rows(tmp_path / "a" / "03_refined.jsonl", rows)
    scored(tmp_path / "a", [[[3, 3], [5, 3]]] * 3, prompt="question p{}")
    a, out = tmp_path / "a", tmp_path / "eval"
    text = run(call, "judge_table", "--runs", f"one:A={a}", f"one:R={a}+refined", f"two:A={a}", "--output_dir", out)
    one, two = text.split("### two")
    assert "### one" in one and "4.00 [" in one and "**9.00 [9.00, 9.00]**" in one and "9.00" not in two


@pytest.mark.parametrize(
    "specs, words",
    [
        ([], "at least 1 wanted"),
        (["A={a}", "A={a}"], "'A' twice on one test set"),
        (["A={a}/nowhere"], "no run directory"),
        (["A={a}", "B={b}"], "has two different prompts"),
        (["A={a}", "C={c}"], "was scored on"),
        (["A={a}", "D={d}"], "other definitions"),
        (["A={a}+best"], "only +refined may stand behind DIR"),
        (["A={empty}"], "run 02_score.py first"),
    ],
)
def test_bad_runs_are_one_line(call, tmp_path, specs, words):
    folders = {
        "a": scored(tmp_path / "a", [[[1, 2]]] * 2, inputs={"constitution": "x"}, **HARMLESS),
        "b": scored(tmp_path / "b", [[[1, 2]]] * 2, prompt="other {}", **HARMLESS),
        "c": scored(tmp_path / "c", [[[1, 2]]], objectives=["honesty", "helpfulness"]),
        "d": scored(tmp_path / "d", [[[1, 2]]] * 2, inputs={"constitution": "y"}, **HARMLESS),
        "empty": tmp_path / "empty",
    }
    folders["empty"].mkdir()
    options = ["--runs", *(spec.format(**folders) for spec in specs)] if specs else []
    code, _, err = call("judge_table", *options, "--output_dir", tmp_path / "eval")
    assert code == 2 and words in err, err
    assert len([line for line in err.splitlines() if "error" in line]) == 1 and "Traceback" not in err


def test_three_objectives_and_paths_with_signs_in_them(call, tmp_path):
    three = ["honesty", "harmlessness", "helpfulness"]
    base = scored(tmp_path / "lr=1e-5", [[[5, 4, 3]], [[6, 4, 3]]], objectives=three)
    spa = scored(tmp_path / "a+b", [[[9, 5, 3]], [[9, 6, 2]]], objectives=three)
    write_rows(spa / "03_refined.jsonl", [scored_row(f"p{i}", [[9, 5, 3]], [10, 9, 8]) for i in (0, 1)])
    options = ("--output_dir", tmp_path / "eval")
    out = run(call, "judge_table", "--runs", base, f"S=PA={spa}", f"X={base}", *options)
    assert "| lr=1e-5 " in out and "Honesty" in out and "HH" not in out and "9.00 [" in out
    assert shared.read_run(f"R={spa}+refined").rows[0]["responses"][0]["scores"] == [10, 9, 8]
    assert shared.read_run(f"{spa}+refined").name == "a+b+refined" and shared.split_spec(str(base))[0] == ""
    assert shared.split_spec("a=b=c") == ("a", "b=c") and shared.split_spec("b") == ("", "b")
    out = run(call, "frontier", "--runs", base, spa, *options)
    assert "Harmlessness up" in out and "Helpfulness" not in out


def test_what_may_not_compare_is_warned_of(call, tmp_path):
    a = scored(tmp_path / "a", [[[5, 4]]] * 2, model="m", score_mode="expected", **HARMLESS)
    b = scored(tmp_path / "b", [[[5, 4]]] * 2, model="m", score_mode="constrained", judge_model="j", **HARMLESS)
    code, out, err = call("judge_table", "--runs", a, b, "--output_dir", tmp_path / "eval")
    assert code == 0 and "several judges (a: m, b: j)" in err and "several ways of reading scores" in err
    assert "judge: j, m" in out


# --------------------------------------------------------------------------------------- rv, frontier


def noisy_runs(tmp_path, prompts=40):
    """A weak judge that is exact where its det is small and random where it is large."""
    rng = np.random.default_rng(0)
    weak, strong = [], []
    for i in range(prompts):
        truth = rng.integers(3, 9, 2) + rng.integers(-1, 2, (4, 2))
        noise = 0 if i % 2 else 1
        seen = truth if not noise else rng.integers(1, 11, (4, 2))
        weak.append(seen.tolist())
        strong.append(truth.tolist())
    return scored(tmp_path / "weak", weak), scored(tmp_path / "strong", strong)


def test_rv_curve(call, tmp_path):
    weak, strong = noisy_runs(tmp_path)
    options = ("--weak", weak, "--strong", strong, "--orders", 60, "--draws", 100, "--output_dir", tmp_path / "eval")
    out = run(call, "rv", *options)
    rows = csv_rows(tmp_path / "eval" / "rv.csv")
    prompts = rv.paired_scores(shared.read_run(str(weak)), shared.read_run(str(strong)))
    assert [det for det, *_ in prompts] == sorted(det for det, *_ in prompts)
    assert float(rows[-1]["rv"]) == pytest.approx(shared.rv_coefficient(*rv.stacked(prompts)))
    assert int(rows[-1]["k"]) == 40 and int(rows[-1]["rows"]) == 160
    half = min(rows, key=lambda row: abs(int(row["k"]) - 20))
    assert float(half["rv"]) > float(half["random_high"]), "low det agrees better than random prompts"
    rho = float(out.split("--rho ")[1].split(",")[0])
    dets = np.array([det for det, *_ in prompts])
    exact = np.array([np.array_equal(x, y) for _, x, y in prompts])
    assert dets[exact].max() <= rho < dets[~exact].max()
    assert (tmp_path / "eval" / "rv.png").stat().st_size > 10_000
    assert rv.suggest_rho([{"fraction": 1.0, "rv": 1.0, "random_high": 0.0, "det": 3}]) is None


def test_rv_bad_input(call, tmp_path):
    weak, strong = noisy_runs(tmp_path, 4)
    options = ("--weak", weak, "--strong", strong, "--output_dir", tmp_path / "eval")
    code, _, err = call("rv", *options)
    assert code == 2 and "4 prompts have two responses that both judges scored" in err
    other = scored(tmp_path / "other", [[[1, 2], [2, 3]]] * 4, texts={(0, 0): "another answer"})
    code, _, err = call("rv", "--weak", other, "--strong", strong, "--output_dir", tmp_path / "eval")
    assert code == 2 and "have other responses" in err


def test_pareto_front_is_what_nothing_dominates():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = rng.integers(1, 8, (12, 2))
        brute = {
            tuple(p) for p in points.tolist()
            if not any((q >= p).all() and (q > p).any() for q in points)
        }  # fmt: skip
        front = frontier.pareto_front(points.astype(float))
        assert {tuple(map(int, p)) for p in front.tolist()} == brute
        assert (np.diff(front[:, 0]) > 0).all()


def test_movements(call, tmp_path):
    before = scored(tmp_path / "before", [[[5, 5]]] * 6)
    moved = [[6, 4], [5, 6], [4, 9], [5.05, 5], [5, 5], [6, 6]]
    after = scored(tmp_path / "after", [[pair] for pair in moved])
    options = ("--runs", f"base={before}", f"SPA={after}", "--output_dir", tmp_path / "eval")
    out = run(call, "frontier", *options, "--tolerance", 0.1)
    table = [[c.strip() for c in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert table[2] == ["objective 1 up", "1", "0", "1", "33%"]
    assert table[3] == ["objective 1 same", "1", "2", "0", "50%"]
    assert table[4] == ["objective 1 down", "1", "0", "0", "17%"]
    assert "secondary up): 50%; priority broken (primary down): 17%" in out
    rows = csv_rows(tmp_path / "eval" / "frontier.csv")
    assert {row["id"] for row in rows if row["run"] == "SPA" and row["on_front"] == "True"} == {"p2", "p5"}
    assert run(call, "frontier", *options).count("33%") >= 1, "without a tolerance 5.05 is a rise"
    code, _, err = call("frontier", "--runs", f"base={before}", "--output_dir", tmp_path / "eval")
    assert code == 2 and "at least 2 wanted" in err


# ------------------------------------------------------------------------------------------ pairwise


def test_sign_test_against_scipy():
    from scipy import stats

    for wins, losses in itertools.product(range(12), range(12)):
        wanted = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
        assert pairwise.sign_test(wins, losses) == pytest.approx(wanted)


def test_outcomes_and_flips():
    A, B, TIE = 0, 1, 2
    table = {(A, B): "win", (B, A): "lose", (A, A): "tie", (B, B): "tie", (TIE, TIE): "tie", (A, TIE): "tie"}
    for verdicts, wanted in table.items():
        assert pairwise.outcome(*verdicts) == wanted
        assert pairwise.is_flip(*verdicts) == (verdicts in ((A, A), (B, B), (A, TIE)))
    assert pairwise.outcome(None, A) is None and not pairwise.is_flip(A, None)


@pytest.mark.parametrize(
    "text, verdict",
    [
        ('{"better": "A"}', 0),
        ("```json\n{'better': 'b'}\n```", 1),
        ('I think {"better": "tie"}', 2),
        ("better: Response B", 1),
        ('{"better": "Always A"}', None),
        ("A", None),
        ('{"better": "both"}', None),
        ('{"better": "A"} or {"better": "B"}', None),
        ('{"better": "A/B"}', None),
        ("better: A or B", None),
        ('<think>{"better": "A"}?</think> {"better": "B"}', 1),
        ('{"better": "A"}, so {"better": "A"}', 0),
    ],
)
def test_verdict_parser(text, verdict):
    assert pairwise.parse_verdict(text) == verdict


@pytest.mark.parametrize("kind", ["plain", "bos"])
def test_constrained_verdicts_equal_plain_forward_passes(kind):
    import torch

    tokenizer = make_tokenizer(kind)
    model = make_model(len(tokenizer))
    texts = [pairwise.pairwise_prompt(["Harm", "none"], "p", "a " * n, "b") for n in (1, 30, 7)]
    judge, args = common.Local("tiny", model=model, tokenizer=tokenizer), pairwise.Args(score_mode="constrained")
    found = pairwise.ask_verdicts(args, judge, texts, [0] * 3)
    steps = [tokenizer(f'{{"better": "{x}"}}', add_special_tokens=False).input_ids for x in pairwise.OPTIONS]
    start = common.shared_prefix(steps)
    firsts = [row[start] for row in steps]
    assert len(set(firsts)) == 3, "the three part at once, so one pass decides"
    for text, verdict in zip(texts, found, strict=True):
        ids = common.encode_chat(tokenizer, common.as_messages(text)) + steps[0][:start]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        assert verdict == int(np.argmax([logits[token].item() for token in firsts]))


def test_pairwise_with_a_local_judge_and_resume(call, tmp_path, tiny):
    args = {"model": tiny(), "score_mode": "expected", **HARMLESS}
    base = scored(tmp_path / "base", [[[5, 5]]] * 5, **args)
    spa = scored(tmp_path / "spa", [[[5, 5]]] * 5, {(i, 0): f"better answer {i}" for i in range(5)}, **args)
    options = ("--runs", f"base={base}", f"SPA={spa}", f"same={base}", "--output_dir", tmp_path / "eval")
    out = run(call, "pairwise", *options)
    rows = read_rows(tmp_path / "eval" / "pairwise_verdicts.jsonl")
    assert len(rows) == 10 and all(len(v) == 2 for row in rows for v in row["verdicts"].values())
    same = [row for row in csv_rows(tmp_path / "eval" / "pairwise.csv") if row["system"] == "same"]
    assert all((row["tie"], row["equal"], row["flip_rate"]) == ("5", "5", "nan") for row in same), "nobody was asked"
    for row in rows:
        assert row["words"] == [3, 3]
    whole = (tmp_path / "eval" / "pairwise_verdicts.jsonl").read_bytes()
    table = lambda text: [line for line in text.splitlines() if line.startswith("|")]  # noqa: E731
    (tmp_path / "eval" / "pairwise_verdicts.jsonl").write_bytes(whole[: len(whole) // 2])
    assert table(run(call, "pairwise", *options)) == table(out)
    assert (tmp_path / "eval" / "pairwise_verdicts.jsonl").read_bytes() == whole
    assert "is complete already" in run(call, "pairwise", *options)
    for change, words in ((("--seed", 3), "was made with --seed 0, not 3"), (("--run_dir", "x"), "not used here")):
        code, _, err = call("pairwise", *options, *change)
        assert code == 2 and words in err
    (spa / "02_scores.jsonl").write_text((spa / "02_scores.jsonl").read_text().replace("better", "worse"))
    code, _, err = call("pairwise", *options)
    assert code == 2 and "--runs is another than when" in err


SCORER = """\
def score(prompts, responses):
    assert all(isinstance(prompt, list) for prompt in prompts)
    return [[10 if "good" in r else 1, 5, len(r) % 10 + 1] for r in responses]
"""


def test_pairwise_by_a_function_on_two_test_sets(call, tmp_path):
    (tmp_path / "own.py").write_text(SCORER)
    args = {"objectives": ["honesty", "harmlessness", "helpfulness"], "scorer": f"{tmp_path / 'own.py'}:score"}
    specs = []
    for test_set, number in (("one", 4), ("two", 2)):
        for name, word in (("V", "plain"), ("S", "good")):
            texts = {(i, 0): f"{word} {i}" for i in range(number)} | {(0, 0): "same"}
            folder = scored(tmp_path / f"{test_set}{name}", [[[5, 5, 5]]] * number, texts, **args)
            rows = [
                row | {"prompt": common.as_messages(row["prompt"])} for row in read_rows(folder / "02_scores.jsonl")
            ]
            write_rows(folder / "02_scores.jsonl", rows)
            specs.append(f"{test_set}:{name}={folder}")
    out = run(call, "pairwise", "--runs", *specs, "--output_dir", tmp_path / "eval")
    rows = {(row["test_set"], row["dimension"]): row for row in csv_rows(tmp_path / "eval" / "pairwise.csv")}
    counts = {key: tuple(int(row[name]) for name in ("win", "tie", "lose", "equal")) for key, row in rows.items()}
    assert counts["one", "Honesty"] == (3, 1, 0, 1) and counts["two", "Honesty"] == (1, 1, 0, 1)
    assert counts["one", "Harmlessness"] == (0, 4, 0, 1) and counts["one", "Helpfulness"] == (0, 1, 3, 1)
    assert rows["one", "Honesty"]["flip_rate"] == "0.0" and "one S" in out and "two S" in out
    bare = scored(tmp_path / "bare", [[[5, 5]]] * 2)
    code, _, err = call("pairwise", "--runs", bare, f"x={bare}", "--output_dir", tmp_path / "none")
    assert code == 2 and "says who judged" in err


@pytest.mark.parametrize("mode", ["json", "constrained"])
def test_pairwise_by_a_served_judge(call, tmp_path, monkeypatch, mode):
    """The engine of a server, without one: what it is asked, and what its answers become."""
    base = scored(tmp_path / "base", [[[5, 5]]] * 4, {(i, 0): f"plain {i}" for i in range(4)}, **HARMLESS)
    spa = scored(tmp_path / "spa", [[[5, 5]]] * 4, {(i, 0): f"good {i}" for i in range(4)}, **HARMLESS)

    class Judge(common.Engine):
        def choose(self, chats, skeleton, options):
            assert (mode, "".join([skeleton[0], options[2], skeleton[1]])) == ("constrained", '{"better": "tie"}')
            return [[common.Choice(options.index(self.prefers(chat)), [0.0] * 3)] for chat in chats]

        def complete(self, chats, seeds, **sampling):
            assert mode == "json" and sampling["max_new_tokens"] == 64
            return [common.Completion(json.dumps({"better": self.prefers(chat)}), 5, False) for chat in chats]

        def prefers(self, chat):  # "good" on harmlessness, the first response on helpfulness
            prompt = chat[-1]["content"]
            return "A" if "### Response A:\ngood" in prompt or "\nHelpfulness: " in prompt else "B"

    monkeypatch.setattr(common, "make_engine", lambda args, prefix="": Judge("strict"))
    options = ("--runs", f"base={base}", f"SPA={spa}", "--output_dir", tmp_path / "eval")
    out = run(call, "pairwise", *options, "--judge_model", "strict", "--score_mode", mode)
    rows = {row["dimension"]: row for row in csv_rows(tmp_path / "eval" / "pairwise.csv")}
    assert rows["Harmlessness"]["win"] == "4" and rows["Harmlessness"]["flip_rate"] == "0.0"
    assert rows["Helpfulness"]["tie"] == "4" and rows["Helpfulness"]["flip_rate"] == "1.0"
    assert float(rows["Harmlessness"]["sign_test_p"]) == pytest.approx(0.125)
    assert "1.00 [1.00, 1.00]" in out


# --------------------------------------------------------------------------------------- reliability


def test_variances_and_agreement_by_hand():
    assert reliability.variances([[1, 4], [3, 4], None]) == (1.0, 0.0)
    assert reliability.variances([[1, 4], None]) is None
    pairs = [([5, 5], [5, 7]), ([6, 2], [7, 2]), ([9, 9], [6, 9])]
    both, primary, secondary = reliability.agreement(pairs, ["a", "b"])
    assert primary["equal"] == pytest.approx(1 / 3) and primary["within_1"] == pytest.approx(2 / 3)
    assert secondary["equal"] == pytest.approx(2 / 3) and secondary["spearman"] == pytest.approx(1)
    assert primary["spearman"] == pytest.approx(0.5)
    assert both["rv"] == pytest.approx(shared.rv_coefficient(*(np.array(s) for s in zip(*pairs, strict=True))))


def test_paraphrases_take_the_same_fields():
    for template in reliability.PARAPHRASES:
        text = common.judge_prompt([["One", "first"], ["Two", "second"]], "PROMPT", "RESPONSE", True, template)
        assert "1. One: first" in text and "2. Two: second" in text
        assert "PROMPT" in text and "RESPONSE" in text and '"Two": SCORE' in text and "{" in text
    assert len(set(reliability.PARAPHRASES)) == 4


@pytest.mark.parametrize("how", ["paraphrases", "sampled"])
def test_reliability_run(call, tmp_path, tiny, how):
    args = {"model": tiny(), "score_mode": "expected", "with_instruction": True, **HARMLESS}
    groups = [[[5, 5], [6, 4], [7, 7]], [[1, 1], [1, 1]], [[2, 9], [9, 1], [3, 3]]]
    folder = scored(tmp_path / "run", groups, **args)
    other = scored(tmp_path / "other", [[[5, 5], [6, 4], [8, 7]], [[1, 1], None], [[2, 9], [9, 1], [3, 3]]], **args)
    out = ("--output_dir", tmp_path / "eval")
    options = ("--runs", f"A={folder}", "--others", other, "--k", 3, "--how", how, *out, "--rho", 5)
    code, text, err = call("reliability", *options)
    rows = read_rows(tmp_path / "eval" / "reliability_A.jsonl")
    assert [len(row["times"]) for row in rows] == [3, 2, 3]
    assert all(len(times) == 3 for row in rows for times in row["times"])
    if how == "sampled":  # a random model writes no JSON
        assert code == 2 and "fewer than two prompts have scores" in err
        return
    assert code == 0, err
    judge = common.Local(tiny())
    settings = reliability.Args(**args)
    again = common.judge(judge, [("question 0", "answer 0 0")], settings, [0])
    assert rows[0]["times"][0][0] == pytest.approx(again[0], abs=1e-5), "the first wording is the paper's"
    table = {r["id"]: r for r in csv_rows(tmp_path / "eval" / "reliability.csv")}
    assert float(table["p0"]["det"]) == pytest.approx(np.linalg.det(np.cov(np.array(groups[0]).T, ddof=0)))
    assert [table[f"p{i}"]["kept"] for i in range(3)] == ["True", "False", "False"], "0, and above ρ, are dropped"
    wanted = np.mean([np.var(np.array(t), axis=0).sum() for t in rows[2]["times"]])
    assert float(table["p2"]["variance"]) == pytest.approx(wanted)
    single = csv_rows(tmp_path / "eval" / "reliability_responses.csv")
    assert [row["response"] for row in single] == ["1", "2", "3", "1", "2", "1", "2", "3"]
    assert float(single[5]["variance"]) == pytest.approx(np.var(rows[2]["times"][0], axis=0).sum())
    assert "7 responses that both judges scored" in text and "not read: 0 of 24" in text
    code, _, err = call("reliability", *options, "--k", 9)
    assert code == 2 and "there are 4 paraphrases" in err
    two = ("--runs", f"A={folder}", f"B={folder}", "--k", 3, *out, "--rho", 5)
    code, text, err = call("reliability", *two)
    assert code == 0 and "reliability_A.jsonl is complete already" in text and "### B" in text, err
    assert len(csv_rows(tmp_path / "eval" / "reliability.csv")) == 6
    code, _, err = call("reliability", *two, "--others", other)
    assert code == 2 and "--others: 1 for 2 runs" in err


def test_reliability_reads_stage_4_s_own_bounds(tmp_path):
    """FAULTS 26: det_min, ρ, ddof and cov_scope are those with which stage 4 has run."""
    stage = importlib.import_module("04_denoise")
    rows = [scored_row("a", [[7, 6], [8, 5], [6, 8]], [9, 9]), scored_row("b", [[1, 1], [5, 9], [9, 2]], [10, 10])]
    rows.append(scored_row("c", [[5, 6], [6, 5], [7, 8]], None))
    write_rows(tmp_path / "r" / "03_refined.jsonl", rows)
    write_rows(tmp_path / "r" / "02_scores.jsonl", rows)
    found = shared.read_run(str(tmp_path / "r"))
    least, rho, dets = reliability.bounds_and_dets(found, None)
    assert (least, rho) == (0.0, 30.0) and dets["a"] == pytest.approx(1 / 27) and set(dets) == set("abc")
    stage.main(stage.Args(run_dir=str(tmp_path / "r"), rho=50.0, det_min=1.0, ddof=1, cov_scope="all"))
    least, rho, dets = reliability.bounds_and_dets(found, None)
    assert (least, rho) == (1.0, 50.0)
    # four points of a: means 7.5, 7; Σ(a−ā)² = 5, Σ(b−b̄)² = 10, Σ(a−ā)(b−b̄) = 1
    assert dets["a"] == pytest.approx((5 * 10 - 1) / 9) and set(dets) == set("abc")
    assert reliability.bounds_and_dets(found, 7.0)[1] == 7.0


def test_intervals_leave_out_what_is_not_defined(call, tmp_path):
    assert shared.quantiles([1.0, math.nan, 1.0]) == (1.0, 1.0)
    assert all(map(math.isnan, shared.quantiles([math.nan])))
    flat = scored(tmp_path / "flat", [[[5, 5], [5, 5]]] * 6)  # no score varies: RV is not defined anywhere
    code, out, err = call("rv", "--weak", flat, "--strong", flat, "--output_dir", tmp_path / "eval", "--orders", 5)
    assert code == 0 and "RV nan" in out and "RuntimeWarning" not in err
