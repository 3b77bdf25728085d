"""eval/report.py: the numbers of the page worked out by hand, hostile text, and a real browser."""

import importlib
import itertools
import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import report
from conftest import browser_or_skip, run_script, scored_row, write_rows

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
MADE_BY = {
    "01_samples.jsonl": "01_sample",
    "02_scores.jsonl": "02_score",
    "03_refined.jsonl": "03_refine",
    "04_denoised.jsonl": "04_denoise",
    "04_dropped.jsonl": "04_denoise",
    "05_pairs.jsonl": "05_pairs",
    "06_metrics.jsonl": "06_train",
}


def write_record(folder: Path, stage: str, complete: bool = True, **arguments) -> None:
    arguments = {"model": "tiny-model"} | arguments
    if stage in ("02_score", "03_refine"):
        arguments = {"objectives": OBJECTIVES, "constitution": WORDS} | arguments
    record = {"stage": stage, "args": arguments, "earlier": {}, "versions": {"numpy": "9.9"}, "complete": complete}
    (folder / f"{stage[:2]}_args.json").write_text(json.dumps(record), encoding="utf-8")


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


def make_run(folder: Path, rows: list[dict] | None = None, upto: int = 6, delta: float = 2.0) -> Path:
    """The files of a run up to a stage; 04 and 05 make theirs themselves."""
    rows = rows or [scored_row(id, *scores) for id, scores in PROMPTS.items()]
    write_rows(folder / "01_samples.jsonl", [without(row, "scores", "refined") for row in rows])
    write_record(folder, "01_sample", model="tiny-model", n=3, temperature=1.0)
    if upto >= 2:
        write_rows(folder / "02_scores.jsonl", [without(row, "refined") for row in rows])
        write_record(folder, "02_score", score_mode="constrained")
    if upto >= 3:
        write_rows(folder / "03_refined.jsonl", rows)
        write_record(folder, "03_refine", attempts=4)
    for stage, options in (("04_denoise", {}), ("05_pairs", {"delta": delta})):
        if upto >= int(stage[:2]):
            module = importlib.import_module(stage)
            module.main(module.Args(run_dir=str(folder), **options))
    if upto >= 6:
        write_rows(folder / "06_metrics.jsonl", metrics_rows())
        write_record(folder, "06_train", loss="spa", alpha=2.0, beta=2.0, gamma_beta_ratio=0.25)
    return folder


class Page(HTMLParser):
    """Tags, tables by caption, sections by the end of their id, and all text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.tables, self.sections, self.words = [], [], {}, {}, []
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in ("meta", "link"):
            self.open.append((tag, attributes))
        if tag == "caption":
            self.caption = []
        if tag == "tr":
            self.row = []
        if tag in ("td", "th"):
            self.row.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag
        if tag == "caption":
            self.tables["".join(self.caption)] = self.table = []
        if tag == "tr":
            self.table.append(self.row)

    def handle_data(self, data):
        inside = [tag for tag, _ in self.open]
        if "style" in inside:
            return
        self.words.append(data)
        for tag, attributes in self.open:
            if tag == "section" and "id" in attributes:
                key = attributes["id"].partition("-")[2]
                self.sections[key] = self.sections.get(key, "") + data
        if inside and inside[-1] == "caption":
            self.caption.append(data)
        elif ("td" in inside or "th" in inside) and "title" not in inside:
            self.row[-1] += data

    def cells(self, caption: str) -> dict[str, list[str]]:
        """Row header -> cells of the table whose caption begins so."""
        (table,) = [rows for name, rows in self.tables.items() if name.startswith(caption)]
        return {row[0]: row[1:] for row in table}

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


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
    meters = [attributes["width"] for tag, attributes in page.tags if tag == "rect" and "x" not in attributes]
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
    kept = ["2", "6 of 6", "5.00 [3.00, 7.00]", "4.50 [2.67, 6.33]"]
    assert means["candidates, kept prompts"] == kept
    gains = [exact_interval([2, 5, 1, 1, 5]), "3.53"]  # 8/3, 6, 1, 8/3, 16/3
    assert means["refined − candidates, same prompt"][:3] == ["5", "", gains[0]]
    assert means["refined − candidates, same prompt"][3].startswith(gains[1])
    ties = page.cells("Ties")
    assert ties["a prompt's candidates"] == ["18.8 %"], "3 of 3 + 3 + 3 + 3 + 1 + 3 pairs"
    assert ties["a refined answer and a candidate"] == ["0.0 %"]


def test_score_counts_and_bars(page):
    counts = page.cells("Harmlessness: answers by score")
    assert counts["score"] == ["candidates", "refined"]
    columns = [[int(counts[str(k)][i]) for k in range(1, 11)] for i in (0, 1)]
    assert columns == [[1, 2, 1, 2, 5, 2, 2, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]]
    assert page.cells("Helpfulness: answers by score")["9"] == ["1", "2"]
    titles = [word for word in page.words if word.startswith(("candidates, 5: ", "refined, 9: "))]
    assert titles[0] == "candidates, 5: 29.41", "5 of 17 answers, in per cent"
    assert titles[-1] == "refined, 9: 40"
    (label,) = [a["aria-label"] for a in page.all("svg") if a.get("aria-label", "").startswith("Harml")]
    assert "candidates: 1: 5.882, 2: 11.76," in label and "refined: 6: 20, 7: 20, 8: 20" in label


def test_heights_of_bars_are_to_scale(tmp_path):
    figure = report.bar_chart("t", [(0, 1, "x"), (1, 2, "y")], {"n": [4, 1]}, "", "", [])
    bars = [box for box in Page(figure).all("rect") if box["class"] == "bar c0"]
    assert float(bars[0]["height"]) == pytest.approx(4 * float(bars[1]["height"]))
    bottoms = [float(bar["y"]) + float(bar["height"]) for bar in bars]
    assert bottoms == pytest.approx([report.HEIGHT - report.BOTTOM] * 2), "bars stand on the axis"
    figure = report.bar_chart("t", [(0, 1, "x")], {"n": [3], "m": [1]}, "", "", [], stacked=True)
    below, above = [box for box in Page(figure).all("rect") if box["width"] != "10"]
    assert float(above["y"]) + float(above["height"]) == pytest.approx(float(below["y"]))
    assert float(above["y"]) == pytest.approx(report.TOP)


def test_scatter(page, tmp_path):
    means = page.cells("Mean over answers")
    assert means["candidates"] == ["17", "4.94", "4.71"] and means["refined"] == ["5", "8.00", "8.40"]
    assert "moved by up to 0.3" in page.sections["scatter"]
    figure = next(a for a in page.all("svg") if a.get("aria-label", "").startswith("Each answer's"))
    assert "17 candidates, mean 4.94 and 4.71; 5 refined, mean 8.00 and 8.40" in figure["aria-label"]
    rows = [scored_row("p", [[2.5, 4.0], [3.5, 2.0], [3.0, 6.0]], [4.0, 8.0])]
    exact = page_of(make_run(tmp_path / "exact", rows, upto=3))
    assert "moved by" not in exact.sections["scatter"]
    circles = [a for a in exact.all("circle") if a["r"] == "2.60"]
    # from 2 to 4 over the pixels 44 to 350, and from 2 to 8 over 190 to 26
    expected = {(44 + (a - 2) / 2 * 306, 190 - (b - 2) / 6 * 164) for a, b in ((2.5, 4), (3.5, 2), (3, 6))}
    found = sorted((float(circle["cx"]), float(circle["cy"])) for circle in circles)
    assert np.allclose(found, sorted(expected), atol=0.006)


def test_jitter_stays_in_its_cell_and_is_the_same_again(page):
    circles = [a for a in page.all("circle") if a["r"] == "2.60"]
    assert len(circles) == 17
    unit = 306 / 10  # of the axis from 0.5 to 10.5
    for circle in circles:
        score = 0.5 + (float(circle["cx"]) - 44) / unit
        assert abs(score - round(score)) <= 0.301
    assert len({(circle["cx"], circle["cy"]) for circle in circles}) == 17, "three equal answers lie apart"


def test_det(page):
    det = page.cells("det Σ")
    header = ["number", "least", "quarter", "median", "three quarters", "most", "zero", "above ρ"]
    assert det["prompts"] == header
    # kept 1/27 and 16/27; dropped 400/3, 0, 16/27, 0
    assert det["kept"] == ["2", "0.037", "0.176", "0.315", "0.454", "0.593", "0", "0"]
    assert det["dropped"] == ["4", "0", "0", "0.296", "33.8", "133", "2", "1"]
    assert det["all"] == ["6", "0", "0.00926", "0.315", "0.593", "133", "2", "1"]
    assert "0 < det Σ ≤ ρ = 30" in page.sections["det"]
    counts = page.cells("Prompts by det Σ")
    assert counts["det Σ"] == ["kept", "dropped"] and counts["0"] == ["0", "2"]
    assert counts["0.0316 to 0.1"] == ["1", "0"] and counts["0.316 to 1"] == ["1", "1"]
    assert counts["100 to 316"] == ["0", "1"]
    assert sum(int(n) for cells in list(counts.values())[1:] for n in cells) == 6


def test_det_without_stage_4_and_with_its_options(tmp_path):
    folder = make_run(tmp_path / "r", upto=3)
    det = page_of(folder).cells("det Σ")
    assert det["not filtered"] == ["6", "0", "0.00926", "0.315", "0.593", "133", "2", "–"]
    stage = importlib.import_module("04_denoise")
    stage.main(stage.Args(run_dir=str(folder), cov_scope="all", ddof=1, rho=50.0, det_min=0.01))
    page = page_of(folder)
    assert "sample covariance over the candidates and the refined answer" in page.sections["det"]
    assert "Stage 4 keeps 0.01 < det Σ ≤ ρ = 50" in page.sections["det"]
    run = report.read_run("r", folder)
    kept = report.dets(run)
    # four points of a: means 7.5, 7; Σ(a−ā)² = 5, Σ(b−b̄)² = 10, Σ(a−ā)(b−b̄) = 1
    assert kept["a"] == pytest.approx((5 * 10 - 1) / 9)
    assert kept["e"] == 0, "which stage 4 leaves without one"
    # (1, 1), (3, 1), (1, 3): variances 8/9, covariance −4/9; 9/4 of that with ddof 1
    folder = make_run(tmp_path / "u", [scored_row("u", [[1, 1], [3, 1], [1, 3]], None)], upto=3)
    assert report.dets(report.read_run("u", folder)) == {"u": pytest.approx(16 / 27)}
    write_record(folder, "04_denoise", ddof=1)
    assert report.dets(report.read_run("u", folder)) == {"u": pytest.approx(4 / 3)}


def test_rho_is_drawn_where_it_belongs(page):
    chart = next(a for a in page.all("line") if a.get("class") == "rule" and a["x1"] == a["x2"])
    # bins from −2 (the bin of 0) to 2.5 in decades, over 306 pixels from 44
    assert float(chart["x1"]) == pytest.approx(44 + (math.log10(30) + 2.5) / 5 * 306, abs=0.01)
    assert "ρ = 30" in page.words


@pytest.mark.parametrize("values", [[0.0], [1e-7, 3.0], [0, 1 / 27, 10.0, 133.3], [31.622776601683793]])
def test_every_det_falls_into_its_bin(values):
    bins, ticks, place = report.det_bins(values, 30.0)
    for value in values:
        left, right, _ = bins[place(value)]
        assert value == 0 or left - 1e-9 <= math.log10(value) <= right + 1e-9
    assert ticks[0][1] == "0" and len(ticks) <= 9


@pytest.mark.parametrize(
    "values", [[0], [3, 3], [0, 20], [0, 21], [0.1, 0.2, 0.30000000000000004], [5.5], [1e-9, 1e-8], [0.0, 1e6]]
)
def test_bins_hold_every_value(values):
    bins, ticks = report.bins_of(values)
    counts = report.count_in(bins, values)
    assert sum(counts) == len(values) and len(bins) <= 22 and ticks
    assert all(left < right for left, right, _ in bins)
    assert bins[0][0] <= min(values) and bins[-1][1] >= max(values) - 1e-9


@pytest.mark.parametrize("low, high", [(0, 1), (0, 0.3), (-1.83, -0.94), (5e-7, 1e-5), (3, 3), (0, 1234)])
def test_ticks_are_round_and_inside(low, high):
    ticks = report.nice_ticks(low, high, 6)
    assert 1 <= len(ticks) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    if high > low:
        assert len(ticks) >= 2, "one tick is no scale"
        steps = np.diff(ticks)
        assert np.allclose(steps, steps[0])
        assert round(steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9), 6) in (1, 2, 5)


def test_pairs_and_weights(page):
    pairs = page.cells("All pairs")
    assert pairs["pairs"] == ["12"] and pairs["prompts with pairs"] == ["2"]
    assert pairs["mean gap"] == ["4.417"], "53 / 12"
    assert pairs["mean margin"] == ["5.25"], "(5 + 5 + 4 + 2 + 5 + 3 + 10 + 9 + 12 + 3 + 2 + 3) / 12"
    assert pairs["gap 0 (weight 0 in SPA)"] == ["1 (8.3 %)"]
    assert pairs["the preferred answer has the lower total"] == ["3 (25.0 %)"]
    assert pairs["largest weight, α = 2"] == ["7.382"], "(12 · 12 / 53)²"
    squares, fourths = sum(g**2 for g in GAPS), sum(g**4 for g in GAPS)
    share = squares**2 / fourths / 12
    assert pairs["effective sample size (Σw)² / Σw²"] == [f"{100 * share:.1f} %"]
    gaps = page.cells("Gaps")
    assert {label: int(cells[0]) for label, cells in gaps.items() if label} == {
        str(gap): GAPS.count(gap) for gap in range(13)
    }
    weights = page.cells("Weights, α = 2")
    assert sum(int(cells[0]) for label, cells in weights.items() if label) == 12


def test_weights_are_the_paper_s():
    # SPEC.md's fixture
    assert report.pair_weights([5, 5, 4, 0, 1, 1], 1) == pytest.approx([1.875, 1.875, 1.5, 0, 0.375, 0.375])
    assert report.pair_weights([0, 0], 1) == [] and report.pair_weights([], 1) == []
    assert report.effective_share([2, 2, 2]) == pytest.approx(1) and report.effective_share([1, 0]) == 0.5


def test_training(page):
    measured = page.cells("Over a fixed set of training prompts")
    assert measured["loss"] == ["2.5", "1.25", "-1.25"]
    assert measured["rewards/margins"] == ["-1.5", "-0.5", "1"]
    assert measured["rewards/accuracies"] == ["0.25", "0.75", "0.5"]
    steps = page.cells("Metrics by step")
    assert steps["2"] == ["0.5", "2", "-0.75", "0.5", "9", "5e-06"]
    assert len(steps) == 5
    labels = [a["aria-label"] for a in page.all("svg") if "aria-label" in a]
    assert "loss. steps: 2.5 at step 1, 1 at step 4. fixed prompts: 2.5 at step 0, 1.25 at step 4" in labels
    for name in report.CURVES:
        assert any(label.startswith(f"{name}. ") for label in labels), name
    assert "γ = 0.5" in page.words
    # the line of the loss falls evenly: 2.5, 2, 1.5, 1 at steps 1 to 4
    line = next(a["points"] for a in page.all("polyline"))
    points = np.array([[float(v) for v in point.split(",")] for point in line.split()])
    assert np.allclose(points[:, 0], [44 + 306 * step / 4 for step in range(1, 5)], atol=0.01)
    assert np.allclose(np.diff(points[:, 1]), points[1, 1] - points[0, 1], atol=0.02) and points[1, 1] > points[0, 1]


def test_setting(page):
    said = page.sections["setting"]
    for words in ("tiny-model", "the model itself", "does no <harm>", "score_mode=constrained", "attempts=4"):
        assert words in said
    assert "rho=30.0" in said and "delta=2.0" in said and "alpha=2.0" in said and "consistency=on" in said
    assert "numpy" in said and "9.9" in said


def test_judge(tmp_path, page):
    folder = make_run(tmp_path / "r", upto=1)
    unscored = page_of(folder)
    assert "Judgenot recorded" in unscored.sections["setting"] and unscored.cells("Means")["judge"] == ["–"]
    write_record(folder, "02_score", judge_model="large-model")
    judged = page_of(folder)
    assert "Judgelarge-model" in judged.sections["setting"] and judged.cells("Means")["judge"] == ["large-model"]
    assert "Judgethe model itself" in page.sections["setting"]


def test_prompts_in_full(page):
    shown = page.sections["prompts"]
    for id, fate in FATES.items():
        assert f"{id} dropped: {fate}" in shown and report.REASONS[fate] in shown
    assert "a kept" in shown and "question f" in shown and "d answer 2" in shown
    assert "no score" in shown and "Harmlessness 7, Helpfulness 6" in shown
    pairs = page.cells("Pairs of a")
    assert pairs["refined > answer 2"] == ["5", "5", "1.282"], "(5 · 12 / 53)²"
    assert pairs["answer 2 > answer 1"] == ["2", "0", "0"]
    assert "det Σ 0.037" in shown and "det Σ 133" in shown
    assert "Pairs of b" not in page.tables and shown.count("No pair.") == 4


def test_key_numbers(page):
    key = page.cells("Means with")
    assert key["prompts kept"] == ["2 (33.3 %)"] and key["pairs"] == ["12"] and key["steps"] == ["4"]
    assert key["mean Harmlessness, answers"][0].startswith("4.83 [")
    assert key["mean Helpfulness, refined"] == [exact_interval([9, 10, 6, 9, 8])]
    assert key["loss, before → after"] == ["2.5 → 1.25"]
    assert key["rewards/margins, before → after"] == ["-1.5 → -0.5"]
    assert key["judge"] == ["tiny-model"] and key["training loss"] == ["spa"]


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


def test_an_unfinished_stage_is_left_out_and_named(tmp_path):
    folder = make_run(tmp_path / "r", upto=3)
    write_record(folder, "03_refine", complete=False)
    with open(folder / "03_refined.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "half')
    page = page_of(folder)
    assert "03_refine.py has not finished" in page.sections["funnel"]
    assert "refined and scored" not in page.cells("From prompts")
    assert list(page.cells("Mean over answers")) == ["", "candidates"]


def test_a_training_under_way(tmp_path):
    folder = make_run(tmp_path / "r")
    write_record(folder, "06_train", complete=False, loss="spa", alpha=1.0)
    rows = "".join(json.dumps(row) + "\n" for row in metrics_rows()[:3]) + '{"step": 3, "lo'
    (folder / "06_metrics.jsonl").write_text(rows, encoding="utf-8")
    page = page_of(folder)
    assert "06: 2 steps, loss spa, not finished" in page.sections["training"]
    assert page.cells("Over a fixed set")[""] == ["before"]
    assert page.cells("Means with")["loss, before → after"] == ["–"]


def test_several_trainings_of_one_run(tmp_path):
    folder = make_run(tmp_path / "r")
    rows = [{name.replace("train/", "eval/"): value for name, value in row.items()} for row in metrics_rows()]
    write_rows(folder / "06_sft_metrics.jsonl", [row for row in rows if "rewards/margins" not in row])
    page = page_of(folder)
    assert "06_sft: 0 steps, loss not recorded" in page.sections["training"]
    assert page.cells("Over a fixed set of held-out prompts (06_sft)")["loss"] == ["2.5", "1.25", "-1.25"]


def test_the_page_s_own_training_gives_its_numbers_and_all_are_listed(tmp_path):
    """FAULTS 25: 06_a stands before 06 in the alphabet, and is not what the page is about."""
    folder = make_run(tmp_path / "r")
    rows = [{name: 9.0 if name == "train/loss" else value for name, value in row.items()} for row in metrics_rows()]
    write_rows(folder / "06_a_metrics.jsonl", rows[:3])
    record = {"stage": "06_train", "args": {"loss": "simpo", "alpha": 3.0, "beta": 7.0}, "complete": True}
    (folder / "06_a_args.json").write_text(json.dumps(record), encoding="utf-8")
    page = page_of(folder)
    key = page.cells("Means with")
    assert key["training loss"] == ["spa"] and key["loss, before → after"] == ["2.5 → 1.25"] and key["steps"] == ["4"]
    assert key["training loss (06_a)"] == ["simpo"] and key["steps (06_a)"] == ["2"]
    assert "06_train.py (06_a)" in page.sections["setting"] and "beta=7.0" in page.sections["setting"]
    assert page.sections["training"].index("06: 4 steps") < page.sections["training"].index("06_a: 2 steps")


def test_three_objectives_and_prompts_of_several_turns(tmp_path):
    rows = [
        scored_row(f"p{i}", [[2, 5, 3], [4, 1 + i, 2], [3, 2, 6], [5, 5, 1]], [8, 9, 7])
        | {"prompt": [{"role": "user", "content": "first"}, {"role": "assistant", "content": "so?"}, ask]}
        for i, ask in enumerate([{"role": "user", "content": "and then"}, {"role": "user", "content": "go on"}])
    ]
    three = {"objectives": ["honesty", *OBJECTIVES]}
    folder = make_run(tmp_path / "r", rows, upto=3)
    for stage in ("02_score", "03_refine"):
        write_record(folder, stage, **three)
    for stage in ("04_denoise", "05_pairs"):
        module = importlib.import_module(stage)
        module.main(module.Args(run_dir=str(folder)))
    page = page_of(folder)
    assert page.cells("Mean score")[""][2:] == ["Honesty", "Harmlessness", "Helpfulness"]
    assert page.cells("Mean score")["refined"][2:] == ["8.00 [8.00, 8.00]", "9.00 [9.00, 9.00]", "7.00 [7.00, 7.00]"]
    assert page.cells("Mean over answers")["refined"][1:] == ["8.00", "9.00"]
    assert "Of 3 objectives the first two are shown" in page.sections["scatter"]
    assert "User: first" in page.sections["prompts"] and "User: go on" in page.sections["prompts"]
    assert "Honesty 2, Harmlessness 5, Helpfulness 3" in page.sections["prompts"]
    assert page.cells("From prompts")["kept"][0] == "2"


def test_nothing_kept_and_no_pair(tmp_path):
    folder = make_run(tmp_path / "r", upto=3)
    stage = importlib.import_module("04_denoise")
    with pytest.raises(common.EmptyResult):
        stage.main(stage.Args(run_dir=str(folder), rho=0.001))
    page = page_of(folder)
    assert page.cells("From prompts")["kept"][:2] == ["0", "0.0 %"]
    assert page.cells("From prompts")["− dropped: det_above_rho"][0] == "3"
    write_rows(folder / "05_pairs.jsonl", [])
    assert "Nothing to show: no row has what is needed" in page_of(folder).sections["pairs"]


def test_rows_of_other_makers_need_no_records(tmp_path):
    write_rows(tmp_path / "own" / "02_scores.jsonl", [scored_row("p", [[1, 2]], None) | {"id": 7}])
    page = page_of(tmp_path / "own")
    assert "Not there, so their stages' arguments are not known: 01_args.json" in page.sections["setting"]
    assert page.cells("Mean score")[""][2:] == ["objective 1", "objective 2"]
    assert page.cells("Mean score")["candidates"] == ["1", "1 of 1", "1.00 [–, –]", "2.00 [–, –]"]


def test_several_runs_side_by_side(tmp_path, whole):
    half = make_run(tmp_path / "half", upto=4)
    output = tmp_path / "new" / "both.html"
    done = run_script("eval/report.py", "--runs", f"SPA={whole}", half, "--output", output)
    assert done.returncode == 0, done.stderr
    page = Page(output.read_text(encoding="utf-8"))
    key = page.cells("Means with")
    assert key[""] == ["SPA", "half"]
    assert key["pairs"] == ["12", "–"] and key["prompts kept"] == ["2 (33.3 %)", "2 (33.3 %)"]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    links = [link["href"] for link in page.all("a")]
    assert len(ids) == len(set(ids)) and {f"#{id}" for id in ids} == set(links)
    assert "SPA: 6 prompts, 2 kept, 12 pairs, 4 training steps (06)" in done.stdout
    assert f"wrote {output}" in done.stdout


def test_default_output_and_the_same_bytes_again(tmp_path, whole):
    copy = tmp_path / "elsewhere" / "whole"
    shutil.copytree(whole, copy)
    for folder in (whole, copy):
        done = run_script("eval/report.py", "--run_dir", folder)
        assert done.returncode == 0, done.stderr
    assert (copy / "report.html").read_bytes() == (whole / "report.html").read_bytes()
    assert str(whole).encode() not in (whole / "report.html").read_bytes(), "no path of this machine"
    (whole / "report.html").unlink()


def test_prompts_are_drawn_by_seed(whole):
    def drawn(**options) -> list[str]:
        words = page_of(whole, **options).sections["prompts"]
        return [id for id in PROMPTS if f"question {id}" in words]

    assert len(drawn(prompts=2)) == 2 and drawn(prompts=0) == [] and drawn(prompts=99) == list(PROMPTS)
    assert drawn(prompts=2) == drawn(prompts=2)
    assert set(drawn(prompts=2)) <= set(drawn(prompts=3)), "a larger number keeps the smaller draw"
    assert len({tuple(drawn(prompts=2, seed=seed)) for seed in range(8)}) > 1


def test_many_points_are_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_POINTS", 9)
    page = page_of(make_run(tmp_path / "r", upto=3))
    assert "9 of the 22 points are drawn" in page.sections["scatter"]
    assert page.cells("Mean over answers")["candidates"][0] == "17", "the numbers are of all"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: shutil.rmtree(f), "no run directory"),
        (lambda f: [p.unlink() for p in f.iterdir()], "has no file of any stage; run 01_sample.py"),
        (lambda f: (f / "02_scores.jsonl").write_text("{"), "02_scores.jsonl, line 1: broken JSON"),
        (lambda f: (f / "05_pairs.jsonl").write_text('{"id": 1}\n'), "05_pairs.jsonl, line 1: no 'chosen'"),
        (lambda f: (f / "06_metrics.jsonl").write_text("[]\n"), "line 1: a row of metrics with a 'step'"),
        (lambda f: (f / "02_args.json").write_text("[]"), "02_args.json is no record of a stage"),
        (lambda f: (f / "04_dropped.jsonl").write_text('{"id": 1}\n'), "line 1: not a row of 04_denoise.py"),
    ],
)
def test_bad_input_is_one_line(tmp_path, call, whole, change, words):
    change(Path(shutil.copytree(whole, tmp_path / "r")))
    code, _, errors = call("report", "--run_dir", tmp_path / "r", "--output", tmp_path / "x.html")
    assert code == 2 and words in errors and len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "x.html").exists()


def test_bad_options_are_one_line(whole, tmp_path, call):
    for options, words in (
        (("--runs", f"A={whole}", f"A={whole}"), "'A' twice"),
        (("--run_dir", whole, "--prompts", -1), "at least 0"),
        (("--run_dir", whole, "--output", tmp_path), "is a folder"),
    ):
        code, _, errors = call("report", *options)
        assert code == 2 and words in errors and len(errors.strip().splitlines()) == 1


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
        texts = [f"{words} {j}" for j in range(3)]
        row = scored_row(f"{words}{i}", [[2, 2], [3, 4], [4, 2]], [8, 8], texts)
        row["prompt"] = f"{words} prompt"
        row["refined"]["text"] = f"{words} refined " + "long " * 80
        rows.append(row)
    make_run(folder, rows)
    arguments = {"model": HOSTILE[1], "n": HOSTILE[0]}
    write_record(folder, "01_sample", **arguments)
    objectives = {"objectives": [HOSTILE[1], HOSTILE[2]], "judge_model": HOSTILE[3]}
    write_record(folder, "03_refine", **objectives, constitution={HOSTILE[1]: HOSTILE[0], HOSTILE[2]: HOSTILE[3]})
    dropped = [scored_row("odd", [[1, 1]], None) | {"reason": HOSTILE[0]}]
    write_rows(folder / "04_dropped.jsonl", dropped)
    return folder


KNOWN_TAGS = (
    "html head meta title link style body main nav section article h1 h2 h3 h4 h5 ul li a p strong dl dt dd "
    "div table caption thead tbody tr th td figure figcaption span svg line text rect circle path polyline "
    "details summary bdi"
)


def check_inert(text: str) -> Page:
    """Nothing in the page can run or load, whatever the texts are."""
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= set(KNOWN_TAGS.split())
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("style", "src", "srcdoc", "xlink:href"), (tag, name)
            assert name != "href" or value.startswith("#") or (tag, value) == ("link", "data:,")
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert policy.endswith("='; img-src data:; base-uri 'none'; form-action 'none'"), "and nothing else"
    return page


def test_hostile_texts_are_shown_as_text(tmp_path):
    output = tmp_path / "h.html"
    folder = hostile_run(tmp_path / "h")
    name = HOSTILE[1]
    report.main(report.Args(runs=[f"{name}={folder}", f"other={folder}"], output=str(output), prompts=20))
    text = output.read_text(encoding="utf-8")
    page = check_inert(text)
    words = "".join(page.words)
    for i, hostile in enumerate(HOSTILE):
        if i != 5:
            assert f"{hostile} 0" in words and f"{hostile} prompt" in words
    assert "␀␇␛[31m␡\ufffd red 0" in words, "control characters are made visible"
    assert not any(ord(c) < 32 and c != "\n" for c in text) and "\x7f" not in text
    assert page.cells("Means with")[""] == [name, "other"]
    assert f"− dropped: {HOSTILE[0]}" in page.cells("From prompts")


def test_no_address_outside_the_page(page, whole, tmp_path):
    output = tmp_path / "p.html"
    report.main(report.Args(run_dir=str(whole), output=str(output)))
    text = output.read_text(encoding="utf-8")
    check_inert(text)
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text


def test_page_is_made_for_phones_and_screen_readers(page):
    assert any(a.get("name") == "viewport" and "width=device-width" in a["content"] for a in page.all("meta"))
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4", "h5")]
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
  bars: least('.c0, .c1', 'fill'),
  ground: luminance(getComputedStyle(document.body).backgroundColor)
};
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver, program, driver = browser_or_skip()
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in [
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
    ]:
        options.add_argument(f"--{option}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield driver
    driver.quit()


def open_page(browser, path: Path, width: int, scheme: str) -> None:
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(path.as_uri())


@pytest.mark.parametrize("kind", ["whole", "hostile"])
def test_in_a_browser(browser, whole, tmp_path, kind):
    path = tmp_path / "page.html"
    folder = whole if kind == "whole" else hostile_run(tmp_path / "h")
    report.main(report.Args(runs=[f"one={folder}", f"{'very' * 30}long={folder}"], output=str(path), prompts=20))
    for width, scheme in ((390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")):
        open_page(browser, path, width, scheme)
        browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        wide = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide == [width, width] or wide[0] <= wide[1] == width, "the page does not scroll sideways"
        assert browser.execute_script("return typeof pwned") == "undefined"
        contrast = browser.execute_script(CONTRAST)
        assert contrast["words"] >= 4.5 and contrast["axes"] >= 4.5 and contrast["bars"] >= 3, (scheme, contrast)
        assert (contrast["ground"] < 0.05) == (scheme == "dark")
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert browser.get_log("browser") == [], "no message on the console"
    # the style sheet is let in by its hash, and charts keep legible letters on a phone
    open_page(browser, path, 390, "light")
    sizes = "const s = document.querySelector('figure > svg'); return s.getBoundingClientRect().width / 360 * 11"
    assert browser.execute_script(sizes) > 9.5
    assert browser.execute_script("return getComputedStyle(document.querySelector('.scroll')).overflowX") == "auto"
