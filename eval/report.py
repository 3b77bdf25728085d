"""One self-contained HTML page for a run directory: what came in, what was dropped, what was learnt from it.

Funnel, scores, det Σ with ρ, pairs and their weights, training curves, and some prompts in full. No network,
no script, no other file: it can be mailed. A run may have stopped after any stage; what is missing is said.

    reads   RUN_DIR/01_samples.jsonl to 05_pairs.jsonl, *_metrics.jsonl and *_args.json, those that are there
    writes  RUN_DIR/report.html (--output); of several runs runs/eval/report.html
    run     python eval/report.py --run_dir runs/default
            python eval/report.py --runs SPA=runs/a "w/o NF=runs/b" --output compared.html
    prints  default: 32 prompts, 16 kept, 75 pairs, 8 training steps
            wrote runs/default/report.html (96 kB)

The same files give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shared
from shared import det_covariance, round_half_up
from tqdm import tqdm

import common
from common import arg, check

SHORT_TEXT = 280  # characters; longer texts are folded
MOST_POINTS = 2000  # of a scatter plot
MOST_STEPS = 200  # rows of a table of steps
# file -> the stage that makes it, and what its rows must have (see common.read_rows)
FILES = {
    "01_samples.jsonl": ("01_sample", {}),
    "02_scores.jsonl": ("02_score", {"scored": True}),
    "03_refined.jsonl": ("03_refine", {"scored": True, "refined": True}),
    "04_denoised.jsonl": ("04_denoise", {"scored": True}),
    "04_dropped.jsonl": ("04_denoise", {"scored": True}),
    "05_pairs.jsonl": ("05_pairs", {}),
}
# the arguments of each stage that decide what its numbers mean
KEY_ARGUMENTS = {
    "01_sample": "model prompts split num_prompts n temperature top_p max_new_tokens system_prob seed",
    "02_score": "objectives score_mode with_instruction judge_model scorer",
    "03_refine": "template attempts temperature max_new_tokens score_mode judge_model scorer",
    "04_denoise": "rho det_min consistency informativeness cov_scope ddof",
    "05_pairs": "delta rule weights refined_only keep_system input",
    "06_train": "loss alpha beta gamma_beta_ratio gap_mean learning_rate warmup_ratio epochs batch_size "
    "lora_rank eval_fraction model seed",
}
REASONS = {
    "kept": "it passed every filter",
    "unscored": "the refined response or every candidate has no score",
    "inconsistent": "the refined response does not beat every candidate on every axis",
    "det_zero": "det Σ is not above det_min: the candidates' scores hardly vary",
    "det_above_rho": "det Σ is above ρ: the candidates' scores vary too much",
}
CURVES = ("loss", "rewards/margins", "rewards/accuracies", "learning_rate", "grad_norm")


@dataclass
class Args:
    run_dir: str = arg("runs/default", "folder of the run's files")
    runs: list[str] | None = arg(None, "several runs side by side instead, NAME=DIR each")
    output: str | None = arg(
        None, "the page; default: report.html in the run directory, of several runs in --output_dir"
    )
    output_dir: str = arg("runs/eval", "folder of the page of several runs")
    prompts: int = arg(10, "prompts that are shown in full, drawn by --seed")
    seed: int = arg(0, "seed of that draw, and of the jitter of integer scores")


# ---------------------------------------------------------------------------------------------------------------------
# Reading: whatever a run has left, checked.


@dataclass
class Run:
    """The files of a run directory: rows by file, records by stage, trainings by the stem of their files."""

    name: str
    rows: dict[str, list[dict]]
    missing: dict[str, str]  # file -> why it is not in `rows`
    records: dict[str, dict]
    trainings: dict[str, tuple[dict, list[dict]]]  # record and rows of metrics

    @property
    def made(self) -> dict[str, dict]:
        """{"01": the arguments of stage 1, …} up to 05; what a record says of earlier stages stands in for theirs."""
        found: dict[str, dict] = {}
        for stage, record in self.records.items():
            if stage != "06_train" and record:
                checked = {"checked": record["checked"]} if "checked" in record else {}  # stage 2's look at its judge
                found = {**record.get("earlier", {}), **found, stage[:2]: record["args"] | checked}
        return found

    @property
    def scored_by(self) -> dict:
        """The arguments of the last stage that scored; {} where none has left any."""
        return next((args for args in reversed(self.made.values()) if args.get("objectives")), {})

    @property
    def names(self) -> list[str]:
        """Of the objectives, in order of priority."""
        groups = candidate_scores(self.answers()).values()
        scores = next((scores for group in groups for scores in group if scores is not None), ())
        return shared.objective_names(self.made, len(scores))

    @property
    def model(self) -> str | None:
        """The model that answered."""
        return next((args["model"] for args in self.made.values() if args.get("model")), None)

    @property
    def judge(self) -> str | None:
        """Who scored, None where nothing was."""
        return shared.judge_name(self.scored_by)

    @property
    def own_first(self) -> dict[str, tuple[dict, list[dict]]]:
        """The trainings, that of 06_model first: the page's settings and weights are its own."""
        return dict(sorted(self.trainings.items(), key=lambda item: (item[0] != "06", item[0])))

    def argument(self, stage: str, name: str, default=None):
        """An argument of a stage, as its record has it."""
        return self.records[stage].get("args", self.made.get(stage[:2], {})).get(name, default)

    def answers(self) -> list[dict]:
        """The rows of the furthest file that has every prompt."""
        wholes = (["03_refined.jsonl"], ["04_denoised.jsonl", "04_dropped.jsonl"])
        for files in (*wholes, ["02_scores.jsonl"], ["01_samples.jsonl"]):
            if rows := [row for file in files for row in self.rows.get(file, [])]:
                return rows
        return []


def read_pairs(path: Path) -> list[dict]:
    """The rows of 05_pairs.jsonl, checked as far as this page needs them."""
    rows = []
    for number, line in common.read_lines(path):
        where = f"{path}, line {number}"
        row = common.parse_json(line, where)
        for key in ("id", "chosen", "rejected", "margin", "gap"):
            check(isinstance(row, dict) and key in row, f"{where}: no '{key}' in the row; add it")
        for key in ("chosen", "rejected"):
            fits = isinstance(row[key], list) and bool(row[key]) and isinstance(row[key][-1], dict)
            fits = fits and isinstance(row[key][-1].get("content"), str)
            check(fits, f"{where}: '{key}' must be a list of messages")
        for key in ("margin", "gap"):
            fits = is_number(row[key]) and row[key] >= 0
            check(fits, f"{where}: '{key}' must be a number, 0 or more")
        rows.append(row)
    return rows


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics file; a last line without its end, left by a kill, does not count."""
    rows = []
    for number, line in common.read_lines(path):
        if line.endswith("\n"):
            row = common.parse_json(line, f"{path}, line {number}")
            fits = isinstance(row, dict) and isinstance(row.get("step"), int)
            check(fits, f"{path}, line {number}: a row of metrics with a 'step' is wanted")
            rows.append(row)
    return rows


def read_run(name: str, path: Path) -> Run:
    """All that is in a run directory, but for what an unfinished stage has; UserError if it is none."""
    check(path.is_dir(), f"no run directory {path}")
    records = {stage: common.read_record(path / f"{stage[:2]}_args.json") for stage in KEY_ARGUMENTS}
    rows, missing = {}, {}
    for file, (stage, wanted) in FILES.items():
        if not (path / file).exists():
            missing[file] = f"{file} is not there ({stage}.py)"
        elif not records[stage].get("complete", True):
            missing[file] = f"{stage}.py has not finished"
        elif file == "05_pairs.jsonl":
            rows[file] = read_pairs(path / file)
        elif file == "04_dropped.jsonl":
            rows[file] = shared.read_filtered(path / file)
        else:
            rows[file] = list(common.read_rows(path / file, **wanted))
    trainings = {}
    for file in sorted(path.glob("*_metrics.jsonl")):
        stem = file.name.removesuffix("_metrics.jsonl")
        trainings[stem] = (common.read_record(path / f"{stem}_args.json"), read_metrics(file))
    if not trainings:
        missing["06_metrics.jsonl"] = "06_metrics.jsonl is not there (06_train.py)"
    check(bool(rows or trainings), f"{path} has no file of any stage; run 01_sample.py with it first")
    return Run(name, rows, missing, records, trainings)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers: everything that the page shows, from the rows.


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def candidate_scores(rows: list[dict]) -> dict[str, list]:
    """id -> scores or None of each candidate."""
    return {str(row["id"]): [response.get("scores") for response in row["responses"]] for row in rows}


def refined_scores(rows: list[dict]) -> dict[str, list]:
    """id -> the refined answer's scores or None, in a list of one."""
    return {str(row["id"]): [row["refined"]["scores"]] for row in rows if "refined" in row}


def read_of(groups: dict[str, list]) -> list[list]:
    """All scores that were read."""
    return [scores for group in groups.values() for scores in group if scores is not None]


def fates(run: Run) -> dict[str, str]:
    """id -> "kept", or the reason for which stage 4 dropped the prompt."""
    dropped = {str(row["id"]): str(row.get("reason")) for row in run.rows.get("04_dropped.jsonl", [])}
    return dropped | {str(row["id"]): "kept" for row in run.rows.get("04_denoised.jsonl", [])}


def dets(run: Run) -> dict[str, float]:
    """id -> det Σ: stage 4's own, or by its definition where it left none."""
    found, ddof = {}, run.argument("04_denoise", "ddof", 0)
    for row in run.answers():
        groups = [candidate_scores([row])]
        groups += [refined_scores([row])] * (run.argument("04_denoise", "cov_scope") == "all")
        if scores := [pair for group in groups for pair in read_of(group)]:
            found[str(row["id"])] = det_covariance(scores, ddof)
    for file in ("04_denoised.jsonl", "04_dropped.jsonl"):
        found |= {str(row["id"]): row["det"] for row in run.rows.get(file, []) if is_number(row.get("det"))}
    return found


def pair_weights(gaps: list[float], alpha: float) -> list[float]:
    """w_i = (gap_i / mean gap)^α (section 3.4) with the mean over the data set; [] if the mean is 0."""
    mean = sum(gaps) / len(gaps) if gaps else 0
    return [(gap / mean) ** alpha for gap in gaps] if mean else []


def effective_share(weights: list[float]) -> float:
    """(Σw)² / Σw² as a share of the pairs: 1 if all weights are equal."""
    return sum(weights) ** 2 / sum(w * w for w in weights) / len(weights)


def mean_interval(values: list[float]) -> str:
    """Mean over prompts with its 95 % bootstrap interval, as text."""
    if not values:
        return "–"
    low, high = shared.bootstrap_interval(values)
    return f"{round_half_up(float(np.mean(values)))} [{round_half_up(low)}, {round_half_up(high)}]"


def measured_rows(metrics: list[dict]) -> list[dict]:
    """The rows over a fixed set of prompts, before, (during) and after training, under plain names."""
    rows = [row for row in metrics if any(name.startswith(("train/", "eval/")) for name in row)]
    return [{name.removeprefix("train/").removeprefix("eval/"): row[name] for name in row} for row in rows]


def step_rows(metrics: list[dict]) -> list[dict]:
    """The rows of the single steps."""
    return [row for row in metrics if "learning_rate" in row]


def funnel(run: Run) -> list[tuple[str, int, str]]:
    """(label, count, kind) from the prompts sampled to the steps; kind: prompts, dropped, or other."""
    rows = run.rows
    lines = []
    if "01_samples.jsonl" in rows:
        lines.append(("prompts sampled", len(rows["01_samples.jsonl"]), "prompts"))
    if "02_scores.jsonl" in rows:
        groups = candidate_scores(rows["02_scores.jsonl"]).values()
        scored = sum(any(scores is not None for scores in group) for group in groups)
        lines.append(("with a scored answer", scored, "prompts"))
    if "03_refined.jsonl" in rows:
        refined = len(read_of(refined_scores(rows["03_refined.jsonl"])))
        lines.append(("refined and scored", refined, "prompts"))
    if "04_dropped.jsonl" in rows:
        counts = Counter(fate for fate in fates(run).values() if fate != "kept")
        reasons = [*(r for r in REASONS if r != "kept"), *sorted(counts.keys() - REASONS.keys())]
        lines += [(f"dropped: {reason}", counts[reason], "dropped") for reason in reasons]
    if "04_denoised.jsonl" in rows:
        lines.append(("kept", len(rows["04_denoised.jsonl"]), "prompts"))
    if "05_pairs.jsonl" in rows:
        pairs = rows["05_pairs.jsonl"]
        lines.append(("with pairs", len({str(pair["id"]) for pair in pairs}), "prompts"))
        lines.append(("pairs", len(pairs), "other"))
    for stem, (_, metrics) in run.own_first.items():
        lines.append((f"training steps ({stem})", len(step_rows(metrics)), "other"))
    return lines


def key_numbers(run: Run) -> dict[str, str]:
    """The numbers by which runs compare: label -> text, "–" where a stage has not run."""
    rows = run.answers()
    counts = {label: count for label, count, _ in funnel(run)}
    candidates, refined = candidate_scores(rows), refined_scores(rows)
    numbers = {"model": run.model or "–", "judge": run.judge or "–"}
    numbers["scores"] = run.argument("02_score", "score_mode") or "–"
    lines = [line.removeprefix("judge check: ") for line in common.check_lines(run.made)]
    fit, verdict = common.judge_verdict(run.made, run.names)
    numbers["judge check"] = "; ".join([*lines, *([] if fit else [verdict])]) or "–"
    numbers["prompts"] = number(len(rows))
    for title, groups in (("answers", candidates), ("refined", refined)):
        means = list(shared.prompt_means(groups).values())
        for axis, objective in enumerate(run.names):
            numbers[f"mean {objective}, {title}"] = mean_interval([pair[axis] for pair in means])
    numbers["ties among a prompt's answers"] = percent(common.tie_rate(list(candidates.values())))
    kept = counts.get("kept")
    share = f" ({percent(kept / len(rows))})" if kept is not None and rows else ""
    numbers["prompts kept"] = number(kept) + share
    pairs = run.rows.get("05_pairs.jsonl")
    numbers["pairs"] = number(None if pairs is None else len(pairs))
    numbers["mean gap"] = number(float(np.mean([pair["gap"] for pair in pairs])) if pairs else None)
    for stem, (record, metrics) in (run.own_first or {"06": ({}, [])}).items():
        of = "" if stem == "06" else f" ({stem})"
        numbers[f"training loss{of}"] = record.get("args", {}).get("loss", "–")
        numbers[f"steps{of}"] = number(len(step_rows(metrics)) if metrics else None)
        measured = measured_rows(metrics)
        for name in CURVES[:3]:
            change = [number(row.get(name)) for row in (measured[0], measured[-1])] if len(measured) > 1 else []
            numbers[f"{name}, before → after{of}"] = " → ".join(change) or "–"
    return numbers


def number(value) -> str:
    """A number as the page prints it: integers as they are, others with four digits."""
    if not is_number(value):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{round_half_up(100 * share, 1)} %"


# ---------------------------------------------------------------------------------------------------------------------
# HTML: whatever was not made by `h` is text, so nothing that a model wrote can run.

# control characters become visible pictures of themselves, but for tab and newline
VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD) | {0xFFFE: 0xFFFD, 0xFFFF: 0xFFFD}
LINES = ("p", "tr", "table", "section", "article", "figure", "details", "li", "dd", "svg", "div", "nav", "head")


class Html(str):
    """Markup made here."""


def text(value) -> str:
    """A value as the text of an element or an attribute."""
    return html.escape(str(value).replace("\r\n", "\n").translate(VISIBLE))


def h(tag: str, /, *children, **attributes) -> Html:
    """<tag attributes>children</tag>; children that are not Html are escaped, None is left out.

    `class_` stands for class, other underscores for dashes.
    """
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    written = "".join(f' {key}="{text(value)}"' for key, value in pairs if value is not None)
    start = f"<{tag}{written}>"
    if tag in ("meta", "link"):
        return Html(start + "\n")
    inner = "".join(c if isinstance(c, Html) else text(c) for c in children if c is not None)
    return Html(f"{start}{inner}</{tag}>" + "\n" * (tag in LINES))


def table(caption: str, header: list[str], rows: list[list]) -> Html:
    """A table in a box of its own, which scrolls where the screen is narrow; numbers to the right."""
    head = h("tr", *(h("th", cell, scope="col") for cell in header))
    body = [h("tr", h("th", row[0], scope="row"), *(h("td", cell) for cell in row[1:])) for row in rows]
    inner = h("table", h("caption", caption), h("thead", head), h("tbody", *body))
    return h("div", inner, class_="scroll", role="region", aria_label=caption, tabindex="0")


def folded(summary: str, *children) -> Html:
    return h("details", h("summary", summary), *children)


def passage(words: str) -> Html:
    """What a person or a model wrote: as it is, folded if it is long."""
    whole = h("div", words if words.strip() else "(empty)", class_="text", dir="auto")
    if len(words) <= SHORT_TEXT and words.count("\n") < 8:
        return whole
    start = " ".join(words[:140].split())
    return h("details", h("summary", h("bdi", f"{start}…"), f" ({len(words)} characters)"), whole)


# ---------------------------------------------------------------------------------------------------------------------
# Charts: small SVGs by hand, whose text and colours follow the page into the dark.

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 230, 44, 10, 26, 40
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten, from low to high."""
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(s for s in (power, 2 * power, 5 * power, 10 * power, 20 * power) if (high - low) / s < most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def labelled(ticks: list[float]) -> list[tuple[float, str]]:
    return [(tick, f"{tick:g}") for tick in ticks]


def at(value: float) -> str:
    """A coordinate: two decimals, so that no platform's last digit shows."""
    return f"{value:.2f}".removesuffix("00").removesuffix(".")


def chart(title, says, x_range, y_range, draw, x_label, y_label, x_ticks, y_ticks, keys=(), rules=()):
    """A figure: axes, the shapes of draw(px, py), dashed rules ("x" or "y", value, text), and a legend.

    `says` tells in words and numbers what the drawing shows, to those who can't see it. px and py map data
    to pixels; x_ticks and y_ticks are (value, text); keys are (shape, name) of the series.
    """

    def px(x: float) -> float:
        return LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)

    base, parts = HEIGHT - BOTTOM, []
    for value, label in y_ticks:
        y = at(py(value))
        parts.append(h("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(h("text", label, x=LEFT - 5, y=at(py(value) + 3.5), class_="end"))
    for value, label in x_ticks:
        parts.append(h("text", label, x=at(px(value)), y=base + 15, class_="mid"))
    parts.append(h("line", x1=LEFT, x2=WIDTH - RIGHT, y1=base, y2=base, class_="axis"))
    parts.append(h("text", x_label, x=(LEFT + WIDTH - RIGHT) // 2, y=HEIGHT - 6, class_="mid"))
    parts += [h("text", y_label, x=2, y=12)] if y_label else []
    parts += draw(px, py)
    for axis, value, label in rules:
        if axis == "x":
            x = px(value)
            side = {"class_": "end", "x": at(x - 4)} if x > WIDTH * 0.7 else {"x": at(x + 4)}
            parts.append(h("line", x1=at(x), x2=at(x), y1=TOP - 8, y2=base, class_="rule"))
            parts.append(h("text", label, y=TOP - 3, **side))
        else:
            y = py(value)
            parts.append(h("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at(y), y2=at(y), class_="rule"))
            parts.append(h("text", label, x=WIDTH - RIGHT, y=at(y - 4), class_="end"))
    picture = h("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}. {says}")
    swatch = {"viewBox": "0 0 12 12", "class_": "swatch", "aria_hidden": "true"}
    swatches = [h("span", h("svg", shape, **swatch), " ", name, class_="key") for shape, name in keys]
    return h("figure", h("figcaption", h("strong", title), *swatches), picture)


def marker(x: float, y: float, series: int, size: float) -> Html:
    """A disc for the first series, a diamond for the second: told apart without colour too."""
    if series == 0:
        return h("circle", cx=at(x), cy=at(y), r=at(size), class_="c0")
    s = size * 1.2
    path = f"M{at(x)} {at(y - s)}L{at(x + s)} {at(y)}L{at(x)} {at(y + s)}L{at(x - s)} {at(y)}Z"
    return h("path", d=path, class_="c1")


def bar_chart(title, bins, series: dict[str, list], x_label, y_label, x_ticks, stacked=False, rules=()):
    """Bars over bins (left, right, text); of several series side by side, or stacked."""
    columns = list(zip(*series.values(), strict=True))
    top = max([sum(c) if stacked else max(c) for c in columns], default=0) or 1

    def draw(px, py):
        shapes = []
        for (left, right, label), heights in zip(bins, columns, strict=True):
            below, width = 0, (right - left) * 0.86 / (1 if stacked else len(heights))
            for i, (name, height) in enumerate(zip(series, heights, strict=True)):
                x = left + (right - left) * 0.07 + (0 if stacked else i * width)
                if height:
                    box = {"x": at(px(x)), "width": at(px(x + width) - px(x)), "y": at(py(below + height))}
                    box |= {"height": at(py(below) - py(below + height)), "class_": f"bar c{i}"}
                    shapes.append(h("rect", h("title", f"{name}, {label}: {number(height)}"), **box))
                below += height if stacked else 0
        return shapes

    says = ". ".join(
        f"{name}: " + ", ".join(f"{b[2]}: {number(v)}" for b, v in zip(bins, values, strict=True) if v)
        for name, values in series.items()
    )
    square = {"x": 1, "y": 1, "width": 10, "height": 10}
    keys = [(h("rect", class_=f"bar c{i}", **square), name) for i, name in enumerate(series)]
    keys = keys if len(keys) > 1 else []
    x_range = (min([bins[0][0], *(v for _, v, _ in rules)]), max([bins[-1][1], *(v for _, v, _ in rules)]))
    counts = all(isinstance(value, int) for column in columns for value in column)
    y_ticks = labelled([tick for tick in nice_ticks(0, top, 5) if not counts or tick == int(tick)])
    return chart(title, says, x_range, (0, top), draw, x_label, y_label, x_ticks, y_ticks, keys, rules)


def bins_of(values: list[float]) -> tuple[list[tuple[float, float, str]], list]:
    """(bins (left, right, text), ticks): a bin per integer, or at most a dozen of equal width."""
    low, high = min(values), max(values)
    if all(value == int(value) for value in values) and high - low <= 20:
        whole = range(int(low), int(high) + 1)
        ticks = [(k, str(k)) for k in whole if k % (1 + len(whole) // 12) == 0]
        return [(k - 0.5, k + 0.5, str(k)) for k in whole], ticks
    steps = nice_ticks(low, high, 13)
    step = steps[1] - steps[0] if len(steps) > 1 else max(abs(low), 1.0) / 10
    first = math.floor(low / step + 1e-9)
    count = max(1, math.ceil((high - first * step) / step - 1e-9))
    edges = [round((first + i) * step, 12) for i in range(count + 1)]
    bins = [(a, b, f"{a:g} to {b:g}") for a, b in itertools.pairwise(edges)]
    return bins, labelled(nice_ticks(edges[0], edges[-1], 6))


def count_in(bins: list[tuple[float, float, str]], values: list[float]) -> list[int]:
    """How many values are in each of adjoining bins; binary dust beyond the last edge does not count."""
    edges = [bins[0][0], *(right for _, right, _ in bins)]
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()


def det_bins(values: list[float], rho: float | None):
    """(bins, ticks, place): half decades, and a bin for 0, which no logarithm has; place(det) is its bin."""
    positive = [value for value in [*values, rho or 0] if value > 0] or [1.0]
    low, high = math.floor(2 * math.log10(min(positive))), math.floor(2 * math.log10(max(positive)))
    bins = [(low / 2 - 1, low / 2 - 0.5, "0")]
    bins += [(k / 2, k / 2 + 0.5, f"{10 ** (k / 2):.3g} to {10 ** (k / 2 + 0.5):.3g}") for k in range(low, high + 1)]
    decades = range(math.ceil(low / 2), (high + 1) // 2 + 1)
    every = 1 + len(decades) // 7
    ticks = [(low / 2 - 0.75, "0")]
    for k in decades:
        if k % every == 0:
            ticks.append((k, f"{10.0**k:g}" if -2 <= k <= 3 else "10" + str(k).translate(SUPERSCRIPTS)))

    def place(det: float) -> int:
        return 0 if det <= 0 else 1 + math.floor(2 * math.log10(det)) - low

    return bins, ticks, place


# ---------------------------------------------------------------------------------------------------------------------
# Sections, in the order of the page; each returns what it shows of a run.


def absent(run: Run, *files: str) -> Html:
    """One line on what a section would need."""
    reasons = dict.fromkeys(run.missing[file] for file in files if file in run.missing)
    said = "; ".join(reasons) or "no row has what is needed"
    return h("p", f"Nothing to show: {said}.", class_="note")


def show_setting(run: Run, args: Args) -> list[Html]:
    parts, judge = [], run.judge
    who = "the model itself" if judge and judge == run.model else judge
    about = [("Model", run.model or "not recorded"), ("Judge", who or "not recorded")]
    for place, (name, definition) in enumerate(shared.definitions(run.scored_by), 1):
        about.append((f"{name} (priority {place})", definition))
    others = {f"06_train.py ({stem})": record for stem, (record, _) in run.own_first.items() if stem != "06"}
    for stage, record in {**run.records, **others}.items():
        given, names = record.get("args", {}), KEY_ARGUMENTS.get(stage, KEY_ARGUMENTS["06_train"])
        said = [f"{name}={plain(given[name])}" for name in names.split() if given.get(name) is not None]
        if said:
            about.append((stage if stage in others else f"{stage}.py", " · ".join(said)))
    versions: dict[str, dict] = {}
    for record in run.records.values():
        for package, version in record.get("versions", {}).items():
            versions.setdefault(package, {})[str(version)] = None
    if versions:
        listed = ", ".join(f"{package} {' / '.join(found)}" for package, found in versions.items())
        about.append(("Versions", listed))
    without = [f"{stage[:2]}_args.json" for stage, record in run.records.items() if not record]
    parts.append(h("dl", *(part for name, value in about for part in (h("dt", name), h("dd", value)))))
    if without:
        line = f"Not there, so their stages' arguments are not known: {', '.join(without)}."
        parts.append(h("p", line, class_="note"))
    return parts


def plain(value) -> str:
    """An argument as one would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def show_funnel(run: Run, args: Args) -> list[Html]:
    lines = funnel(run)
    most = max([count for _, count, kind in lines if kind != "other"], default=0) or 1
    rows = []
    for label, count, kind in lines:
        bar = share = None
        if kind != "other":
            colour = "c0" if kind == "prompts" else "c1"
            box = h("rect", width=at(100 * count / most), height="10", class_=colour)
            shape = {"viewBox": "0 0 100 10", "preserveAspectRatio": "none", "aria_hidden": "true"}
            bar = h("svg", box, class_="meter", **shape)
            share = percent(count / most)
        rows.append(["− " + label if kind == "dropped" else label, count, share or "", bar or ""])
    answers = candidate_scores(run.answers())
    total, read = sum(map(len, answers.values())), len(read_of(answers))
    parts = [table("From prompts to training steps", ["", "count", "share", ""], rows)]
    parts.append(h("p", f"{total} answers to {len(answers)} prompts, {read} of them scored."))
    if run.missing:
        said = "; ".join(dict.fromkeys(run.missing.values()))
        parts.append(h("p", f"Missing: {said}.", class_="note"))
    return parts


def show_scores(run: Run, args: Args) -> list[Html]:
    rows = run.answers()
    groups = {"candidates": candidate_scores(rows), "refined": refined_scores(rows)}
    read = {name: read_of(group) for name, group in groups.items() if read_of(group)}
    if not read:
        return [absent(run, "02_scores.jsonl", "03_refined.jsonl")]
    kept = {id for id, fate in fates(run).items() if fate == "kept"}
    if kept:
        for name in ("candidates", "refined"):
            groups[f"{name}, kept prompts"] = {id: g for id, g in groups[name].items() if id in kept}
    means = {name: shared.prompt_means(group) for name, group in groups.items()}
    both = [id for id in means["refined"] if id in means["candidates"]]
    lines = []
    for name, group in groups.items():
        answers = sum(map(len, group.values()))
        cells = [mean_interval([mean[axis] for mean in means[name].values()]) for axis in range(len(run.names))]
        lines.append([name, len(means[name]), f"{len(read_of(group))} of {answers}", *cells])
    gains = [np.subtract(means["refined"][id], means["candidates"][id]) for id in both]
    cells = [mean_interval([float(gain[axis]) for gain in gains]) for axis in range(len(run.names))]
    lines.append(["refined − candidates, same prompt", len(both), "", *cells])
    parts = [table("Mean score [95 % interval]", ["", "prompts", "answers scored", *run.names], lines)]
    note = "Means of prompts' means; intervals by the percentile bootstrap over prompts, 10,000 draws."
    parts.append(h("p", note, class_="small"))
    mixed = [[*groups["refined"][id], scores] for id in groups["refined"] for scores in groups["candidates"][id]]
    ties = [["a prompt's candidates", percent(common.tie_rate(list(groups["candidates"].values())))]]
    ties.append(["a refined answer and a candidate", percent(common.tie_rate(mixed))])
    parts.append(table("Ties: pairs with equal scores on every axis", ["pairs of", "tied"], ties))
    whole = all(score == int(score) for scores in read.values() for pair in scores for score in pair)
    charts, counted = [], []
    for axis, name in enumerate(run.names):
        values = {group: [pair[axis] for pair in scores] for group, scores in read.items()}
        everything = [value for group in values.values() for value in group]
        bins, ticks = bins_of([*everything, *range(1, 11)] if whole else everything)
        counts = {group: count_in(bins, scores) for group, scores in values.items()}
        shares = {group: [100 * n / len(values[group]) for n in column] for group, column in counts.items()}
        charts.append(bar_chart(f"{name} scores", bins, shares, "score", "% of the answers", ticks))
        lines = [[one[2], *(column[i] for column in counts.values())] for i, one in enumerate(bins)]
        counted.append(table(f"{name}: answers by score", ["score", *counts], lines))
    return [*parts, h("div", *charts, class_="charts"), folded("Counts", *counted)]


def show_scatter(run: Run, args: Args) -> list[Html]:
    rows = run.answers()
    points = []  # (series, id, place, scores)
    for row in rows:
        points += [(0, str(row["id"]), i, one.get("scores")) for i, one in enumerate(row["responses"])]
        points += [(1, str(row["id"]), -1, row["refined"]["scores"])] if "refined" in row else []
    points = [(*point[:3], point[3][:2]) for point in points if point[3] is not None]
    if not points:
        return [absent(run, "02_scores.jsonl", "03_refined.jsonl")]
    whole = all(score == int(score) for *_, scores in points for score in scores)
    spans, ticks = [], []
    for values in zip(*(scores for *_, scores in points), strict=True):
        low, high = math.floor(min(values)), math.ceil(max(values))
        spans.append((low - 0.5, high + 0.5) if whole or low == high else (low, high))
        ticks.append(labelled([t for t in nice_ticks(low, high, 11) if not whole or t == int(t)]))
    drawn = sorted(points, key=lambda point: common.derive_seed(args.seed, *point[:3]))[:MOST_POINTS]

    def draw(px, py):
        shapes = []
        for series, id, place, (a, b) in sorted(drawn, key=lambda point: point[0]):  # the refined ones on top
            if whole:
                spread = common.derive_seed(args.seed, "jitter", id, place)
                a, b = a + (spread % 1000 / 999 - 0.5) * 0.6, b + (spread // 1000 % 1000 / 999 - 0.5) * 0.6
            shapes.append(marker(px(a), py(b), series, 2.6))
        return shapes

    lines = []
    for series, name in enumerate(("candidates", "refined")):
        scores = [point[3] for point in points if point[0] == series]
        if scores:
            lines.append([name, len(scores), *(round_half_up(float(v)) for v in np.mean(scores, axis=0))])
    says = "; ".join(f"{line[1]} {line[0]}, mean {line[2]} and {line[3]}" for line in lines)
    labels = (f"{run.names[0]} (primary)", f"{run.names[1]} (secondary)")
    keys = [(marker(6, 6, i, 4.5), line[0]) for i, line in enumerate(lines)]
    figure = chart("Each answer's two scores", says, *spans, draw, *labels, *ticks, keys)
    notes = ["The further up and to the right, the better."]
    if whole:
        notes.append("Integer scores lie on a grid: each point is moved by up to 0.3 on each axis.")
    if len(drawn) < len(points):
        notes.append(f"{len(drawn)} of the {len(points)} points are drawn, chosen by hash.")
    if len(run.names) > 2:
        notes.append(f"Of {len(run.names)} objectives the first two are shown.")
    means = table("Mean over answers", ["", "answers", *run.names[:2]], lines)
    return [h("div", figure, class_="charts"), h("p", " ".join(notes), class_="small"), means]


def show_det(run: Run, args: Args) -> list[Html]:
    found, fate = dets(run), fates(run)
    if not found:
        return [absent(run, "02_scores.jsonl", "04_denoised.jsonl")]
    rho, least = run.argument("04_denoise", "rho"), run.argument("04_denoise", "det_min", 0)
    groups = {"kept": [], "dropped": [], "not filtered": []}
    for id, det in found.items():
        groups["not filtered" if id not in fate else "kept" if fate[id] == "kept" else "dropped"].append(det)
    groups = {name: values for name, values in groups.items() if values}
    bins, ticks, place = det_bins(list(found.values()), rho)
    series = {}
    for name, values in groups.items():
        places = Counter(map(place, values))
        series[name] = [places[i] for i in range(len(bins))]
    rules = [("x", math.log10(rho), f"ρ = {rho:g}")] if rho else []
    rules += [("x", math.log10(least), f"det_min = {least:g}")] if least and least > 0 else []
    title = "det Σ of a prompt's candidates"
    figure = bar_chart(title, bins, series, "det Σ (logarithmic; 0 apart)", "prompts", ticks, True, rules)
    lines = []
    for name, values in {**groups, "all": list(found.values())}.items():
        quantiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
        above = sum(value > rho for value in values) if rho else None
        zero = sum(value == 0 for value in values)
        lines.append([name, len(values), *(f"{value:.3g}" for value in quantiles), zero, number(above)])
    header = ["prompts", "number", "least", "quarter", "median", "three quarters", "most", "zero", "above ρ"]
    options = [run.argument("04_denoise", "cov_scope", "candidates"), run.argument("04_denoise", "ddof", 0)]
    how = "population" if options[1] == 0 else "sample"
    scope = "the candidates and the refined answer" if options[0] == "all" else "the candidates"
    bound = f" Stage 4 keeps {least:g} < det Σ ≤ ρ = {rho:g}." if rho else " ρ is not known: no 04_args.json."
    if run.argument("04_denoise", "informativeness") is False:
        bound = " The informativeness filter was off."
    note = f"Equation 1, {how} covariance over {scope} that have scores.{bound}"
    counts = [[one[2], *(values[i] for values in series.values())] for i, one in enumerate(bins)]
    return [
        h("div", figure, class_="charts"),
        h("p", note, class_="small"),
        table("det Σ", header, lines),
        folded("Counts", table("Prompts by det Σ", ["det Σ", *series], counts)),
    ]


def show_pairs(run: Run, args: Args) -> list[Html]:
    pairs = run.rows.get("05_pairs.jsonl")
    if not pairs:
        return [absent(run, "05_pairs.jsonl")]
    gaps, margins = [pair["gap"] for pair in pairs], [pair["margin"] for pair in pairs]
    alpha, weights = weights_of(run)
    lower = sum(
        round(sum(pair["chosen_scores"]) - sum(pair["rejected_scores"]), 9) < 0
        for pair in pairs
        if pair.get("chosen_scores") and pair.get("rejected_scores")
    )
    delta, share = run.argument("05_pairs", "delta"), len(pairs)
    lines = [
        ["pairs", len(pairs)],
        ["prompts with pairs", len({str(pair["id"]) for pair in pairs})],
        ["mean margin", number(sum(margins) / share)],
        ["mean gap", number(sum(gaps) / share)],
        ["gap 0 (weight 0 in SPA)", f"{gaps.count(0)} ({percent(gaps.count(0) / share)})"],
        ["the preferred answer has the lower total", f"{lower} ({percent(lower / share)})"],
    ]
    series = [("Margins", margins, "sum of |ΔG|", [("x", delta, f"δ = {delta:g}")] if delta else [])]
    series.append(("Gaps", gaps, "|Δ of the sum of G|", []))
    if weights:
        lines.append([f"largest weight, α = {alpha:g}", number(max(weights))])
        lines.append(["effective sample size (Σw)² / Σw²", percent(effective_share(weights))])
        series.append((f"Weights, α = {alpha:g}", weights, "(gap / mean gap)^α", [("x", 1, "mean gap")]))
    charts, counts = [], []
    for title, values, label, rules in series:
        bins, ticks = bins_of(values)
        heights = count_in(bins, values)
        charts.append(bar_chart(title, bins, {"pairs": heights}, label, "pairs", ticks, rules=rules))
        rows = [[one[2], count] for one, count in zip(bins, heights, strict=True)]
        counts.append(table(f"{title}: {label}", ["", "pairs"], rows))
    notes = ["The margin decides by δ if a pair is one, the gap its weight."]
    trained = run.records["06_train"].get("args", {})
    if not trained:
        notes.append("α is not known (no 06_args.json): 1 is taken.")
    elif trained.get("loss", "spa") != "spa":
        notes.append(f"The training's loss was {trained['loss']}, which does not use these weights.")
    elif trained.get("gap_mean") == "batch" or trained.get("eval_fraction"):
        notes.append("The mean gap here is that of all pairs; the training's was that of its batches or its part.")
    notes += [] if weights else ["Every gap is 0, so no weight is defined."]
    return [
        h("div", *charts, class_="charts"),
        h("p", " ".join(notes), class_="small"),
        table("All pairs", ["", "number"], lines),
        folded("Counts", *counts),
    ]


def weights_of(run: Run) -> tuple[float, list[float]]:
    """(α of the training, or 1; the weight of each pair)."""
    alpha = run.argument("06_train", "alpha", 1.0)
    return alpha, pair_weights([pair["gap"] for pair in run.rows.get("05_pairs.jsonl", [])], alpha)


def show_training(run: Run, args: Args) -> list[Html]:
    if not run.trainings:
        return [absent(run, "06_metrics.jsonl")]
    parts = []
    for stem, (record, metrics) in run.own_first.items():
        given, steps, measured = record.get("args", {}), step_rows(metrics), measured_rows(metrics)
        head = f"{stem}: {len(steps)} steps, loss {given.get('loss', 'not recorded')}"
        if not record.get("complete", True):
            head += ", not finished"
        parts.append(h("p", h("strong", head)))
        gamma = None
        if given.get("loss") in ("spa", "simpo") and given.get("beta") is not None:
            gamma = given["beta"] * given.get("gamma_beta_ratio", 0)
        charts = [curve(name, steps, measured, gamma if name == "rewards/margins" else None) for name in CURVES]
        parts.append(h("div", *(one for one in charts if one), class_="charts"))
        held_out = any(name.startswith("eval/") for row in metrics for name in row)
        if measured:
            ends, header = [measured[0]], ["", "before"]
            if measured[-1]["step"] > measured[0]["step"]:
                ends, header = [measured[0], measured[-1]], ["", "before", "after", "change"]
            lines = []
            for name in measured[0]:
                if name not in ("step", "epoch"):
                    cells = [row.get(name) for row in ends]
                    change = [cells[1] - cells[0]] if len(ends) == 2 and all(map(is_number, cells)) else []
                    lines.append([name, *map(number, cells + change)])
            over = "held-out" if held_out else "training"
            parts.append(table(f"Over a fixed set of {over} prompts ({stem})", header, lines))
        if steps:
            names = list(dict.fromkeys(name for row in steps for name in row if is_number(row[name])))
            every = math.ceil(len(steps) / MOST_STEPS)
            lines = [[number(row.get(name)) for name in names] for row in steps[::every]]
            caption = "Metrics by step" + (f", one in {every}" if every > 1 else "")
            parts.append(folded(f"Steps ({stem})", table(caption, names, lines)))
    return parts


def curve(name: str, steps: list[dict], measured: list[dict], gamma: float | None) -> Html | None:
    """A metric over the steps, and where it was measured over fixed prompts; None if no row has it."""
    series = []
    for rows in (steps, measured):
        series.append([(row["step"], row[name]) for row in rows if is_number(row.get(name))])
    points = [point for line in series for point in line]
    if not points:
        return None
    values = [y for _, y in points] + ([] if gamma is None else [gamma])
    values += [0.0, 1.0] if name == "rewards/accuracies" else []
    low, high = min(values), max(values)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - pad, high + pad
    last = max(x for x, _ in points)

    def draw(px, py):
        shapes = []
        for i, line in enumerate(series):
            place = " ".join(f"{at(px(x))},{at(py(y))}" for x, y in line)
            if len(line) > 1:
                shapes.append(h("polyline", points=place, class_=f"line s{i}"))
            if len(line) <= 60:
                shapes += [marker(px(x), py(y), i, 3 if i else 2.2) for x, y in line]
        return shapes

    says = []
    for label, line in zip(("steps", "fixed prompts"), series, strict=True):
        for (x, y), (end, value) in [(line[0], line[-1])] if line else []:
            says.append(f"{label}: {number(y)} at step {x}, {number(value)} at step {end}")
    steps_range = (0, max(last, 1))
    x_ticks = labelled([tick for tick in nice_ticks(*steps_range, 7) if tick == int(tick)])
    y_ticks = labelled(nice_ticks(low, high, 5))
    rules = [] if gamma is None else [("y", gamma, f"γ = {gamma:g}")]
    keys = [(marker(6, 6, i, 4.5), label) for i, label in enumerate(("each step", "fixed prompts"))]
    keys = keys if series[1] else []
    ranges = (steps_range, (low, high))
    return chart(name, ". ".join(says), *ranges, draw, "step", "", x_ticks, y_ticks, keys, rules)


def show_prompts(run: Run, args: Args, level: int) -> list[Html]:
    rows, fate, found = run.answers(), fates(run), dets(run)
    if not rows:
        return [absent(run, "01_samples.jsonl")]
    _, weights = weights_of(run)
    pairs: dict[str, list] = {}
    for place, pair in enumerate(run.rows.get("05_pairs.jsonl", [])):
        pairs.setdefault(str(pair["id"]), []).append((pair, weights[place] if weights else None))
    drawn = sorted(rows, key=lambda row: common.derive_seed(args.seed, row["id"]))[: args.prompts]
    parts = [h("p", f"{len(drawn)} of {len(rows)} prompts, drawn by hash with seed {args.seed}.", class_="small")]
    for row in drawn:
        id = str(row["id"])
        verdict = fate.get(id, "not filtered")
        name = verdict if verdict in ("kept", "not filtered") else f"dropped: {verdict}"
        badge = h("span", name, class_="badge kept" if verdict == "kept" else "badge")
        why = [REASONS[verdict]] if verdict in REASONS else []
        why += [f"det Σ {found[id]:.3g}"] if id in found else []
        members = [(f"answer {i}", response) for i, response in enumerate(row["responses"], 1)]
        members += [("refined", row["refined"])] if "refined" in row else []
        label_of: dict[str, str] = {}
        for label, member in members:
            label_of.setdefault(member["text"], label)
        listed = []
        for label, member in members:
            said = [h("strong", label), " ", said_scores(member.get("scores"), run.names)]
            said += [" · under a system prompt"] if member.get("system") else []
            listed.append(h("li", h("p", *said, class_="who"), passage(member["text"])))
        lines = []
        for pair, weight in pairs.get(id, []):
            sides = [label_of.get(pair[side][-1]["content"], "another text") for side in ("chosen", "rejected")]
            lines.append([" > ".join(sides), number(pair["margin"]), number(pair["gap"]), number(weight)])
        end = table(f"Pairs of {id}", ["chosen > rejected", "margin", "gap", "weight"], lines) if lines else None
        if "05_pairs.jsonl" in run.rows and not lines:
            end = h("p", "No pair.", class_="small")
        heading = h(f"h{level}", id, " ", badge)
        asked = h("div", passage(common.plain_text(row["prompt"])), class_="asked")
        parts.append(
            h("article", heading, h("p", "; ".join(why), class_="small") if why else None, asked, h("ul", *listed), end)
        )
    return parts


def said_scores(scores: list | None, names: list[str]) -> str:
    if scores is None:
        return "no score"
    return ", ".join(
        f"{name} {score if isinstance(score, int) else round_half_up(score)}"
        for name, score in zip(names, scores, strict=True)
    )


SECTIONS = (
    ("setting", "Setting", show_setting),
    ("funnel", "Funnel", show_funnel),
    ("scores", "Scores", show_scores),
    ("scatter", "Primary against secondary", show_scatter),
    ("det", "Informativeness: det Σ", show_det),
    ("pairs", "Pairs and weights", show_pairs),
    ("training", "Training", show_training),
)

# ---------------------------------------------------------------------------------------------------------------------
# The page.

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1c2024; --soft: #5a626b; --line: #d9dde1; --wash: #f4f6f8;
  --c0: COLOUR0; --c1: COLOUR1; --c2: COLOUR2;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --ink: #e3e6e8; --soft: #a3abb3; --line: #383e45; --wash: #1e2226;
  --c0: COLOUR5; --c1: COLOUR4;
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere; }
body { font: 16px/1.55 system-ui, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1, h2, h3, h4 { line-height: 1.25; margin: 2.2em 0 .6em; }
h1 { font-size: 1.7rem; margin-top: 0; }
h2 { font-size: 1.3rem; }
h3 { font-size: 1.1rem; }
h4 { font-size: 1rem; }
a { color: var(--c0); }
nav ul { padding-left: 1.1rem; margin: .3rem 0; }
nav > ul { columns: 14rem; }
dl { display: grid; grid-template-columns: minmax(7rem, 11rem) 1fr; gap: .4rem 1rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
.small, figcaption, .who { font-size: .875rem; }
.small, .note { color: var(--soft); }
.note { border-left: 3px solid var(--c1); padding-left: .7rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); }
th, td { text-align: right; white-space: nowrap; }
th { font-weight: 500; color: var(--soft); }
tbody th { font-weight: 400; color: var(--ink); }
tr > :first-child { text-align: left; white-space: normal; overflow-wrap: break-word; }
tr > :first-child { min-width: 7.5rem; max-width: 22rem; }
.charts { display: grid; gap: 1.2rem 2rem; margin: 1rem 0; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; }
figure > svg { display: block; width: 100%; height: auto; }
.key { margin-left: .9rem; color: var(--soft); white-space: nowrap; }
.swatch { width: .75rem; height: .75rem; vertical-align: -.05rem; }
.meter { width: clamp(3rem, 15vw, 9rem); height: .7rem; display: block; }
svg text { font-size: 11px; fill: var(--soft); }
.mid { text-anchor: middle; }
.end { text-anchor: end; }
.grid { stroke: var(--line); }
.axis { stroke: var(--soft); }
.rule { stroke: var(--ink); stroke-dasharray: 4 3; }
.c0 { fill: var(--c0); }
.c1 { fill: var(--c1); }
.c2 { fill: var(--c2); }
circle, path { fill-opacity: .75; }
.bar.c1 { fill-opacity: .45; stroke: var(--c1); }
.line { fill: none; stroke: var(--c0); stroke-width: 1.5; }
.line.s1 { stroke: var(--c1); stroke-dasharray: 5 3; }
details { margin: .3rem 0; }
summary { cursor: pointer; }
.text { white-space: pre-wrap; background: var(--wash); border-radius: 4px; padding: .5rem .7rem; }
article { border-top: 1px solid var(--line); margin-top: 1.5rem; }
article > :first-child { margin-top: 1rem; }
article ul { list-style: none; padding: 0; }
.who { margin: .8rem 0 .2rem; }
.asked { border-left: 3px solid var(--c0); }
.asked .text, .asked summary { background: none; padding: .1rem .7rem; }
.badge { font-size: .8rem; font-weight: 500; padding: 0 .6rem; }
.badge { border: 1px solid var(--c1); border-radius: 1rem; }
.badge.kept { border-color: var(--c0); }
"""
for _i, _colour in enumerate(shared.COLOURS):
    STYLE = STYLE.replace(f"COLOUR{_i}", _colour)


def build_page(runs: list[Run], args: Args) -> str:
    """The whole page; one section a run, and the numbers that compare them on top."""
    title = "SPA run " + runs[0].name if len(runs) == 1 else f"SPA: {len(runs)} runs"
    level = 2 if len(runs) == 1 else 3
    numbers = [key_numbers(run) for run in runs]
    labels = list(dict.fromkeys(label for one in numbers for label in one))
    lines = [[label, *(one.get(label, "–") for one in numbers)] for label in labels]
    body, contents = [], []
    for i, run in enumerate(tqdm(runs, desc="report", unit="run")):
        parts, links = [], []
        sections = [(key, name, show(run, args)) for key, name, show in SECTIONS]
        sections.append(("prompts", "Prompts in full", show_prompts(run, args, level + 1)))
        for key, name, shown in sections:
            anchor = f"run{i + 1}-{key}"
            links.append(h("li", h("a", name, href=f"#{anchor}")))
            parts.append(h("section", h(f"h{level}", name), *shown, id=anchor))
        if len(runs) == 1:
            body, contents = parts, links
        else:
            body.append(h("section", h("h2", run.name), *parts, id=f"run{i + 1}"))
            contents.append(h("li", h("a", run.name, href=f"#run{i + 1}"), folded("sections", h("ul", *links))))
    glance = h(
        "section",
        h("h2", "Key numbers"),
        table("Means with 95 % intervals, and counts", ["", *(run.name for run in runs)], lines),
    )
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=policy),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("title", title),
        h("link", rel="icon", href="data:,"),
        h("style", Html(STYLE)),
    )
    main = h("main", h("h1", title), h("nav", h("ul", *contents), aria_label="Contents"), glance, *body)
    return "<!doctype html>\n" + h("html", head, h("body", main), lang="en")


def choose_runs(args: Args) -> list[tuple[str, Path]]:
    """(name, folder) of each run that is asked for; UserError if a name stands twice."""
    if not args.runs:
        return [(Path(args.run_dir).resolve().name, Path(args.run_dir))]
    chosen = []
    for spec in args.runs:
        name, folder = shared.split_spec(spec)
        chosen.append((name or Path(folder).resolve().name, Path(folder)))
    twice = [name for name, count in Counter(name for name, _ in chosen).items() if count > 1]
    check(not twice, f"--runs: '{' '.join(twice)}' twice; give each a NAME=DIR of its own")
    return chosen


def main(args: Args) -> None:
    common.check_at_least(args, 0, "prompts")
    chosen = choose_runs(args)
    runs = [read_run(name, folder) for name, folder in chosen]
    if args.output:
        output = Path(args.output)
        check(not output.is_dir(), f"--output {output} is a folder; a file is wanted")
        output.parent.mkdir(parents=True, exist_ok=True)
    elif args.runs:
        output = shared.output_path(args.output_dir, "report.html")
    else:
        output = chosen[0][1] / "report.html"
    shared.write_text(output, build_page(runs, args))
    for run in runs:
        counts = {label: count for label, count, _ in funnel(run)}
        said = [f"{len(run.answers())} prompts"]
        said += [f"{counts[label]} {label}" for label in ("kept", "pairs") if label in counts]
        said += [f"{count} {label}" for label, count in counts.items() if label.startswith("training")]
        print(f"{run.name}: {', '.join(said)}")
        for reason in dict.fromkeys(run.missing.values()):
            print(f"  missing: {reason}")
    print(f"wrote {output} ({math.ceil(output.stat().st_size / 1024)} kB)")


if __name__ == "__main__":
    common.run_stage(main, Args)
