"""Stage 4: values worked out by hand, both filters, the report, branching, kills, a large file."""

import importlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
from fractions import Fraction

import pytest
import spec_reading
from conftest import ROOT, read_rows, scored_row, write_rows

import common

denoise = importlib.import_module("04_denoise")

FIXTURE = scored_row("f", [[7, 6], [8, 5], [6, 8]], [9, 9])
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


def reason(row, **options):
    return judge(row, **options)[0]


def det(scores, ddof=0):
    return denoise.det_covariance(scores, ddof)


# ------------------------------------------------------------------------------------ det Σ


def test_det_of_the_fixture():
    candidates = [r["scores"] for r in FIXTURE["responses"]]
    assert det(candidates) == 1 / 27
    assert det(candidates, ddof=1) == 1 / 12
    assert det([*candidates, [9, 9]]) == 3.0625
    assert det([*candidates, [9, 9]], ddof=1) == float(Fraction(49, 9)) == pytest.approx(5.4444, abs=1e-4)


def test_det_of_three_objectives_by_hand():
    # Every axis is 1, 1, 1, 2 in some order: variances 3/16, covariances (6 − 25/4) / 4 = −1/16, and
    # det [[3, −1, −1], [−1, 3, −1], [−1, −1, 3]] = 16, so det Σ = 16 / 16³.
    scores = [[1, 1, 1], [2, 1, 1], [1, 2, 1], [1, 1, 2]]
    assert det(scores) == 1 / 256
    assert det(scores, ddof=1) == 1 / 108
    assert det(scores[:3]) == 0, "three points lie in a plane"


def test_collinear_sets_have_det_zero_exactly():
    # numpy.cov says 3e-33 or so for such sets, which would pass "> 0"
    assert det([[1, 4], [2, 7], [3, 10]]) == 0
    assert det([[5.1, 5.2], [5.3, 5.4], [5.7, 5.8]]) == 0
    assert det([[5, 5]]) == 0 and det([[5, 5], [7, 2]]) == 0
    assert det([[5, 5], [7, 2]], ddof=1) == 0 and det([[5, 5]], ddof=1) == 0 and det([]) == 0
    # three objectives: the third is the sum of the others; the first, or the second, does not vary
    plane = [[1.1, 2.2, 3.3], [1.3, 2.1, 3.4], [1.7, 2.9, 4.6], [1.2, 2.8, 4.0], [1.9, 2.3, 4.2]]
    assert det(plane) == 0 and det([[5, b, c] for _, b, c in plane]) == 0
    assert det([[a, 5, c] for a, _, c in plane]) == 0 and det([[a, a, c] for a, _, c in plane]) == 0


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
    rng, zeros = random.Random(k), 0
    for _ in range(300):
        digits = rng.choice((0, 1, 6))
        low, high = rng.choice(((1, 10), (5, 6)))
        scores = [[round(rng.uniform(low, high), digits) for _ in range(k)] for _ in range(rng.randint(2, 7))]
        scores = [[int(v) if digits == 0 else v for v in vector] for vector in scores]
        ddof = rng.choice((0, 1))
        assert det(scores, ddof) == leibniz(scores, ddof), scores
        zeros += det(scores, ddof) == 0
    assert 20 < zeros < 280


# ------------------------------------------------------------------------------------ the two filters


def test_consistency_is_strict_on_every_axis():
    candidates = [[7, 6], [8, 5], [6, 8]]
    assert reason(scored_row("a", candidates, [9, 9])) is None
    assert reason(scored_row("a", candidates, [8, 9])) == "inconsistent"
    assert reason(scored_row("a", candidates, [9, 8])) == "inconsistent"
    assert reason(scored_row("a", candidates, [8, 8]), consistency="off") is None
    assert denoise.failed_axes([8, 9], candidates) == (0,) and denoise.failed_axes([9, 8], candidates) == (1,)
    assert denoise.failed_axes([8, 8], candidates) == (0, 1) and denoise.failed_axes([9, 9], candidates) == ()


def test_a_third_objective_counts():
    candidates = [[7, 6, 5], [8, 5, 7], [6, 8, 6], [7, 7, 4]]
    assert reason(scored_row("a", candidates, [9, 9, 8])) is None
    assert reason(scored_row("a", candidates, [9, 9, 7])) == "inconsistent"
    assert denoise.failed_axes([8, 9, 7], candidates) == (0, 2)
    flat = [[*pair, 5] for pair in ([7, 6], [8, 5], [6, 8], [7, 7])]  # the third never varies
    assert reason(scored_row("a", flat, [9, 9, 9])) == "det_zero"


def test_informativeness_bounds():
    value = det([[1, 1], [1, 5], [5, 1]])
    assert value == float(Fraction(32 * 32 - 16 * 16, 81))  # Σa² = Σb² = 27, Σa = Σb = 7, Σab = 11
    row = scored_row("a", [[1, 1], [1, 5], [5, 1]], [9, 9])
    assert reason(row, rho=value) is None, "the upper bound belongs to the range"
    assert reason(row, rho=value * (1 - 1e-12)) == "det_above_rho"
    assert reason(row, det_min=value, rho=99) == "det_zero", "the lower bound does not"
    assert reason(scored_row("a", [[5, 5]] * 3, [9, 9])) == "det_zero"
    assert reason(scored_row("a", [[5, 5]] * 3, [9, 9]), informativeness=False) is None
    assert reason(scored_row("a", [[5, 5]] * 3, [9, 7]), cov_scope="all") == "det_zero"  # still a line
    assert reason(scored_row("a", [[5, 5], [5, 6], [5, 7]], [9, 9]), cov_scope="all") is None


def test_unscored_comes_first_and_null_candidates_do_not_count():
    assert reason(scored_row("a", [None, None, None], [9, 9]), consistency="off") == "unscored"
    assert reason(scored_row("a", [[1, 1], [2, 3], [4, 4]], None), consistency="off") == "unscored"
    with_null = scored_row("a", [[7, 6], None, [8, 5], [6, 8]], [9, 9])
    assert judge(with_null) == (None, 1 / 27, ())


def test_responses_without_text_take_no_part():
    """FAULTS 15: the judge gave an empty response [10, 1]."""
    texts = ["a", "b", " \n", "c", ""]
    row = scored_row("a", [[7, 6], [8, 5], [10, 1], [6, 8], [1, 10]], [9, 9], texts)
    assert judge(row) == (None, 1 / 27, ())
    row["refined"]["text"] = "\t"
    assert reason(row) == "unscored"
    assert reason(scored_row("a", [[1, 1], [2, 2]], [9, 9], ["", " "])) == "unscored"


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


def make_record(folder, number: str, **arguments):
    """A record as stage `number` leaves it, so that the stages behind know how its rows were made."""
    arguments = {"objectives": ["harmlessness", "helpfulness"], "score_mode": "constrained"} | arguments
    record = {"stage": number, "args": arguments, "earlier": {}, "complete": True}
    (folder / f"{number}_args.json").write_text(json.dumps(record))


def test_it_writes_what_it_promises(tmp_path, call):
    write_rows(tmp_path / "03_refined.jsonl", MIXED)
    code, out, err = call("04_denoise", "--run_dir", tmp_path, "--rho", 10)
    assert code == 0, err
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


def test_the_report_shows_which_axis_failed(tmp_path, call):
    candidates = [[7, 6], [8, 5], [6, 8]]
    refined = [[9, 9]] * 2 + [[8, 9]] * 3 + [[9, 8]] * 4 + [[8, 8]] * 5
    rows = [scored_row(str(i), candidates, scores) for i, scores in enumerate(refined)]
    rows += [scored_row("full", [[10, 6], [8, 5], [6, 8]], [10, 9])]
    rows += [scored_row("blank", candidates, [9, 9], ["a", "b", ""])]
    write_rows(tmp_path / "03_refined.jsonl", rows)
    make_record(tmp_path, "03", objectives=["honesty", "helpfulness"])
    code, out, err = call("04_denoise", "--run_dir", tmp_path)
    assert code == 0, err
    assert "on just … Honesty and Helpfulness: 5, Honesty: 4, Helpfulness: 4\n" in out
    assert "each filter alone drops: consistency 13, informativeness 1\n" in out  # two points are on a line
    assert re.search(r"a candidate is at 10, .*: 1; responses without text, .*: 1\n", out)


@pytest.mark.parametrize(("count", "median"), [(3, "3"), (4, "2.167")])
def test_the_median_of_dets(tmp_path, call, count, median):
    """FAULTS 31. Scores (1, 1), (1, 1 + b), (1 + a, 1) have det Σ = (2a² 2b² − a² b²) / 81 = (ab)² / 27."""
    sizes = [(3, 1), (3, 3), (9, 1), (6, 1)][:count]  # 1/3, 3, 3 and 4/3
    rows = [scored_row(f"{a}, {b}", [[1, 1], [1, 1 + b], [1 + a, 1]], [10, 10]) for a, b in sizes]
    write_rows(tmp_path / "03_refined.jsonl", rows)
    code, out, _ = call("04_denoise", "--run_dir", tmp_path, "--consistency", "off")
    assert code == 0 and f"min 0.3333, median {median}, max 3\n" in out


def test_three_objectives_through_the_stage(tmp_path, call):
    scores = [[1, 1, 1], [2, 1, 1], [1, 2, 1], [1, 1, 2]]
    rows = [scored_row("kept", scores, [3, 3, 3]), scored_row("third", scores, [3, 3, 2])]
    write_rows(tmp_path / "03_refined.jsonl", rows)
    make_record(tmp_path, "03", objectives=["harmlessness", "honesty", "helpfulness"])
    code, out, err = call("04_denoise", "--run_dir", tmp_path)
    assert code == 0 and "on just … Helpfulness: 1" in out, err
    assert read_rows(tmp_path / "04_denoised.jsonl") == [rows[0] | {"det": 1 / 256}]


# ------------------------------------------------------------------------------------ nothing left, refusals


FLAT = scored_row("flat", [[5, 5]] * 3, [9, 9])
WORSE = scored_row("worse", [[5, 5], [6, 7], [7, 5]], [5, 5])
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
        (MIXED[1], {"score_mode": "json"}, (), ["'unscored'", "--score_mode constrained"], "--no-"),
        (MIXED[1], {"score_mode": "expected"}, (), ["'unscored'", "null"], "--score_mode"),
        (MIXED[3], {}, (), ["'det_above_rho'", "a larger --rho"], "--consistency off"),
    ],
)  # fmt: skip
def test_emptied_by_a_filter_is_exit_code_3_with_advice(tmp_path, call, row, made, options, words, never):
    """FAULTS section 4: advice that names what was done already, or says nothing where candidates are at 10."""
    write_rows(tmp_path / "03_refined.jsonl", [row])
    make_record(tmp_path, "03", **made)
    code, out, err = call("04_denoise", "--run_dir", tmp_path, *options)
    assert code == 3 and re.search(r"prompts kept +0\n", out), err
    line = err.strip().splitlines()[-1]
    assert all(word in line for word in words) and never not in line, line
    again = call("04_denoise", "--run_dir", tmp_path, *options)
    assert again == (code, out, err), "the same command says the same again"


def test_too_few_responses_for_a_covariance(tmp_path, call):
    write_rows(tmp_path / "03_refined.jsonl", [scored_row("a", [[5, 5], [6, 4]], [9, 9])])
    code, _, err = call("04_denoise", "--run_dir", tmp_path)
    assert code == 2 and "no prompt has 3 scored responses" in err and "--n 3 or more" in err
    assert not list(tmp_path.glob("04_*")), "said before anything is begun"
    for options in (("--no-informativeness",), ("--cov_scope", "all", "--overwrite")):
        code, _, err = call("04_denoise", "--run_dir", tmp_path, *options)
        assert code == 0, err
    # three objectives need four responses
    rows = [scored_row("a", [[5, 5, 5], [6, 4, 4], [4, 7, 5]], [9, 9, 9])]
    write_rows(tmp_path / "own.jsonl", rows)
    options = ("--input", tmp_path / "own.jsonl", "--run_dir", tmp_path / "three")
    code, _, err = call("04_denoise", *options)
    assert code == 2 and "no prompt has 4 scored responses" in err and "3 objectives" in err


def test_bad_bounds(tmp_path, call):
    for options in (("--det_min", 30), ("--det_min", -1), ("--rho", 0)):
        code, _, err = call("04_denoise", "--run_dir", tmp_path, *options)
        assert code == 2 and "0 <= det_min < rho" in err


@pytest.mark.parametrize(
    ("stage", "source", "first", "other", "words"),
    [
        ("04_denoise", "03_refined.jsonl", "04_d*", ("--rho", 10), "--rho 30.0, not 10.0"),
        ("05_pairs", "04_denoised.jsonl", "05_p*", ("--delta", 3), "--delta 2.0, not 3.0"),
    ],
)
def test_a_finished_stage_is_not_done_again(tmp_path, call, stage, source, first, other, words):
    def files():
        return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.glob(first)}

    write_rows(tmp_path / source, MIXED)
    assert call(stage, "--run_dir", tmp_path)[0] == 0
    before = files()
    code, out, err = call(stage, "--run_dir", tmp_path)
    assert code == 0 and "is complete already; --overwrite redoes it" in out and files() == before, err
    code, _, err = call(stage, "--run_dir", tmp_path, *other)
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1 + ("warning" in err)
    write_rows(tmp_path / source, [FIXTURE])
    code, _, err = call(stage, "--run_dir", tmp_path)
    assert code == 2 and f"{source} is another than when {stage}.py ran" in err and files() == before
    code, _, err = call(stage, "--run_dir", tmp_path, *other, "--overwrite")
    assert code == 0 and files().keys() == before.keys() and files() != before, err


def test_a_run_branches(tmp_path, call, monkeypatch):
    """--input takes a run directory or a file, from where the user stands; the rest comes from beside it."""
    write_rows(tmp_path / "base" / "03_refined.jsonl", MIXED)
    make_record(tmp_path / "base", "03", objectives=["honesty", "helpfulness"], model="m")
    monkeypatch.chdir(tmp_path)
    code, out, err = call("04_denoise", "--input", "base", "--run_dir", "one", "--rho", 10)
    assert code == 0 and "Honesty" in out and "not found" not in err, err
    code, out, err = call("04_denoise", "--input", "base/03_refined.jsonl", "--run_dir", "two", "--rho", 10)
    assert code == 0 and "Honesty" in out, err
    one, two = ((tmp_path / run / "04_denoised.jsonl").read_bytes() for run in ("one", "two"))
    assert one == two and not list((tmp_path / "base").glob("04_*"))
    made = common.made_by(tmp_path / "one" / "04_denoised.jsonl")
    assert made["03"]["model"] == "m" and made["04"]["rho"] == 10, "stage 5 finds all that it needs there"
    code, _, err = call("04_denoise", "--input", "nowhere", "--run_dir", "three")
    assert code == 2 and "nowhere" in err and not (tmp_path / "three").exists()


def test_a_full_disk_is_one_line_and_true(tmp_path, call, monkeypatch):
    """FAULTS 34: it said "run the same command again", which was then refused."""
    write_rows(tmp_path / "03_refined.jsonl", MIXED)
    replace = os.replace

    def full(source, target):
        if "04_denoised" in str(target):
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        code, _, err = call("04_denoise", "--run_dir", tmp_path)
    assert code == 2 and "No space left on device" in err and "run the same command again" in err
    assert "Traceback" not in err and not list(tmp_path.glob(".*partial"))
    code, _, err = call("04_denoise", "--run_dir", tmp_path)
    assert code == 0 and len(read_rows(tmp_path / "04_dropped.jsonl")) == 4, err


def test_it_never_reads_what_it_writes(tmp_path, call):
    output = write_rows(tmp_path / "04_denoised.jsonl", [FIXTURE])
    before = output.read_bytes()
    code, _, err = call("04_denoise", "--input", output, "--run_dir", tmp_path, "--overwrite")
    assert code == 2 and "is what this stage writes" in err and output.read_bytes() == before


@pytest.mark.parametrize("broken", [False, True])
def test_what_is_refused_costs_nothing(tmp_path, call, broken):
    """A predecessor that has not finished, or a bad last row: the old output stays, even with --overwrite."""
    source = write_rows(tmp_path / "03_refined.jsonl", MIXED)
    make_record(tmp_path, "03")
    assert call("04_denoise", "--run_dir", tmp_path)[0] == 0
    before = (tmp_path / "04_denoised.jsonl").read_bytes()
    record = json.loads((tmp_path / "03_args.json").read_text())
    (tmp_path / "03_args.json").write_text(json.dumps(record | {"complete": broken}))
    source.write_text(source.read_text() + "{" * broken)
    code, _, err = call("04_denoise", "--run_dir", tmp_path, "--overwrite")
    assert code == 2 and ("line 6: broken JSON" if broken else "has not finished") in err
    assert (tmp_path / "04_denoised.jsonl").read_bytes() == before


# ------------------------------------------------------------------------------------ kills and large files


KILLS = """
import importlib, json, os, shutil, signal, sys
root, stage, start, work, output, arguments = json.loads(sys.argv[1])
sys.path.insert(0, root)
import common
module = importlib.import_module(stage)


def run(run_dir, kill_at=0):
    # exit code of the stage; killed before its kill_at-th file event in the run directory
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen, events = [0], ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")

    def hook(event, details):
        if event in events and any(str(detail).startswith(run_dir) for detail in details[:2]):
            seen[0] += 1
            if seen[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.argv = [stage + ".py", "--run_dir", run_dir, *arguments]
    os.dup2(os.open(work + "/printed", os.O_CREAT | os.O_APPEND | os.O_WRONLY), 1)
    os.dup2(1, 2)
    if kill_at:
        sys.addaudithook(hook)
    code = 0
    try:
        common.run_stage(module.main, module.Args)
    except SystemExit as stop:
        code = stop.code or 0
    os._exit(code)


def state(run_dir):
    # the files, and whether the next stage would take the output
    names = sorted(name for name in os.listdir(run_dir) if "args" not in name)
    files = {name: open(f"{run_dir}/{name}").read() for name in names}
    try:
        return files, bool(common.made_by(common.Path(run_dir) / output))
    except common.UserError:
        return files, False


results = []
while not results or results[-1][0] != 0:
    run_dir = f"{work}/{len(results)}"
    shutil.copytree(start, run_dir)
    results.append([run(run_dir, len(results) + 1), *state(run_dir), run(run_dir), *state(run_dir)])
print(json.dumps(results))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("stage", "source", "output", "option"),
    [
        ("04_denoise", "03_refined", "04_denoised", ("--rho", "200")),
        ("05_pairs", "04_denoised", "05_pairs", ("--delta", "4")),
    ],
)
def test_killed_at_every_file_event(tmp_path, call, stage, source, output, option, finished):
    """FAULTS 32 and 33: afterwards the same command gives the same bytes, and nothing half done passes."""
    start, work, old, output = tmp_path / "start", tmp_path / "work", None, f"{output}.jsonl"
    work.mkdir()
    write_rows(start / f"{source}.jsonl", MIXED)
    if finished:
        assert call(stage, "--run_dir", start)[0] == 0
        old = (start / output).read_text()
    task = [str(ROOT), stage, str(start), str(work), output, [*option, *["--overwrite"] * finished]]
    done = subprocess.run([sys.executable, "-c", KILLS, json.dumps(task)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # (first exit code, the files then, does the output count as complete; the same of the second call); the last call
    # was not killed at all
    *results, (code, whole, *_) = json.loads(done.stdout)
    assert code == 0 and len(results) > 4 and '"f"' in whole[output]
    for killed, after, usable, code, files, usable_again in results:
        assert killed == -9 and code == 0 and usable_again and files == whole
        if usable and output in after and after != whole:
            assert after[output] == old, "complete only with the rows that its record tells of"
    assert sum(not usable for _, _, usable, *_ in results) >= 3, "killed in between, the next stage refuses it"


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
    for count in (5_000, 20_000):
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
    grown = (kilobytes[1] - kilobytes[0]) * 1024 / 15_000
    assert grown < 500, f"{grown:.0f} bytes a prompt of 3,500"
    assert seconds[1] < 10 * seconds[0], seconds  # a quadratic one takes 16 times as long


def test_weak_consistency_wants_one_axis_above_and_none_below():
    for refined, weak in (([9, 6], ()), ([8, 7], ()), ([8, 6], (0, 1)), ([9, 5], (1,)), ([7, 5], (0, 1))):
        assert denoise.failed_axes(refined, [[8, 5], [3, 6]], weak=True) == weak, refined
    assert denoise.failed_axes([9, 6], [[8, 5], [3, 6]]) == (1,), "the paper's is strict"


def test_a_draw_of_what_passes_the_filters(tmp_path, call):
    """--max_prompts keeps so many of those that pass, the others are dropped by name; a larger draw keeps a smaller."""
    rows = [scored_row(f"p{i}", MIXED_CANDIDATES, [9, 9]) for i in range(12)]
    write_rows(tmp_path / "03_refined.jsonl", [*rows, scored_row("flat", [[5, 5]] * 3, [9, 9])])
    kept = {}
    for count in (3, 7, 99):
        out = tmp_path / str(count)
        code, printed, _ = call("04_denoise", "--input", tmp_path, "--run_dir", out, "--max_prompts", count)
        kept[count] = {row["id"] for row in read_rows(out / "04_denoised.jsonl")}
        reasons = [row["reason"] for row in read_rows(out / "04_dropped.jsonl")]
        assert code == 0 and len(kept[count]) == min(count, 12) and reasons.count("det_zero") == 1, printed
        assert reasons.count("not_drawn") == 12 - len(kept[count])
    assert kept[3] < kept[7] < kept[99]


MIXED_CANDIDATES = [[7, 6], [8, 5], [6, 8]]
