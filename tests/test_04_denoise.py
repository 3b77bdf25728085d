"""Stage 4: det Σ to the last digit, both filters, the report, a large file. Kills: test_sample_processes.py."""

import importlib
import itertools
import json
import random
import re
import subprocess
import sys
from fractions import Fraction

import pytest
import spec_reading
from conftest import ROOT, make_record, read_rows, scored_row, write_rows

denoise = importlib.import_module("04_denoise")

ABC = [[7, 6], [8, 5], [6, 8]]
FIXTURE = scored_row("f", ABC, [9, 9])
# For each reason one row; the last is kept. ρ = 10 is asked for.
MIXED = [
    scored_row("flat", [[5, 5]] * 3, [9, 9]),
    scored_row("null", [None] * 3, [9, 9]),
    scored_row("worse", [[5, 5], [6, 7], [7, 5]], [5, 5]),
    scored_row("wild", [[1, 1], [1, 9], [9, 1]], [10, 10]),
    FIXTURE,
]


def judge(row, **options):
    """(reason, det, axes that fail) of one row."""
    return denoise.denoise(*denoise.scores_of(row), denoise.Args(**options))


# ------------------------------------------------------------------------------------ det Σ


def test_det_by_hand():
    det = denoise.det_covariance  # SPEC.md's fixtures
    assert det(ABC) == 1 / 27
    assert det(ABC, ddof=1) == 1 / 12
    assert det([*ABC, [9, 9]]) == 3.0625
    assert det([*ABC, [9, 9]], ddof=1) == float(Fraction(49, 9)) == pytest.approx(5.4444, abs=1e-4)
    # Three objectives, every axis 1, 1, 1, 2 in some order: variances 3/16, covariances (6 − 25/4) / 4 = −1/16, and
    # det [[3, −1, −1], [−1, 3, −1], [−1, −1, 3]] = 16, so det Σ = 16 / 16³.
    scores = [[1, 1, 1], [2, 1, 1], [1, 2, 1], [1, 1, 2]]
    assert det(scores) == 1 / 256 and det(scores, ddof=1) == 1 / 108
    assert det(scores[:3]) == 0, "three points lie in a plane"


def leibniz(scores, ddof):
    """det Σ as the sum over permutations, in fractions."""
    points = [[Fraction(str(value)) for value in vector] for vector in scores]
    m, k = len(points), len(points[0])
    mean = [sum(axis) / m for axis in zip(*points, strict=True)]
    total = Fraction(0)
    for order in itertools.permutations(range(k)):
        term = Fraction((-1) ** sum(a > b for a, b in itertools.combinations(order, 2)))
        for i, j in enumerate(order):
            term *= sum((p[i] - mean[i]) * (p[j] - mean[j]) for p in points) / (m - ddof)
        total += term
    return float(total)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_det_is_the_exact_value_rounded_once(k):
    """numpy.cov says 3e-33 or so for points on a line, which would pass "> 0"."""
    rng, zeros = random.Random(k), 0
    for _ in range(300):
        digits = rng.choice((0, 1, 6))
        low, high = rng.choice(((1, 10), (5, 6)))
        scores = [[round(rng.uniform(low, high), digits) for _ in range(k)] for _ in range(rng.randint(2, 7))]
        scores = [[int(v) if digits == 0 else v for v in vector] for vector in scores]
        ddof = rng.choice((0, 1))
        assert denoise.det_covariance(scores, ddof) == leibniz(scores, ddof), scores
        zeros += leibniz(scores, ddof) == 0
    assert 20 < zeros < 280


# ------------------------------------------------------------------------------------ the two filters

BOUND = [[1, 1], [1, 5], [5, 1]]
VALUE = float(Fraction(32 * 32 - 16 * 16, 81))  # Σa² = Σb² = 27, Σa = Σb = 7, Σab = 11
THREE = [[7, 6, 5], [8, 5, 7], [6, 8, 6], [7, 7, 4]]


@pytest.mark.parametrize(
    ("candidates", "refined", "options", "reason"),
    [
        (THREE, [9, 9, 8], {}, None),
        (THREE, [9, 9, 7], {}, "inconsistent"),  # a third objective counts
        ([[a, b, 5] for a, b, _ in THREE], [9, 9, 9], {}, "det_zero"),  # it never varies
        (BOUND, [9, 9], {"rho": VALUE}, None),  # the upper bound belongs to the range
        (BOUND, [9, 9], {"rho": VALUE * (1 - 1e-12)}, "det_above_rho"),
        (BOUND, [9, 9], {"det_min": VALUE, "rho": 99}, "det_zero"),  # the lower bound does not
    ],
)
def test_what_keeps_and_drops_a_prompt(candidates, refined, options, reason):
    """Of two objectives the rest is in the independent reading."""
    assert judge(scored_row("a", candidates, refined), **options)[0] == reason


@pytest.mark.parametrize(
    ("refined", "candidates", "strict", "weak"),
    [
        ([8, 9], ABC, (0,), ()),
        ([8, 8], ABC, (0, 1), (0, 1)),
        ([9, 9], ABC, (), ()),
        ([8, 9, 7], THREE, (0, 2), ()),
        ([9, 6], [[8, 5], [3, 6]], (1,), ()),
        ([9, 5], [[8, 5], [3, 6]], (1,), (1,)),  # above on one axis, below on the other
    ],
)
def test_the_axes_that_fail(refined, candidates, strict, weak):
    """weak (ours) wants one axis above and none below."""
    assert denoise.failed_axes(refined, candidates) == strict
    assert denoise.failed_axes(refined, candidates, weak=True) == weak


def test_responses_without_text_take_no_part():
    """FAULTS 15: the judge gave an empty response [10, 1]."""
    row = scored_row("a", [*ABC[:2], [10, 1], ABC[2], [1, 10]], [9, 9], ["a", "b", " \n", "c", ""])
    assert judge(row) == (None, 1 / 27, ())
    row["refined"]["text"] = "\t"
    assert judge(row)[0] == "unscored"
    assert judge(scored_row("a", [[1, 1], [2, 2]], [9, 9], ["", " "]))[0] == "unscored"


def test_agrees_with_an_independent_reading_on_2000_random_rows():
    """tests/spec_reading.py was written from SPEC.md alone, without sight of the stages."""
    rng, reasons = random.Random(7), {}
    for number in range(2000):
        whole = rng.random() < 0.5

        def score(whole=whole):
            values = [rng.randint(1, 10) if whole else round(rng.uniform(1, 10), 6) for _ in range(2)]
            return None if rng.random() < 0.05 else values

        refined = [rng.randint(8, 10), rng.randint(8, 10)] if rng.random() < 0.5 else score()
        row = scored_row(str(number), [score() for _ in range(rng.choice((1, 2, 3, 3, 5, 7)))], refined)
        options = {
            "rho": rng.choice((0.5, 2.0, 10.0, 50.0)),
            "consistency": rng.random() < 0.6,
            "informativeness": rng.random() < 0.7,
            "cov_scope": rng.choice(("candidates", "all")),
            "ddof": rng.choice((0, 1)),
            "det_min": rng.choice((0.0, 0.0, 0.05)),
        }
        ours = judge(row, **options | {"consistency": "strict" if options["consistency"] else "off"})
        theirs = spec_reading.denoise(row, **options)
        assert ours[0] == theirs[0], (row, options)
        assert ours[1] is theirs[1] is None or ours[1] == pytest.approx(theirs[1], rel=1e-9, abs=1e-15)
        reasons[ours[0]] = reasons.get(ours[0], 0) + 1
    assert all(reasons.get(r, 0) > 20 for r in {None, *denoise.REASONS} - {"not_drawn"}), reasons


# ------------------------------------------------------------------------------------ what it writes and says


def test_it_writes_what_it_promises(tmp_path, ok):
    write_rows(tmp_path / "03_refined.jsonl", MIXED)
    out, err = ok("04_denoise", "--run_dir", tmp_path, "--rho", 10)
    assert "comes without its stage's" in err, "a file of one's own is taken, with a warning"
    kept, dropped = read_rows(tmp_path / "04_denoised.jsonl"), read_rows(tmp_path / "04_dropped.jsonl")
    assert kept == [FIXTURE | {"det": 1 / 27}]
    reasons = {row["id"]: row["reason"] for row in dropped}
    assert reasons == {"flat": "det_zero", "null": "unscored", "worse": "inconsistent", "wild": "det_above_rho"}
    assert [row["id"] for row in dropped] == ["flat", "null", "worse", "wild"], "in the order of the input"
    record = json.loads((tmp_path / "04_args.json").read_text())
    assert record["complete"] and record["rows"] == 1
    for pattern in (
        r"\A04 denoise: .*03_refined.jsonl, refined above all candidates on objective 1 and objective 2, ",
        r"\A[^\n]*, 0 < det Σ <= 10\n",
        r"prompts in +5\n.*- unscored +1\n.*- inconsistent +1\n.*- det_zero +1\n.*- det_above_rho +1\n",
        r"prompts kept +1\n",
        r"each filter alone drops: consistency 1, informativeness 2\n",
        r"det Σ: min 0.03704, median 0.03704, max 0.03704\n",
        r"wrote .*04_denoised.jsonl and 04_dropped.jsonl\nnext: python 05_pairs.py",
    ):
        assert re.search(pattern, out, re.DOTALL), (pattern, out)


def test_the_report_shows_which_axis_failed(tmp_path, ok):
    refined = [[9, 9]] * 2 + [[8, 9]] * 3 + [[9, 8]] * 4 + [[8, 8]] * 5
    rows = [scored_row(str(i), ABC, scores) for i, scores in enumerate(refined)]
    rows += [scored_row("full", [[10, 6], [8, 5], [6, 8]], [10, 9])]
    rows += [scored_row("blank", ABC, [9, 9], ["a", "b", ""])]
    write_rows(tmp_path / "03_refined.jsonl", rows)
    make_record(tmp_path, "03", objectives=["honesty", "helpfulness"])
    out, _ = ok("04_denoise", "--run_dir", tmp_path)
    assert "on just … Honesty and Helpfulness: 5, Honesty: 4, Helpfulness: 4\n" in out
    assert "each filter alone drops: consistency 13, informativeness 1\n" in out  # two points are on a line
    assert re.search(r"a candidate is at 10, .*: 1; responses without text, .*: 1\n", out)


def test_the_median_of_an_even_number_of_dets(tmp_path, ok):
    """FAULTS 31. Scores (1, 1), (1, 1 + b), (1 + a, 1) have det Σ = (2a² 2b² − a² b²) / 81 = (ab)² / 27."""
    sizes = [(3, 1), (3, 3), (9, 1), (6, 1)]  # 1/3, 3, 3 and 4/3
    rows = [scored_row(f"{a}, {b}", [[1, 1], [1, 1 + b], [1 + a, 1]], [10, 10]) for a, b in sizes]
    write_rows(tmp_path / "03_refined.jsonl", rows)
    out, _ = ok("04_denoise", "--run_dir", tmp_path, "--consistency", "off")
    assert "min 0.3333, median 2.167, max 3\n" in out


def test_a_draw_of_what_passes_the_filters(tmp_path, ok, fails):
    """--max_prompts keeps so many of those that pass, the others are dropped by name; a larger draw keeps a smaller."""
    rows = [scored_row(f"p{i}", ABC, [9, 9]) for i in range(12)]
    write_rows(tmp_path / "03_refined.jsonl", [*rows, MIXED[0]])
    kept = {}
    for count in (3, 7, 99):
        folder = tmp_path / str(count)
        _, err = ok("04_denoise", "--input", tmp_path, "--run_dir", folder, "--max_prompts", count)
        assert ("warning: only 12 pass the filters, --max_prompts is 99\n" in err) == (count == 99)
        kept[count] = {row["id"] for row in read_rows(folder / "04_denoised.jsonl")}
        reasons = [row["reason"] for row in read_rows(folder / "04_dropped.jsonl")]
        assert len(kept[count]) == min(count, 12) and reasons.count("det_zero") == 1
        assert reasons.count("not_drawn") == 12 - len(kept[count])
    assert kept[3] < kept[7] < kept[99]
    fails("--max_prompts -1: at least 1", "04_denoise", "--run_dir", tmp_path, "--max_prompts", -1)


# ------------------------------------------------------------------------------------ nothing left, refusals


FLAT, NULL, WORSE, WILD = MIXED[:4]
FULL = scored_row("full", [[5, 5], [6, 7], [10, 5]], [10, 9])
FINE = scored_row("fine", [[5.25, 5.5]] * 3, [9.5, 9.25])


@pytest.mark.parametrize(
    ("row", "made", "options", "words", "never"),
    [
        (FLAT, {}, (), ["'det_zero'", "--score_mode expected", "larger --n", "--no-inf"], "--det_min"),
        (FLAT, {"score_mode": "json"}, (), ["--score_mode expected"], "--consistency off"),
        (FINE, {"score_mode": "expected"}, (), ["--no-informativeness"], "--score_mode"),
        (FLAT, {"scorer": "mine.py:score"}, (), ["--no-informativeness"], "--score_mode"),
        (FLAT, {}, ("--det_min", 0.1), ["a smaller --det_min"], "--consistency off"),
        (WORSE, {}, (), ["'inconsistent'", "more --attempts", "more prompts", "--consistency off"], "at 10"),
        (WORSE, {"score_mode": "expected"}, (), ["more --attempts"], "--score_mode"),
        (FULL, {}, (), ["at 10", "--score_mode expected", "--consistency off"], "--attempts"),
        (NULL, {"score_mode": "json"}, (), ["'unscored'", "--score_mode constrained"], "--no-"),
        (NULL, {"score_mode": "expected"}, (), ["'unscored'", "null"], "--score_mode"),
        (WILD, {}, ("--rho", 10), ["'det_above_rho'", "a larger --rho"], "--consistency off"),
    ],
)  # fmt: skip
def test_emptied_by_a_filter_is_exit_code_3_with_advice(tmp_path, call, fails, row, made, options, words, never):
    """FAULTS section 4: advice that names what was done already, or says nothing where candidates are at 10."""
    write_rows(tmp_path / "03_refined.jsonl", [row])
    make_record(tmp_path, "03", **made)
    command = ("04_denoise", "--run_dir", tmp_path, *options)
    out, err = fails(words[0], *command, code=3)
    assert re.search(r"prompts kept +0\n", out), err
    line = err.strip().splitlines()[-1]
    assert all(word in line for word in words) and never not in line, line
    assert call(*command) == (3, out, err), "the same command says the same again"


def test_a_filter_of_ones_own_may_have_a_reason_of_its_own(tmp_path, fails, monkeypatch):
    monkeypatch.setattr(denoise, "denoise", lambda candidates, refined, args: ("too_short", 1.0, ()))
    write_rows(tmp_path / "03_refined.jsonl", MIXED[-1:])
    out, _ = fails("1 of 1 fell to 'too_short'", "04_denoise", "--run_dir", tmp_path, code=3)
    assert re.search(r"- too_short +1\n", out) and read_rows(tmp_path / "04_dropped.jsonl")[0]["reason"] == "too_short"


def test_too_few_responses_for_a_covariance(tmp_path, ok, fails):
    write_rows(tmp_path / "03_refined.jsonl", [scored_row("a", [[5, 5], [6, 4]], [9, 9])])
    command = ("04_denoise", "--run_dir", tmp_path)
    assert "--n 3 or more" in fails("no prompt has 3 scored responses", *command)[1]
    for options in (("--det_min", 30), ("--det_min", -1), ("--rho", 0)):
        fails("0 <= det_min < rho", *command, *options)
    assert not list(tmp_path.glob("04_*")), "said before anything is begun"
    for options in (("--no-informativeness",), ("--cov_scope", "all", "--overwrite")):
        ok(*command, *options)
    # three objectives need four responses
    own = write_rows(tmp_path / "own.jsonl", [scored_row("a", [[5, 5, 5], [6, 4, 4], [4, 7, 5]], [9, 9, 9])])
    words = "no prompt has 4 scored responses, so det Σ of 3 objectives"
    fails(words, "04_denoise", "--input", own, "--run_dir", tmp_path / "three")


@pytest.mark.parametrize("words", ["line 6: broken JSON", "has not finished", "this stage writes"])
def test_what_is_refused_costs_nothing(tmp_path, ok, fails, words):
    """A bad last row, a predecessor that has not finished, its own output: the old one stays, even with --overwrite."""
    source, command = write_rows(tmp_path / "03_refined.jsonl", MIXED), ("04_denoise", "--run_dir", tmp_path)
    make_record(tmp_path, "03")
    ok(*command)
    before, record = (tmp_path / "04_denoised.jsonl").read_bytes(), json.loads((tmp_path / "03_args.json").read_text())
    (tmp_path / "03_args.json").write_text(json.dumps(record | {"complete": "finished" not in words}))
    source.write_text(source.read_text() + "{" * ("JSON" in words))
    own = ("--input", tmp_path / "04_denoised.jsonl") if "writes" in words else ()
    fails(words, *command, "--overwrite", *own)
    assert (tmp_path / "04_denoised.jsonl").read_bytes() == before


# ------------------------------------------------------------------------------------ large files


SCALE = """
import importlib, sys, time
sys.path.insert(0, {root!r})
sys.argv = ["x"]
module = importlib.import_module({stage!r})
module.main(module.Args(run_dir={run_dir!r}))
assert "torch" not in sys.modules and "transformers" not in sys.modules
status = open("/proc/self/status").read()  # ru_maxrss would begin with the peak of the parent, pytest
print("PEAK", status.split("VmHWM:")[1].split()[0], time.process_time())  # not the time of a busy machine
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("stage", "file"), [("04_denoise", "03_refined.jsonl"), ("05_pairs", "04_denoised.jsonl")])
def test_rows_stream_without_torch(tmp_path, stage, file):
    """Four times the prompts take about four times as long, in about the same memory."""
    text, seconds, kilobytes, rng = "word " * 200, [], [], random.Random(1)
    for count in (3_000, 12_000):
        run_dir = tmp_path / str(count)
        run_dir.mkdir()
        with open(run_dir / file, "w") as out:
            for i in range(count):
                scores = [[rng.randint(1, 8), rng.randint(1, 8)] for _ in "abc"]
                row = scored_row(str(i), scores, [9, 9], [text + letter for letter in "abc"])
                out.write(json.dumps(row) + "\n")
        script = SCALE.format(root=str(ROOT), stage=stage, run_dir=str(run_dir))
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        peak, time = map(float, done.stdout.split("PEAK")[1].split())
        kilobytes.append(peak)
        seconds.append(time)
    grown = (kilobytes[1] - kilobytes[0]) * 1024 / 9_000
    assert grown < 500, f"{grown:.0f} bytes a prompt of 3,500"
    assert seconds[1] < 10 * seconds[0], seconds  # a quadratic one takes 16 times as long
