"""Stages 4 and 5 against SPEC.md's fixtures and against an independent reading of it."""

import importlib
import random
import subprocess
import sys
from fractions import Fraction

import pytest
import spec_reading
from conftest import ROOT, read_rows, scored_row, write_rows

denoise = importlib.import_module("04_denoise")
pairs = importlib.import_module("05_pairs")

FIXTURE = scored_row("f", [[7, 6], [8, 5], [6, 8]], [9, 9])


def test_det_of_the_fixture():
    candidates = [r["scores"] for r in FIXTURE["responses"]]
    assert denoise.det_covariance(candidates) == 1 / 27
    assert denoise.det_covariance(candidates, ddof=1) == 1 / 12
    assert denoise.det_covariance([*candidates, [9, 9]]) == 3.0625
    assert denoise.det_covariance([*candidates, [9, 9]], ddof=1) == pytest.approx(49 / 9)


def test_collinear_sets_have_det_zero_exactly():
    # numpy.cov says 3e-33 or so for such sets, which would pass "> 0"
    assert denoise.det_covariance([[1, 4], [2, 7], [3, 10]]) == 0
    assert denoise.det_covariance([[5.1, 5.2], [5.3, 5.4], [5.7, 5.8]]) == 0
    assert denoise.det_covariance([[5, 5]]) == 0 and denoise.det_covariance([[5, 5], [7, 2]]) == 0
    assert denoise.det_covariance([[5, 5], [7, 2]], ddof=1) == 0


@pytest.mark.parametrize("scale", [(3, 9 / 4), (5, 25 / 16)])
def test_sample_variance_scales_det(scale):
    n, factor = scale
    scores = [[random.Random(i).randint(1, 10), random.Random(-i - 1).randint(1, 10)] for i in range(n)]
    assert denoise.det_covariance(scores) > 0
    assert denoise.det_covariance(scores, 1) == pytest.approx(factor * denoise.det_covariance(scores))


def reason(row, **options):
    return denoise.denoise(row, denoise.Args(**options))[0]


def test_consistency_is_strict_on_both_axes():
    candidates = [[7, 6], [8, 5], [6, 8]]
    assert reason(scored_row("a", candidates, [9, 9])) is None
    assert reason(scored_row("a", candidates, [8, 9])) == "inconsistent"
    assert reason(scored_row("a", candidates, [9, 8])) == "inconsistent"
    assert reason(scored_row("a", candidates, [8, 8]), consistency=False) is None


def test_informativeness_bounds():
    det = denoise.det_covariance([[1, 1], [1, 5], [5, 1]])
    assert det == float(Fraction(32 * 32 - 16 * 16, 81))  # Σa² = Σb² = 27, Σa = Σb = 7, Σab = 11
    row = scored_row("a", [[1, 1], [1, 5], [5, 1]], [9, 9])
    assert reason(row, rho=det) is None, "the upper bound belongs to the range"
    assert reason(row, rho=det * (1 - 1e-12)) == "det_above_rho"
    assert reason(row, det_min=det, rho=99) == "det_zero", "the lower bound does not"
    assert reason(scored_row("a", [[5, 5]] * 3, [9, 9])) == "det_zero"
    assert reason(scored_row("a", [[5, 5]] * 3, [9, 9]), informativeness=False) is None
    assert reason(scored_row("a", [[5, 5]] * 3, [9, 7]), cov_scope="all") == "det_zero"  # still a line
    assert reason(scored_row("a", [[5, 5], [5, 6], [5, 7]], [9, 9]), cov_scope="all") is None


def test_unscored_comes_first_and_null_candidates_do_not_count():
    assert reason(scored_row("a", [None, None, None], [9, 9]), consistency=False) == "unscored"
    assert reason(scored_row("a", [[1, 1], [2, 3], [4, 4]], None), consistency=False) == "unscored"
    with_null = scored_row("a", [[7, 6], None, [8, 5], [6, 8]], [9, 9])
    assert denoise.denoise(with_null, denoise.Args()) == (None, 1 / 27)


@pytest.mark.parametrize(
    ("delta", "gaps"), [(2, [5, 5, 4, 0, 1, 1]), (3, [5, 5, 4, 1, 1]), (4, [5, 5, 4, 1])]
)
def test_pairs_of_the_fixture(delta, gaps):
    built = pairs.build_pairs(FIXTURE, pairs.Args(delta=delta))
    assert [pair["gap"] for pair in built] == gaps
    assert built[0]["chosen"] == [{"role": "assistant", "content": "f refined"}]
    assert built[0]["prompt"] == [{"role": "user", "content": "question f"}]
    assert built[0]["chosen_scores"] == [9, 9] and built[0]["rejected_scores"] == [7, 6]


def test_margin_and_gap_differ_on_the_grid():
    grid = [[a, b] for a in range(1, 11) for b in range(1, 11)]
    lex = [(y, z) for y in grid for z in grid if pairs.is_preferred(y, z, "lex", (1, 1))]
    found = [pairs.margin_and_gap(y, z, "lex", (1, 1)) for y, z in lex]
    wide = [(gap, sum(y) - sum(z)) for (margin, gap), (y, z) in zip(found, lex, strict=True) if margin >= 2]
    assert len(wide) == 4770
    assert sum(gap == 0 for gap, _ in wide) == 285
    assert sum(total < 0 for _, total in wide) == 870


def test_large_lambda_orders_lexicographically():
    """Appendix E: on integer scores 1 to 10 the bound is λ > 20; 9.0 still ties."""
    grid = [[a, b] for a in range(1, 11) for b in range(1, 11)]

    def agrees(weight):
        return all(
            pairs.is_preferred(y, z, "lex", (1, 1)) == (weight * y[0] + y[1] > weight * z[0] + z[1])
            for y in grid
            for z in grid
        )

    assert agrees(20.5) and not agrees(9.0)


def test_equal_texts_take_part_once():
    row = scored_row("a", [[5, 5], [9, 9], [1, 1]], [10, 10], texts=["same", "same", "other"])
    texts = {
        (p["chosen"][0]["content"], tuple(p["chosen_scores"])) for p in pairs.build_pairs(row, pairs.Args())
    }
    assert ("same", (5, 5)) in texts and ("same", (9, 9)) not in texts
    row["refined"]["text"] = "other"
    assert pairs.build_pairs(row, pairs.Args(refined_only=True)) == []


def test_keep_system_takes_the_preferred_responses_prompt():
    row = scored_row("a", [[5, 5], [9, 9]], [1, 1])
    row["responses"][1]["system"] = "Be honest."
    (best, *_) = pairs.build_pairs(row, pairs.Args(keep_system=True))
    assert best["prompt"][0] == {"role": "system", "content": "Be honest."}
    (best, *_) = pairs.build_pairs(row, pairs.Args())
    assert [message["role"] for message in best["prompt"]] == ["user"]


def random_row(rng: random.Random, number: int) -> dict:
    n = rng.choice((1, 2, 3, 3, 3, 5, 5, 7))
    whole = rng.random() < 0.5

    def score():
        if rng.random() < 0.05:
            return None
        draw = (
            (lambda: rng.randint(1, 10)) if whole else (lambda: round(rng.uniform(1, 10), rng.choice((1, 6))))
        )
        return [draw(), draw()]

    texts = [
        rng.choice(("same", f"{number}-{i}")) if rng.random() < 0.2 else f"{number}-{i}" for i in range(n)
    ]
    refined = [rng.randint(8, 10), rng.randint(8, 10)] if rng.random() < 0.5 else score()
    row = scored_row(str(number), [score() for _ in range(n)], refined, texts)
    if rng.random() < 0.1:
        row["refined"]["text"] = texts[0]
    return row


def test_agrees_with_an_independent_reading_on_2000_random_rows():
    """tests/spec_reading.py was written from SPEC.md alone, without sight of the stages."""
    rng = random.Random(7)
    reasons, pair_count = {}, 0
    for number in range(2000):
        row = random_row(rng, number)
        options = {
            "rho": rng.choice((0.5, 2.0, 10.0, 50.0)),
            "consistency": rng.random() < 0.6,
            "informativeness": rng.random() < 0.7,
            "cov_scope": rng.choice(("candidates", "all")),
            "ddof": rng.choice((0, 1)),
            "det_min": rng.choice((0.0, 0.0, 0.05)),
        }
        ours = denoise.denoise(row, denoise.Args(**options))
        theirs = spec_reading.denoise(row, **options)
        assert ours[0] == theirs[0], (row, options)
        assert ours[1] is theirs[1] is None or ours[1] == pytest.approx(theirs[1], rel=1e-9, abs=1e-15)
        reasons[ours[0]] = reasons.get(ours[0], 0) + 1

        options = {
            "delta": rng.choice((0.0, 0.3, 2.0, 3.0, 4.0)),
            "rule": rng.choice(("lex", "pareto", "weighted")),
            "weights": rng.choice(((6.0, 4.0), (9.0, 1.0), (0.7, 0.3))),
            "refined_only": rng.random() < 0.3,
        }
        if rng.random() < 0.2:
            del row["refined"]
        built = pairs.build_pairs(row, pairs.Args(**options))
        expected = spec_reading.pairs(row, **options)

        def key(pair):
            return pair["chosen_text"], pair["rejected_text"]

        for pair in built:
            pair["chosen_text"] = pair["chosen"][0]["content"]
            pair["rejected_text"] = pair["rejected"][0]["content"]
        built.sort(key=key)
        expected = sorted(expected, key=key)
        assert list(map(key, built)) == list(map(key, expected)), (row, options)
        for mine, other in zip(built, expected, strict=True):
            assert mine["chosen_scores"] == other["chosen_scores"]
            assert mine["rejected_scores"] == other["rejected_scores"]
            assert mine["margin"] == pytest.approx(other["margin"]) and mine["gap"] == pytest.approx(
                other["gap"]
            )
        pair_count += len(built)
    assert all(
        reasons.get(r, 0) > 20 for r in (None, "unscored", "inconsistent", "det_zero", "det_above_rho")
    ), reasons
    assert pair_count > 2000


def test_stages_write_what_they_promise(tmp_path, call):
    rows = [FIXTURE, scored_row("flat", [[5, 5]] * 3, [9, 9]), scored_row("null", [None] * 3, [9, 9])]
    rows += [
        scored_row("worse", [[5, 5], [6, 7], [7, 5]], [5, 5]),
        scored_row("wild", [[1, 1], [1, 9], [9, 1]], [10, 10]),
    ]
    write_rows(tmp_path / "03_refined.jsonl", rows)
    code, out, err = call("04_denoise", "--run_dir", tmp_path, "--rho", 10)
    assert code == 0, err
    assert "03_args.json not found" in err, "a file of one's own is taken, with a warning"
    kept, dropped = read_rows(tmp_path / "04_denoised.jsonl"), read_rows(tmp_path / "04_dropped.jsonl")
    assert kept == [FIXTURE | {"det": 1 / 27}]
    assert {row["id"]: row["reason"] for row in dropped} == {
        "flat": "det_zero",
        "null": "unscored",
        "worse": "inconsistent",
        "wild": "det_above_rho",
    }
    for line in (
        "prompts in",
        "- unscored",
        "- inconsistent",
        "- det_zero",
        "- det_above_rho",
        "prompts kept",
    ):
        assert line in out
    code, out, err = call("05_pairs", "--run_dir", tmp_path)
    assert code == 0, err
    assert "zero gap (weight 0 in SPA): 1; preferred response has the lower total: 2" in out
    assert len(read_rows(tmp_path / "05_pairs.jsonl")) == 6


def test_emptied_by_a_filter_is_exit_code_3_with_advice(tmp_path, call):
    write_rows(tmp_path / "03_refined.jsonl", [scored_row("flat", [[5, 5]] * 3, [9, 9])])
    code, out, err = call("04_denoise", "--run_dir", tmp_path)
    assert code == 3 and "det_zero" in err and "--score_mode expected" in err and "prompts kept" in out
    write_rows(tmp_path / "04_denoised.jsonl", [scored_row("near", [[5, 5], [5.1, 5]], [5.2, 5.1])])
    code, out, err = call("05_pairs", "--run_dir", tmp_path)
    assert code == 3 and "--delta" in err


def test_too_few_responses_for_a_covariance(tmp_path, call):
    write_rows(tmp_path / "03_refined.jsonl", [scored_row("a", [[5, 5], [6, 4]], [9, 9])])
    code, _, err = call("04_denoise", "--run_dir", tmp_path)
    assert code == 2 and "fewer than 3 responses" in err and not (tmp_path / "04_denoised.jsonl").exists()
    code, _, err = call("04_denoise", "--run_dir", tmp_path, "--no-informativeness")
    assert code == 0, err


def test_reward_soups_from_scored_rows_without_refinement(tmp_path, call):
    row = scored_row("a", [[9, 2], [5, 9], [5, 4]], [1, 1])
    del row["refined"]
    write_rows(tmp_path / "02_scores.jsonl", [row])
    options = ("--input", "02_scores.jsonl", "--rule", "weighted", "--weights", 9, 1, "--delta", 0)
    code, _, err = call("05_pairs", "--run_dir", tmp_path, *options)
    assert code == 0, err
    built = read_rows(tmp_path / "05_pairs.jsonl")
    assert [pair["gap"] for pair in built] == [pytest.approx(g) for g in (2.9, 3.4, 0.5)]


SCALE = """
import importlib, sys, time
sys.path.insert(0, {root!r})
sys.argv = ["x"]
for name in ("04_denoise", "05_pairs"):
    module = importlib.import_module(name)
    module.main(module.Args(run_dir={run_dir!r}))
assert "torch" not in sys.modules and "transformers" not in sys.modules
status = open("/proc/self/status").read()  # ru_maxrss would begin with the peak of the parent, pytest
print("PEAK", status.split("VmHWM:")[1].split()[0], time.process_time())  # not the time of a busy machine
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("count", [200_000])
def test_scale(tmp_path, count):
    """200,000 prompts stay under 1 GiB, and four times the prompts take at most about four times as long."""
    text, seconds, rng = "word " * 60, {}, random.Random(1)
    for size in (count // 4, count):
        run_dir = tmp_path / str(size)
        rows = (
            scored_row(
                str(i),
                [[rng.randint(1, 8), rng.randint(1, 8)] for _ in range(3)],
                [9, 9],
                [f"{text}{i}-{j}" for j in range(3)],
            )
            for i in range(size)
        )
        write_rows(run_dir / "03_refined.jsonl", rows)
        script = SCALE.format(root=str(ROOT), run_dir=str(run_dir))
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        kilobytes, seconds[size] = map(float, done.stdout.split("PEAK")[1].split())
        peak = kilobytes / (1 << 20)  # kB to GiB
        assert peak < 1.0, f"{peak:.2f} GiB"
    print(f"{seconds} s, peak {peak:.2f} GiB")
    assert seconds[count] < 6 * seconds[count // 4], seconds
