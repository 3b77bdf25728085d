"""eval/report.py: the numbers of the page worked out by hand, hostile text, and a real browser."""

import importlib
import itertools
import json
import re
import shutil
import types
from pathlib import Path
from xml.etree import ElementTree

import eval_helpers
import numpy as np
import pytest
import report
from conftest import run_script, scored_row, write_rows
from eval_helpers import refuse
from matplotlib.figure import Figure

import common

OBJECTIVES = ["harmlessness", "helpfulness"]
WORDS = {"harmlessness": "does no <harm>", "helpfulness": "does help"}
# by hand: det of a 1/27, b 400/3, c 0, d 16/27, e 0 (two points), f 16/27
PROMPTS = {
    "a": ([[7, 6], [8, 5], [6, 8]], [9, 9]),  # kept
    "b": ([[1, 1], [5, 9], [9, 2]], [10, 10]),  # det_above_rho
    "c": ([[5, 5], [5, 5], [5, 5]], [6, 6]),  # det_zero
    "d": ([[5, 6], [6, 5], [7, 8]], [7, 9]),  # inconsistent
    "e": ([[4, 4], None, [2, 3]], None),  # unscored
    "f": ([[2, 2], [3, 4], [4, 2]], [8, 8]),  # kept
}
FATES = {"b": "det_above_rho", "c": "det_zero", "d": "inconsistent", "e": "unscored"}
GAPS = [5, 5, 4, 0, 1, 1, 10, 9, 12, 1, 2, 3]  # δ = 2
DET = "det Σ of a prompt's candidates"
MADE_BY = {file: stage for file, (stage, _) in report.FILES.items()} | {"06_metrics.jsonl": "06_train"}


def write_record(folder: Path, stage: str, complete: bool = True, checked: dict | None = None, **arguments) -> None:
    arguments = {"model": "tiny-model"} | arguments
    if stage in ("02_score", "03_refine"):
        arguments = {"objectives": OBJECTIVES, "constitution": WORDS} | arguments
    more = {"versions": {"numpy": "9.9"}} | ({"checked": checked} if checked else {})
    eval_helpers.write_record(folder, stage, complete, args=arguments, **more)


def without(row: dict, *keys: str) -> dict:
    responses = [{k: v for k, v in response.items() if k not in keys} for response in row["responses"]]
    return {k: v for k, v in row.items() if k not in keys} | {"responses": responses}


def metrics_rows() -> list[dict]:
    rows = [{"step": 0, "train/loss": 2.5, "train/rewards/margins": -1.5, "train/rewards/accuracies": 0.25}]
    for step in range(1, 5):
        row = {"step": step, "epoch": step / 4, "loss": 3 - step / 2, "rewards/margins": step / 8 - 1}
        rows.append(row | {"rewards/accuracies": 0.5, "grad_norm": 7.0 + step, "learning_rate": 1e-5 / step})
    after = {"step": 4, "epoch": 1, "train/loss": 1.25, "train/rewards/margins": -0.5}
    return [*rows, after | {"train/rewards/accuracies": 0.75}]


def run_stage(stage: str, folder: Path, **options) -> None:
    module = importlib.import_module(stage)
    module.main(module.Args(run_dir=str(folder), **options))


def make_run(folder: Path, rows: list[dict] | None = None, upto: int = 6) -> Path:
    """The files of a run up to a stage; 04 and 05 make theirs themselves."""
    rows = rows or [scored_row(id, *scores) for id, scores in PROMPTS.items()]
    for stage, file, left_out, arguments in (
        ("01_sample", "01_samples.jsonl", ("scores", "refined"), {"n": 3, "temperature": 1.0}),
        ("02_score", "02_scores.jsonl", ("refined",), {"score_mode": "constrained"}),
        ("03_refine", "03_refined.jsonl", (), {"attempts": 4}),
    ):
        if upto >= int(stage[:2]):
            write_rows(folder / file, [without(row, *left_out) for row in rows])
            write_record(folder, stage, **arguments)
    if upto >= 4:
        run_stage("04_denoise", folder)
    if upto >= 5:
        run_stage("05_pairs", folder, delta=2.0)
    if upto >= 6:
        write_rows(folder / "06_metrics.jsonl", metrics_rows())
        write_record(folder, "06_train", loss="spa", alpha=2.0, beta=2.0, gamma_beta_ratio=0.25)
    return folder


def words_of(element) -> str:
    return "".join(element.itertext())


class Page:
    """What a page holds: it is XML but for its void tags. Sections stand by the end of their id, tables by caption."""

    def __init__(self, text: str):
        text = re.sub(r"<((?:meta|link)\b[^>]*)>", r"<\1/>", text.removeprefix("<!doctype html>"))
        self.root = ElementTree.fromstring(text.replace("<html", '<html xmlns:xlink="xlink"', 1))
        self.words = list(self.root.itertext())
        self.sections = {of.get("id", "").rpartition("-")[2]: words_of(of) for of in self.root.iter("section")}
        self.tables = {words_of(of.find("caption")): of for of in self.root.iter("table")}

    def cells(self, caption: str) -> dict[str, list[str]]:
        """Row header -> cells of the table whose caption begins so."""
        (table,) = [table for name, table in self.tables.items() if name.startswith(caption)]
        return {words_of(row[0]): [words_of(cell) for cell in row[1:]] for row in table.iter("tr")}

    def all(self, tag: str | None = None) -> list[dict]:
        return [element.attrib for element in self.root.iter(tag)]

    def labels(self) -> list[str]:
        """What those are told who can't see the figures."""
        return [attributes["aria-label"] for attributes in self.all("svg") if "aria-label" in attributes]


def page_of(folder: Path, **options) -> Page:
    output = folder.parent / f"{folder.name}.html"
    report.main(report.Args(run_dir=str(folder), output=str(output), **options))
    return Page(output.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "whole")


@pytest.fixture(scope="module")
def page(whole) -> Page:
    return page_of(whole)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers.


def test_funnel(page):
    funnel = {label: cells[:2] for label, cells in page.cells("From prompts").items() if label}
    assert funnel == {
        "prompts sampled": ["6", "100.0 %"],
        "with a scored answer": ["6", "100.0 %"],
        "refined and scored": ["5", "83.3 %"],
        "− dropped: unscored": ["1", "16.7 %"],
        "− dropped: inconsistent": ["1", "16.7 %"],
        "− dropped: det_zero": ["1", "16.7 %"],
        "− dropped: det_above_rho": ["1", "16.7 %"],
        "kept": ["2", "33.3 %"],
        "with pairs": ["2", "33.3 %"],
        "pairs": ["12", ""],
        "training steps (06)": ["4", ""],
    }
    assert "18 answers to 6 prompts, 17 of them scored." in page.sections["funnel"]
    key = page.cells("Means with")
    assert key["prompts kept"] == ["2 (33.3 %)"] and key["pairs"] == ["12"] and key["steps"] == ["4"]
    assert key["mean Helpfulness, refined"] == [exact_interval([9, 10, 6, 9, 8])] and key["mean gap"] == ["4.417"]
    assert key["loss, before → after"] == ["2.5 → 1.25 (-1.25)"] and key["training loss"] == ["spa"]
    assert key["ties among a prompt's answers"] == ["18.8 %"] and key["model"] == ["tiny-model"]
    meters = [attributes["width"] for attributes in page.all("rect") if "x" not in attributes]
    assert meters == ["100", "100", "83.33", *["16.67"] * 4, "33.33", "33.33"]


def exact_interval(values) -> str:
    """The percentile bootstrap over all N^N samples instead of some drawn ones."""
    means = [np.mean(sample) for sample in itertools.product(values, repeat=len(values))]
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{np.mean(values):.2f} [{low:.2f}, {high:.2f}]"


def test_mean_scores_and_intervals(page):
    means = page.cells("Mean score")
    assert means[""] == ["prompts", "answers scored", "Harmlessness", "Helpfulness"]
    refined = [exact_interval([9, 10, 6, 7, 8]), exact_interval([9, 10, 6, 9, 8])]
    assert means["refined"] == ["5", "5 of 6", *refined]
    # over prompts: 7, 5, 5, 6, 3, 3 and 19/3, 4, 5, 19/3, 7/2, 8/3
    assert means["candidates"][:2] == ["6", "17 of 18"]
    assert means["candidates"][2].startswith("4.83 [") and means["candidates"][3].startswith("4.64 [")
    assert means["candidates, kept prompts"] == ["2", "6 of 6", "5.00 [3.00, 7.00]", "4.50 [2.67, 6.33]"]
    gains = [exact_interval([2, 5, 1, 1, 5]), "3.53"]  # 8/3, 6, 1, 8/3, 16/3
    assert means["refined − candidates, same prompt"][:3] == ["5", "", gains[0]]
    assert means["refined − candidates, same prompt"][3].startswith(gains[1])
    ties = page.cells("Ties")
    assert ties["a prompt's candidates"] == ["18.8 %"], "3 of 3 + 3 + 3 + 3 + 1 + 3 pairs"
    assert ties["a refined answer and a candidate"] == ["0.0 %"]


def test_score_counts(page):
    counts = page.cells("Counts: Harmlessness scores")
    assert counts[""] == ["candidates", "refined"]
    columns = [[int(counts[str(k)][i]) for k in range(1, 11)] for i in (0, 1)]
    assert columns == [[1, 2, 1, 2, 5, 2, 2, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]]
    hints = [word for word in page.words if word.startswith(("candidates, 5: ", "refined, 9: "))]
    assert (hints[0], hints[-1]) == ("candidates, 5: 29.41", "refined, 9: 40"), "5 of 17, where the mouse rests"
    (label,) = [label for label in page.labels() if label.startswith("Harml")]
    assert "candidates: 1: 5.882, 2: 11.76," in label and "refined: 6: 20, 7: 20, 8: 20" in label


def test_figures_draw_the_numbers(page, whole, tmp_path, monkeypatch):
    axes = {}

    def keep(run, title, says, draw) -> dict:
        axes[title] = Figure().subplots()
        draw(axes[title])
        return {"title": title, "says": says, "drawing": ""}

    monkeypatch.setattr(report, "picture", keep)
    page_of(whole)
    bars = [bar for bar in axes["Harmlessness scores"].patches if bar.get_height()]
    assert sum(bar.get_height() for bar in bars) == pytest.approx(200), "two groups, each 100 %"
    assert "moved by up to 0.3" in page.sections["scatter"]
    assert [bar.get_height() for bar in bars if 4.5 < bar.get_x() < 5.5] == pytest.approx([500 / 17])
    bars = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_y(), bar.get_height()) for bar in axes[DET].patches]
    # 1/27 and 16/27 kept; two of 0, above 16/27 the one that was dropped, and 400/3
    expected = [(1 / 27, 0, 1), (16 / 27, 0, 1), (0.01, 0, 2), (16 / 27, 1, 1), (400 / 3, 0, 1)]
    for (left, right, *bar), (det, *wanted) in zip([bar for bar in bars if bar[3]], expected, strict=True):
        assert left < det < right and bar == wanted
    assert axes[DET].lines[0].get_xdata() == pytest.approx([30, 30])
    assert [text.get_text() for text in axes[DET].texts] == ["ρ = 30"]
    points = [line.get_xydata() for line in axes["Each answer's two scores"].lines]
    assert list(map(len, points)) == [17, 5] and len(np.unique(points[0], axis=0)) == 17, "three equal ones lie apart"
    assert np.abs(points[0] - [pair for group, _ in PROMPTS.values() for pair in group if pair]).max() <= 0.3
    steps, fixed = axes["loss"].lines
    assert steps.get_xydata().tolist() == [[1, 2.5], [2, 2], [3, 1.5], [4, 1]]
    assert fixed.get_xydata().tolist() == [[0, 2.5], [4, 1.25]]
    assert [text.get_text() for text in axes["rewards/margins"].texts] == ["γ = 0.5"]
    rows = [scored_row("p", [[2.5, 4.0], [3.5, 2.0], [3.0, 6.0]], [4.0, 8.0])]
    assert "moved by" not in page_of(make_run(tmp_path / "exact", rows, upto=3)).sections["scatter"]
    exact = axes["Each answer's two scores"].lines[0].get_xydata().tolist()
    assert exact == [[2.5, 4], [3.5, 2], [3, 6]], "only integers are moved"
    monkeypatch.setattr(report, "MOST_POINTS", 9)
    thinned = page_of(whole)
    assert "9 of the 22 points are drawn" in thinned.sections["scatter"]
    means = thinned.cells("Mean over answers")
    assert means["candidates"] == ["17", "4.94", "4.71"] and means["refined"] == ["5", "8.00", "8.40"], "of all"


def test_det(page):
    det = page.cells("det Σ")
    header = ["number", "least", "quarter", "median", "three quarters", "most", "zero", "above ρ"]
    assert det["prompts"] == header
    # kept 1/27 and 16/27; dropped 400/3, 0, 16/27, 0
    assert det["kept"] == ["2", "0.037", "0.176", "0.315", "0.454", "0.593", "0", "0"]
    assert det["dropped"] == ["4", "0", "0", "0.296", "33.8", "133", "2", "1"]
    assert det["all"] == ["6", "0", "0.00926", "0.315", "0.593", "133", "2", "1"]
    assert "0 < det Σ ≤ ρ = 30" in page.sections["det"]
    counts = page.cells("Counts: det Σ")
    assert counts[""] == ["kept", "dropped"] and counts["0"] == ["0", "2"]
    assert counts["0.0316 to 0.1"] == ["1", "0"] and counts["0.316 to 1"] == ["1", "1"]
    assert counts["100 to 316"] == ["0", "1"]
    assert sum(int(n) for cells in list(counts.values())[1:] for n in cells) == 6


def test_det_without_stage_4_and_with_its_options(tmp_path):
    folder = make_run(tmp_path / "r", upto=3)
    det = page_of(folder).cells("det Σ")
    assert det["not filtered"] == ["6", "0", "0.00926", "0.315", "0.593", "133", "2", "–"]
    run_stage("04_denoise", folder, cov_scope="all", ddof=1, rho=50.0, det_min=0.01)
    said = page_of(folder).sections["det"]
    assert "sample covariance over the candidates and the refined answer" in said
    assert "Stage 4 keeps 0.01 < det Σ ≤ ρ = 50" in said
    kept = report.read_run("r", folder).dets
    # four points of a: means 7.5, 7; Σ(a−ā)² = 5, Σ(b−b̄)² = 10, Σ(a−ā)(b−b̄) = 1
    assert kept["a"] == pytest.approx((5 * 10 - 1) / 9)
    assert kept["e"] == 0, "which stage 4 leaves without one"
    # (1, 1), (3, 1), (1, 3): variances 8/9, covariance −4/9; 9/4 of that with ddof 1
    folder = make_run(tmp_path / "u", [scored_row("u", [[1, 1], [3, 1], [1, 3]], None)], upto=3)
    assert report.read_run("u", folder).dets == {"u": pytest.approx(16 / 27)}
    write_record(folder, "04_denoise", ddof=1)
    assert report.read_run("u", folder).dets == {"u": pytest.approx(4 / 3)}


@pytest.mark.parametrize("values", [[3, 3], [0, 20], [0, 21], [0.1, 0.2, 0.30000000000000004], [5.5], [0.0, 1e6]])
def test_bins_hold_every_value(values):
    edges, labels = report.bins_of(values)
    assert len(labels) == len(edges) - 1 <= 22 and np.all(np.diff(edges) > 0)
    figure = report.bars(types.SimpleNamespace(name="r"), "t", "x", {"n": values}, "pairs")
    assert sum(n for _, n in figure["counts"]) == len(values)


def test_pairs_and_weights(page):
    pairs = page.cells("All pairs")
    assert pairs["pairs"] == ["12"] and pairs["prompts with pairs"] == ["2"]
    assert pairs["mean gap"] == ["4.417"], "53 / 12"
    assert pairs["mean margin"] == ["5.25"], "(5 + 5 + 4 + 2 + 5 + 3 + 10 + 9 + 12 + 3 + 2 + 3) / 12"
    assert pairs["gap 0 (weight 0 in SPA)"] == ["1 (8.3 %)"]
    assert pairs["the preferred answer has the lower total"] == ["3 (25.0 %)"]
    assert pairs["largest weight, α = 2"] == ["7.382"], "(12 · 12 / 53)²"
    share = sum(g**2 for g in GAPS) ** 2 / sum(g**4 for g in GAPS) / 12
    assert pairs["effective sample size (Σw)² / Σw²"] == [f"{100 * share:.1f} %"]
    gaps = {label: int(cells[0]) for label, cells in page.cells("Counts: Gaps").items() if label}
    assert gaps == {str(gap): GAPS.count(gap) for gap in range(13)}
    weights = page.cells("Counts: Weights, α = 2")
    assert sum(int(cells[0]) for label, cells in weights.items() if label) == 12
    assert report.pair_weights([0, 0], 1) == [] and report.pair_weights([], 1) == []


def test_training(page):
    fixed = page.cells("Over a fixed set of prompts")
    assert fixed["rewards/margins"] == ["-1.5 → -0.5 (+1)"] and fixed["rewards/accuracies"] == ["0.25 → 0.75 (+0.5)"]
    steps = page.cells("Metrics by step")
    assert steps["2"] == ["0.5", "2", "-0.75", "0.5", "9", "5e-06"] and len(steps) == 5
    assert "loss. steps: 2.5 at step 1, 1 at step 4. fixed prompts: 2.5 at step 0, 1.25 at step 4" in page.labels()
    for name in report.CURVES:
        assert any(label.startswith(f"{name}. ") for label in page.labels()), name


def test_setting_judge_and_its_check(page, tmp_path):
    said = page.sections["setting"]
    for words in ("tiny-model", "Judgethe model itself", "does no <harm>", "score_mode=constrained", "attempts=4"):
        assert words in said
    for words in ("rho=30.0", "delta=2.0", "alpha=2.0", "informativeness=on", "numpy 9.9"):
        assert words in said
    folder = make_run(tmp_path / "r", upto=1)
    unscored = page_of(folder)
    assert "Judgenot recorded" in unscored.sections["setting"] and unscored.cells("Means")["judge"] == ["–"]
    own = {"right": 9, "n": 20, "low": 0.3, "high": 0.65, "ties": 2, "unread": 0, "blind": ["weapons"]}
    write_record(folder, "02_score", checked={"harmlessness": own}, judge_model="large-model")
    judged = page_of(folder)
    assert "Judgelarge-model" in judged.sections["setting"] and judged.cells("Means")["judge"] == ["large-model"]
    (found,) = judged.cells("Means")["judge check"]
    assert "Harmlessness 9 of 20 in the right order (45 % [30, 65]), 2 ties, blind to: weapons" in found
    assert "Helpfulness: no probes" in found and "must not be trained on" in found
    assert page.cells("Means")["judge check"] == ["–"] and page.cells("Means")["scores"] == ["constrained"]
    eval_helpers.write_record(folder, "02_score", args={"score_mode": "constrained"}, scores_read="json")
    assert page_of(folder).cells("Means")["scores"] == ["json"], "as they were read, whatever was asked for"


def test_prompts_in_full(page):
    shown = page.sections["prompts"]
    for id, fate in FATES.items():
        assert f"{id} dropped: {fate}" in shown
    assert "the candidates' scores hardly vary" in shown and "it passed every filter; det Σ 0.037" in shown
    assert "a kept" in shown and "question f" in shown and "d answer 2" in shown
    assert "no score" in shown and "Harmlessness 7, Helpfulness 6" in shown
    pairs = page.cells("Pairs of a")
    assert pairs["refined > answer 2"] == ["5", "5", "1.282"], "(5 · 12 / 53)²"
    assert pairs["answer 2 > answer 1"] == ["2", "0", "0"]
    assert "Pairs of b" not in page.tables and shown.count("No pair.") == 4


# ---------------------------------------------------------------------------------------------------------------------
# Runs that stopped, several runs, options.


@pytest.mark.parametrize("upto", range(1, 7))
def test_a_run_may_have_stopped_after_any_stage(tmp_path, upto, capsys):
    page = page_of(make_run(tmp_path / "r", upto=upto))
    first = {"scores": 2, "scatter": 2, "det": 2, "pairs": 5, "training": 6, "prompts": 1, "funnel": 1}
    for section, stage in first.items():
        assert ("Nothing to show" in page.sections[section]) == (upto < stage), section
    printed = capsys.readouterr().out
    for file, stage in MADE_BY.items():
        missing = int(file[:2]) > upto
        assert (f"{file} is not there ({stage}.py)" in page.sections["funnel"]) == missing
        assert (f"missing: {file} is not there" in printed) == missing
    assert "wrote" in printed.splitlines()[-1]


def test_unfinished_stages_are_left_out_and_named(tmp_path):
    folder = make_run(tmp_path / "r", upto=3)
    write_record(folder, "03_refine", complete=False)
    with open(folder / "03_refined.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "half')
    write_record(folder, "06_train", complete=False, loss="spa", alpha=1.0)
    rows = "".join(json.dumps(row) + "\n" for row in metrics_rows()[:3]) + '{"step": 3, "lo'
    (folder / "06_metrics.jsonl").write_text(rows, encoding="utf-8")
    page = page_of(folder)
    assert "03_refine.py has not finished" in page.sections["funnel"]
    assert "refined and scored" not in page.cells("From prompts")
    assert list(page.cells("Mean over answers")) == ["", "candidates"]
    assert page.cells("Over a fixed set")["steps"] == ["2, not finished"]
    assert page.cells("Over a fixed set")["loss"] == page.cells("Means with")["loss, before → after"] == ["2.5 → –"]


def test_stages_that_were_not_redone_with_those_before_them_are_left_out(tmp_path, whole):
    folder = Path(shutil.copytree(whole, tmp_path / "r"))
    eval_helpers.write_record(folder, "03_refine", inputs={"source": common.digest(folder / "02_scores.jsonl")})
    assert report.read_run("r", folder).missing == {}
    (folder / "02_scores.jsonl").write_text((folder / "02_scores.jsonl").read_text().replace("answer", "word"))
    page = page_of(folder)
    for stage in ("03_refine", "04_denoise", "05_pairs"):
        assert f"02_score.py was redone, {stage}.py not yet" in page.sections["funnel"]
    assert "a word 1" in page.sections["prompts"] and "pairs" not in page.cells("From prompts")
    write_record(folder, "04_denoise", input=str(whole))
    assert list(report.read_run("r", folder).missing) == ["03_refined.jsonl"], "04 has read another folder's"


def test_trainings_of_one_run_side_by_side(tmp_path):
    """FAULTS 25: 06_a stands before 06 in the alphabet, and is not what the page is about."""
    folder = make_run(tmp_path / "r")
    rows = [{name: 9.0 if name == "train/loss" else value for name, value in row.items()} for row in metrics_rows()]
    write_rows(folder / "06_a_metrics.jsonl", rows[:3])
    record = {"loss": "simpo", "alpha": 3.0, "beta": 7.0}
    (folder / "06_a_args.json").write_text(json.dumps({"stage": "06_train", "args": record, "complete": True}))
    rows = [{name.replace("train/", "eval/"): value for name, value in row.items()} for row in metrics_rows()]
    write_rows(folder / "06_sft_metrics.jsonl", [row for row in rows if "rewards/margins" not in row])
    page = page_of(folder)
    key = page.cells("Means with")
    assert key["training loss"] == ["spa"] and key["loss, before → after"] == ["2.5 → 1.25 (-1.25)"]
    assert key["training loss (06_a)"] == ["simpo"] and key["steps (06_a)"] == ["2"] and key["steps"] == ["4"]
    assert "06_train.py (06_a)" in page.sections["setting"] and "beta=7.0" in page.sections["setting"]
    fixed = page.cells("Over a fixed set")
    assert fixed[""] == ["06", "06_a", "06_sft"] and fixed["steps"] == ["4", "2", "0"]
    assert fixed["training loss"] == ["spa", "simpo", "–"] and fixed["beta"] == ["2.0", "7.0", "–"]
    assert fixed["loss"] == ["2.5 → 1.25 (-1.25)", "9 → –", "2.5 → 1.25 (-1.25)"]
    assert fixed["measured over"] == ["training prompts", "training prompts", "held-out prompts"]
    args = (folder / "06_args.json").read_text(encoding="utf-8")
    (folder / "06_sft_args.json").write_text(args.replace('"spa"', '"sft"'), encoding="utf-8")
    for stem in ("06_args.json", "06_metrics.jsonl"):  # as recipes/systems.sh leaves them
        (folder / stem).unlink()
    assert report.read_run("r", folder).alpha == 3 and "α is not known" not in page_of(folder).sections["pairs"]
    (folder / "06_sft_args.json").write_text(args, encoding="utf-8")
    assert report.read_run("r", folder).alpha == 2, "the one that weights its pairs"
    (label,) = [label for label in page.labels() if label.startswith("loss. ")]
    assert "06, steps: 2.5 at step 1" in label and "06_a, steps" in label and "06_sft, fixed prompts" in label


def test_three_objectives_and_prompts_of_several_turns(tmp_path):
    rows = [
        scored_row(f"p{i}", [[2, 5, 3], [4, 1 + i, 2], [3, 2, 6], [5, 5, 1]], [8, 9, 7])
        | {"prompt": [{"role": "user", "content": "first"}, {"role": "assistant", "content": "so?"}, ask]}
        for i, ask in enumerate([{"role": "user", "content": "and then"}, {"role": "user", "content": "go on"}])
    ]
    folder = make_run(tmp_path / "r", rows, upto=3)
    for stage in ("02_score", "03_refine"):
        write_record(folder, stage, objectives=["honesty", *OBJECTIVES])
    run_stage("04_denoise", folder)
    run_stage("05_pairs", folder)
    page = page_of(folder)
    assert page.cells("Mean score")[""][2:] == ["Honesty", "Harmlessness", "Helpfulness"]
    assert page.cells("Mean score")["refined"][2:] == ["8.00 [8.00, 8.00]", "9.00 [9.00, 9.00]", "7.00 [7.00, 7.00]"]
    assert page.cells("Mean over answers")["refined"][1:] == ["8.00", "9.00"]
    assert "Of 3 objectives the first two are shown" in page.sections["scatter"]
    assert "User: first" in page.sections["prompts"] and "User: go on" in page.sections["prompts"]
    assert "Honesty 2, Harmlessness 5, Helpfulness 3" in page.sections["prompts"]
    assert page.cells("From prompts")["kept"][0] == "2"


def test_nothing_kept_no_pair_and_rows_of_other_makers(tmp_path):
    folder = make_run(tmp_path / "r", upto=3)
    with pytest.raises(common.EmptyResult):
        run_stage("04_denoise", folder, rho=0.001)
    write_rows(folder / "05_pairs.jsonl", [])
    page = page_of(folder)
    assert page.cells("From prompts")["kept"][:2] == ["0", "0.0 %"]
    assert page.cells("From prompts")["− dropped: det_above_rho"][0] == "3"
    assert "Nothing to show: no row has what is needed" in page.sections["pairs"]
    write_rows(tmp_path / "own" / "02_scores.jsonl", [scored_row("p", [[1, 2]], None) | {"id": 7}])
    page = page_of(tmp_path / "own")
    assert "Not there, so their stages' arguments are not known: 01_args.json" in page.sections["setting"]
    assert page.cells("Mean score")[""][2:] == ["objective 1", "objective 2"]
    assert page.cells("Mean score")["candidates"] == ["1", "1 of 1", "1.00 [–, –]", "2.00 [–, –]"]


def test_several_runs_side_by_side_and_the_same_bytes_again(tmp_path, whole):
    half, output = make_run(tmp_path / "half", upto=4), tmp_path / "new" / "both.html"
    done = run_script("eval/report.py", "--runs", f"SPA={whole}", half, "--output", output)
    assert done.returncode == 0, done.stderr
    page = Page(output.read_text(encoding="utf-8"))
    key = page.cells("Means with")
    assert key[""] == ["SPA", "half"]
    assert key["pairs"] == ["12", "–"] and key["prompts kept"] == ["2 (33.3 %)", "2 (33.3 %)"]
    ids = [attributes["id"] for attributes in page.all() if "id" in attributes]
    sections = {f"#{attributes['id']}" for attributes in page.all("section")}
    assert len(ids) == len(set(ids)) and sections == {link["href"] for link in page.all("a")}
    assert "SPA: 6 prompts, 2 kept, 12 pairs, 4 training steps (06)" in done.stdout
    assert f"wrote {output}" in done.stdout
    copy = shutil.copytree(half, tmp_path / "elsewhere" / "half")
    for folder in (half, copy):
        assert run_script("eval/report.py", "--run_dir", folder).returncode == 0
    text = (copy / "report.html").read_text(encoding="utf-8")
    assert (half / "report.html").read_text(encoding="utf-8") == text and str(tmp_path) not in text


def test_prompts_are_drawn_by_seed_or_chosen_and_then_whole(whole, tmp_path):
    def drawn(**options) -> list[str]:
        words = page_of(whole, **options).sections["prompts"]
        return [id for id in PROMPTS if f"question {id}" in words]

    assert len(drawn(prompts=2)) == 2 and drawn(prompts=0) == [] and drawn(prompts=99) == list(PROMPTS)
    assert set(drawn(prompts=2)) <= set(drawn(prompts=3)), "a larger number keeps the smaller draw"
    assert len({tuple(drawn(prompts=2, seed=seed)) for seed in range(5)}) > 1
    long = "many words " * 60
    rows = [scored_row(id, [[1, 2], [2, 1]], [3, 3], [f"{id} {long}", "b"]) for id in ("x", "y", "z")]
    shown = page_of(folder := make_run(tmp_path / "r", rows, upto=3), ids=["z", "x"]).sections["prompts"]
    assert "2 of 3 prompts" in shown and "chosen by --ids" in shown
    assert shown.index("question z") < shown.index("question x") and "question y" not in shown
    assert "characters)" not in shown and f"z {long}" in shown, "nothing is folded"
    assert "characters)" in page_of(folder).sections["prompts"]
    for seed in (-1, 10**30):  # numpy takes neither
        assert page_of(whole, seed=seed).sections["funnel"]


def test_answers_after_training(tmp_path, whole):
    scores = {"base": [[4, 5], [6, 5], None], "trained": [[6, 5], [7, 8], [9, 9]]}
    for name, of in scores.items():
        rows = [scored_row(f"t{i}", [one], None, [f"{name} says {i} <b>"]) for i, one in enumerate(of)]
        write_rows(tmp_path / name / "02_scores.jsonl", rows)
        write_record(tmp_path / name, "02_score")
    tests = [f"{name}={tmp_path / name}" for name in scores]
    page = page_of(whole, test_runs=tests)
    means = page.cells("Test prompts: mean score")
    assert means[""] == ["prompts", "Harmlessness", "Helpfulness"]
    assert means["base"] == ["2", "5.00 [4.00, 6.00]", "5.00 [5.00, 5.00]"]
    assert means["trained"][0] == "3" and means["trained"][1].startswith("7.33 [")
    assert means["trained − base"] == ["2", "1.50 [1.00, 2.00]", "1.50 [0.00, 3.00]"]
    said = page.sections["tests"]
    assert "question t0" in said and "base Harmlessness 4, Helpfulness 5" in said and "base no score" in said
    assert "trained says 2 <b>" in said and "#tests" in [link["href"] for link in page.all("a")]
    assert "not alike" not in said
    write_record(tmp_path / "base", "02_score", judge_model="large")
    said = page_of(whole, test_runs=tests, ids=["t2"]).sections["tests"]
    assert "question t2" in said and "question t0" not in said
    assert "not alike: several judges (base: large, trained: tiny-model)" in said


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: shutil.rmtree(f), "no run directory"),
        (lambda f: [p.unlink() for p in f.iterdir()], "has no file of any stage; run 01_sample.py"),
        (lambda f: (f / "02_scores.jsonl").write_text("{"), "02_scores.jsonl, line 1: broken JSON"),
        (lambda f: (f / "05_pairs.jsonl").write_text('{"id": 1}\n'), "05_pairs.jsonl, line 1: a pair has chosen, gap"),
        (lambda f: (f / "06_metrics.jsonl").write_text("[]\n"), "line 1: a row of metrics with a 'step'"),
        (lambda f: (f / "02_args.json").write_text("[]"), "02_args.json is no record of a stage"),
        (lambda f: (f / "04_dropped.jsonl").write_text('{"id": 1}\n'), "line 1: no 'prompt' in the row"),
    ],
)
def test_bad_input_is_one_line(tmp_path, call, whole, change, words):
    change(Path(shutil.copytree(whole, tmp_path / "r")))
    refuse(call, "report", words, "--run_dir", tmp_path / "r", "--output", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_bad_options_are_one_line(whole, tmp_path, call):
    for words, *options in (
        ("'A' twice", "--runs", f"A={whole}", f"A={whole}"),
        ("at least 0", "--run_dir", whole, "--prompts", -1),
        ("is a folder", "--run_dir", whole, "--output", tmp_path),
        ("no prompt has the id 'nobody'", "--run_dir", whole, "--ids", "a", "nobody"),
        ("02_scores.jsonl not found", "--run_dir", whole, "--test_runs", f"none={tmp_path}"),
    ):
        refuse(call, "report", words, *options)


# ---------------------------------------------------------------------------------------------------------------------
# Text is text.

HOSTILE = (
    "</script><script>pwned=1</script>",
    '"><img src=x onerror="pwned=1">',
    "]]><svg onload=pwned=1>",
    "</div></main></style><style>*{display:none}</style>",
    "&lt;b&gt; &amp;amp; <b>bold</b> {braces} %s",
    "\x00\x07\x1b[31m\x7f\x9b red",
    "\u202eright to left\u2066",
    "w" * 3000,
    "javascript:pwned=1 http://evil.example/x",
    " ",
)


def hostile_run(folder: Path) -> Path:
    rows = []
    for i, words in enumerate(HOSTILE):
        row = scored_row(f"{words}{i}", [[2, 2], [3, 4], [4, 2]], [8, 8], [f"{words} {j}" for j in range(3)])
        row["refined"]["text"] = f"{words} refined " + "long " * 80
        rows.append(row | {"prompt": f"{words} prompt"})
    make_run(folder, rows)
    write_record(folder, "01_sample", model=HOSTILE[1], n=HOSTILE[0])
    objectives = {"objectives": [HOSTILE[1], HOSTILE[2]], "judge_model": HOSTILE[3]}
    write_record(folder, "03_refine", **objectives, constitution={HOSTILE[1]: HOSTILE[0], HOSTILE[2]: HOSTILE[3]})
    write_record(folder, "06_train", loss=HOSTILE[2])
    write_rows(folder / f"06{HOSTILE[8].replace('/', '')}_metrics.jsonl", metrics_rows())
    dropped = [scored_row("odd", [[1, 1]], None) | {"reason": HOSTILE[0]}]
    write_rows(folder / "04_dropped.jsonl", dropped)
    return folder


def check_inert(text: str) -> Page:
    """Nothing in the page can run or load, whatever the texts are."""
    page = Page(text)
    for element in page.root.iter():
        for name, value in element.items():
            assert not name.startswith("on") and name not in ("style", "src", "srcdoc"), (element.tag, name)
            assert "url(" not in value or value.startswith("url(#")
            assert not name.endswith("href") or value.startswith("#") or (element.tag, value) == ("link", "data:,")
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert policy.endswith("='; img-src data:; base-uri 'none'; form-action 'none'"), "and nothing else"
    return page


@pytest.fixture(scope="module")
def pages(whole, tmp_path_factory) -> dict[str, Path]:
    """Files with two runs each: of plain texts, and of hostile ones under hostile names."""
    made, folder = {}, tmp_path_factory.mktemp("pages")
    for kind, run, name in (("plain", whole, "one"), ("hostile", hostile_run(folder / "h"), HOSTILE[1])):
        made[kind] = folder / f"{kind}.html"
        runs, tests = [f"{name}={run}", f"{'very' * 30}long={run}"], [f"{name}={run}"]
        report.main(report.Args(runs=runs, test_runs=tests, output=str(made[kind]), prompts=20))
    return made


def test_hostile_texts_are_shown_as_text(pages):
    text = pages["hostile"].read_text(encoding="utf-8")
    page = check_inert(text)
    words = "".join(page.words)
    for i, hostile in enumerate(HOSTILE):
        if i != 5:
            assert f"{hostile} 0" in words and f"{hostile} prompt" in words
    assert "␀␇␛[31m␡\ufffd red 0" in words, "control characters are made visible"
    assert not any(ord(c) < 32 and c != "\n" for c in text) and "\x7f" not in text
    assert page.cells("Means with")[""][0] == HOSTILE[1]
    assert f"− dropped: {HOSTILE[0]}" in page.cells("From prompts")
    plain = pages["plain"].read_text(encoding="utf-8")
    own = {"bdi"} | {element.tag for element in check_inert(plain).root.iter()}  # which begins what is folded
    assert {element.tag for element in page.root.iter()} <= own, "no text makes an element"
    assert not [word for word in ("http://", "https://", "@import", "<script") if word in plain], "no other address"


def test_page_is_made_for_phones_and_screen_readers(page):
    assert any(a.get("name") == "viewport" and "width=device-width" in a["content"] for a in page.all("meta"))
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
    levels = [int(of.tag[1]) for of in page.root.iter() if of.tag in ("h1", "h2", "h3", "h4", "h5")]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), "no level is left out"
    for figure in page.all("svg"):
        assert figure.get("aria-hidden") == "true" or (figure["role"] == "img" and len(figure["aria-label"]) > 20)
    for box in page.all("div"):
        assert box.get("class") != "scroll" or (box["tabindex"] == "0" and box["aria-label"])


# ---------------------------------------------------------------------------------------------------------------------
# In a real browser.

CONTRAST = """
const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const luminance = colour => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(v => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ratio = (a, b) => {
  const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05);
};
const ground = e => {
  const colour = getComputedStyle(e).backgroundColor;
  return /, 0\\)$/.test(colour) ? ground(e.parentElement) : colour;
};
const least = (selector, key) => Math.min(
  ...[...document.querySelectorAll(selector)].map(e => ratio(getComputedStyle(e)[key], ground(e))));
return {
  words: least('p, h1, h2, h3, dd, dt, td, th, a, li, summary, .text, figcaption, .badge', 'color'),
  axes: least('svg text', 'fill'),
  shapes: Math.min(least('figure [fill="#0072b2"], figure [fill="#d55e00"], .meter rect', 'fill'),
    least('figure [stroke="#0072b2"], figure [stroke="#d55e00"]', 'stroke')),
  ground: luminance(getComputedStyle(document.body).backgroundColor)
};
"""


@pytest.mark.parametrize("kind", ["plain", "hostile"])
def test_in_a_browser(chromium, pages, kind):
    path = pages[kind]
    for width, scheme in ((390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")):
        chromium.open(path, width, scheme)
        chromium.script("document.querySelectorAll('details').forEach(d => d.open = true)")
        wide = chromium.script("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide == [width, width] or wide[0] <= wide[1] == width, "the page does not scroll sideways"
        assert chromium.script("return typeof pwned") == "undefined"
        contrast = chromium.script(CONTRAST)
        assert min(contrast["words"], contrast["axes"]) >= 4.5 and contrast["shapes"] >= 3, (scheme, contrast)
        assert (contrast["ground"] < 0.05) == (scheme == "dark")
    loaded = chromium.script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert chromium.messages() == [], "no message on the console"
    # the style sheet is let in by its hash, and charts keep legible letters on a phone
    chromium.open(path, 390)
    sizes = "const s = document.querySelector('figure > svg'); return s.getBoundingClientRect().width / 360 * 11"
    assert chromium.script(sizes) > 9.5
    assert chromium.script("return getComputedStyle(document.querySelector('.scroll')).overflowX") == "auto"
