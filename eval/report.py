"""One self-contained HTML page for a run directory: what came in, what was dropped, what was learnt from it.

Funnel, scores, det Σ with ρ, pairs and their weights, trainings side by side, some prompts in full; with --test_runs
the answers before and after training. No network, no script, no other file: it can be mailed. A run may have stopped
after any stage; what is missing is said. The same files give the same bytes. Here are its numbers; words, layout and
colours: eval/pages/report.html.

    reads   RUN_DIR/01_samples.jsonl to 05_pairs.jsonl, *_metrics.jsonl and *_args.json, those that are there
    writes  RUN_DIR/report.html (--output); of several runs runs/eval/report.html
    run     python eval/report.py --run_dir runs/default --test_runs base=runs/test_base trained=runs/test_trained
            python eval/report.py --runs SPA=runs/a "w/o NF=runs/b" --output compared.html
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import shared
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from shared import round_half_up
from tqdm import tqdm

import common
from common import arg, check

MOST_POINTS = 2000  # of a scatter plot
PAGE = Path(__file__).with_name("pages") / "report.html"
# file -> the stage that makes it, and what its rows must have (see common.read_rows)
FILES = {
    "01_samples.jsonl": ("01_sample", {}),
    "02_scores.jsonl": ("02_score", {"scored": True}),
    "03_refined.jsonl": ("03_refine", {"scored": True, "refined": True}),
    "04_denoised.jsonl": ("04_denoise", {"scored": True}),
    "04_dropped.jsonl": ("04_denoise", {"scored": True}),
    "05_pairs.jsonl": ("05_pairs", {}),
}
STAGES = ("01_sample", "02_score", "03_refine", "04_denoise", "05_pairs", "06_train")
# stage -> the file that it reads
BEFORE = dict(zip(STAGES[1:5], [file for file in FILES if file != "04_dropped.jsonl"][:4], strict=True))
REASONS = ("unscored", "inconsistent", "det_zero", "det_above_rho")  # why stage 4 drops a prompt
CURVES = ("loss", "rewards/margins", "rewards/accuracies", "learning_rate", "grad_norm")


@dataclass
class Args:
    run_dir: str = arg("runs/default", "folder of the run's files")
    runs: list[str] | None = arg(None, "several runs side by side instead, NAME=DIR each")
    test_runs: list[str] | None = arg(None, "scored answers to test prompts, NAME=DIR each, the untrained first")
    output: str | None = arg(None, "the page; default: report.html in --run_dir, of several runs in --output_dir")
    output_dir: str = arg("runs/eval", "folder of the page of several runs")
    prompts: int = arg(10, "prompts that are shown in full, drawn by --seed")
    ids: list[str] | None = arg(None, "shows the prompts with these ids instead, nothing folded")
    seed: int = arg(0, "seed of that draw, and of the jitter of integer scores")


# ---------------------------------------------------------------------------------------------------------------------
# Reading: whatever a run has left, checked.


@dataclass
class Run:
    """The files of a run directory, and what follows from them at once."""

    name: str
    rows: dict[str, list[dict]]  # by file
    missing: dict[str, str]  # file -> why it is not in `rows`
    records: dict[str, dict]  # by stage
    trainings: dict[str, dict]  # by the stem of their files, that of 06_model first

    def __post_init__(self):
        # the rows of the furthest file that has every prompt
        wholes = (["03_refined"], ["04_denoised", "04_dropped"], ["02_scores"], ["01_samples"])
        found = ([row for file in files for row in self.rows.get(f"{file}.jsonl", [])] for files in wholes)
        self.answers = next((rows for rows in found if rows), [])
        # {"01": the arguments of stage 1, …} up to 05; what a record says of earlier stages stands in for theirs
        self.made: dict[str, dict] = {}
        for stage, record in self.records.items():
            if stage != "06_train" and record:
                self.made = {**record.get("earlier", {}), **self.made, stage[:2]: common.facts_of(record)}
        self.scored_by = next((args for args in reversed(self.made.values()) if args.get("objectives")), {})
        self.judge = shared.judge_name(self.scored_by)  # None where nothing was scored
        self.model = next((args["model"] for args in self.made.values() if args.get("model")), None)
        # id -> scores or None of each candidate; of the refined answer, in a list of one
        self.candidates = {str(row["id"]): [one.get("scores") for one in row["responses"]] for row in self.answers}
        self.refined = {str(row["id"]): [row["refined"]["scores"]] for row in self.answers if "refined" in row}
        self.names = shared.objective_names(self.made, self.candidates)
        dropped, kept = (self.rows.get(file, []) for file in ("04_dropped.jsonl", "04_denoised.jsonl"))
        # id -> "kept", or the reason for which stage 4 dropped the prompt
        self.fates = {str(row["id"]): str(row.get("reason")) for row in dropped}
        self.fates |= {str(row["id"]): "kept" for row in kept}
        refined = self.refined if self.argument("04_denoise", "cov_scope") == "all" else {}
        points = {id: [*group, *refined.get(id, ())] for id, group in self.candidates.items()}
        self.dets = shared.dets_of(points, [*kept, *dropped], self.argument("04_denoise", "ddof", 0))
        # the arguments of 06_model's training, else of the first one there, before others of one that weights pairs
        others = [made["args"] for made in self.trainings.values() if made["args"]]
        named = min(others, key=lambda given: given.get("loss") != "spa", default={})
        self.trained = self.records["06_train"].get("args") or named
        self.pairs, self.alpha = self.rows.get("05_pairs.jsonl", []), self.trained.get("alpha", 1.0)
        self.weights = pair_weights([pair["gap"] for pair in self.pairs], self.alpha)

    def argument(self, stage: str, name: str, default=None):
        """An argument of a stage, as its record has it."""
        return self.records[stage].get("args", self.made.get(stage[:2], {})).get(name, default)


def read_pairs(path: Path) -> list[dict]:
    """The rows of 05_pairs.jsonl, checked as far as this page needs them."""
    fields = {"id", "chosen", "rejected", "margin", "gap"}
    wanted = f"a pair has {', '.join(sorted(fields))}: two lists of messages, two numbers of 0 or more"
    rows = list(shared.read_jsonl(path, fields, wanted))
    for where, row in rows:
        last = [row[side][-1] if isinstance(row[side], list) and row[side] else {} for side in ("chosen", "rejected")]
        fits = all(isinstance(one, dict) and isinstance(one.get("content"), str) for one in last)
        check(fits and all(is_number(row[key]) and row[key] >= 0 for key in ("margin", "gap")), f"{where}: {wanted}")
    return [row for _, row in rows]


def read_training(path: Path) -> dict:
    """Record and metrics of a training; a last line without its end, left by a kill, does not count."""
    rows, record = [], common.read_record(path.with_name(path.name.replace("_metrics.jsonl", "_args.json")))
    for number, line in common.read_lines(path):
        if line.endswith("\n"):
            rows.append(common.parse_json(line, f"{path}, line {number}"))
            fits = isinstance(rows[-1], dict) and isinstance(rows[-1].get("step"), int)
            check(fits, f"{path}, line {number}: a row of metrics with a 'step' is wanted")
    # over fixed prompts, before, (during) and after training, under plain names
    fixed = [row for row in rows if any(name.startswith(("train/", "eval/")) for name in row)]
    held_out = any(name.startswith("eval/") for row in fixed for name in row)
    fixed = [{name.removeprefix("train/").removeprefix("eval/"): row[name] for name in row} for row in fixed]
    made = {"args": record.get("args", {}), "complete": record.get("complete", True), "held_out": held_out}
    return made | {"steps": [row for row in rows if "learning_rate" in row], "fixed prompts": fixed}


def redone(path: Path, records: dict[str, dict], stage: str) -> str | None:
    """The stage before `stage` that was redone since: its file is another than `stage`, or one between, has read."""
    before, record = BEFORE.get(stage), records[stage]
    if not before or not record or record["args"].get("input"):  # the file may lie elsewhere
        return None
    known, earlier = [record.get("inputs", {}).get(name) for name in ("source", before)], FILES[before][0]
    other = any(known) and (path / before).is_file() and common.digest(path / before) not in known
    return earlier if other else redone(path, records, earlier)


def read_run(name: str, path: Path) -> Run:
    """All that is in a run directory, but for what an unfinished stage has, or one that was not redone with those
    before it; UserError if it is none.
    """
    check(path.is_dir(), f"no run directory {path}")
    records = {stage: common.read_record(path / f"{stage[:2]}_args.json") for stage in STAGES}
    rows, missing = {}, {}
    for file, (stage, wanted) in FILES.items():
        if not (path / file).exists():
            missing[file] = f"{file} is not there ({stage}.py)"
        elif not records[stage].get("complete", True):
            missing[file] = f"{stage}.py has not finished"
        elif earlier := redone(path, records, stage):
            missing[file] = f"{earlier}.py was redone, {stage}.py not yet"
        elif file == "05_pairs.jsonl":
            rows[file] = read_pairs(path / file)
        else:
            rows[file] = list(common.read_rows(path / file, **wanted))
    files = {file.name.removesuffix("_metrics.jsonl"): file for file in sorted(path.glob("*_metrics.jsonl"))}
    trainings = {stem: read_training(files[stem]) for stem in sorted(files, key=lambda stem: stem != "06")}
    if not trainings:
        missing["06_metrics.jsonl"] = "06_metrics.jsonl is not there (06_train.py)"
    check(bool(rows or trainings), f"{path} has no file of any stage; run 01_sample.py with it first")
    return Run(name, rows, missing, records, trainings)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers, from the rows.


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value) -> str:
    """A number as the page prints it: integers as they are, others with four digits."""
    if not is_number(value):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def read_of(groups: dict[str, list]) -> list[list]:
    """All scores that were read."""
    return shared.read_scores([*itertools.chain(*groups.values())])


def pair_weights(gaps: list[float], alpha: float) -> list[float]:
    """w_i = (gap_i / mean gap)^α (section 3.4) with the mean over the data set; [] if the mean is 0."""
    mean = sum(gaps) / len(gaps) if gaps else 0
    return [(gap / mean) ** alpha for gap in gaps] if mean else []


# ---------------------------------------------------------------------------------------------------------------------
# Figures by matplotlib, as SVG whose letters and colours are the page's: it knows those that stand here.

SERIES, AXES = shared.COLOURS[:4], "#808080"
LINES = {"steps": {"marker": "o", "markersize": 3}}  # of a training's metrics
LINES["fixed prompts"] = {"marker": "D", "markersize": 5, "linestyle": "--"}
HINT = "hint: "  # an artist's id that begins so is shown where the mouse rests


def picture(run: Run, title: str, says: str, draw) -> dict:
    """A figure of the page, drawn by draw(axes); `says` tells those who can't see it what it shows."""
    salt = {"svg.hashsalt": f"{run.name}/{title}"}
    with matplotlib.rc_context(salt, PAGE.with_suffix(".mplstyle")), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # signs that its own font lacks: the page is shown with the reader's
        drawing = Figure(figsize=(5, 230 / 72), layout="constrained")
        axes = drawing.subplots()
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            drawing.legend(handles, labels, loc="outside upper left", ncols=2, borderpad=0)
        file = io.StringIO()
        drawing.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<g ") : svg.rindex("</svg>")]
    # the page's policy forbids style attributes: each property becomes an attribute of its own
    svg = re.sub(r' style="([^"]*)"', lambda style: re.sub(r"(?:^|; )([a-z-]+): ([^;]*)", r' \1="\2"', style[1]), svg)
    svg = re.sub(rf"""<g id=(["']){HINT}(.*?)\1>""", r"<g><title>\2</title>", svg)
    svg = re.sub(r' id="[\w.]*_\d+"', "", svg)  # of what is used nowhere else; they stand in every figure
    return {"title": title, "says": says, "drawing": svg}


def bars(run: Run, title, x_label, groups: dict[str, list], what="", share=False, rules=(), bins=None, linear=None):
    """The figure of how many of `what` fall into each bin, by group: counts, stacked, or shares side by side.

    rules: (place, text); bins: (edges, labels); linear: where the axis is no more logarithmic.
    """
    edges, labels = bins or bins_of([*itertools.chain(*groups.values())])
    groups = {name: np.clip(of, edges[0], edges[-1]) for name, of in groups.items()}  # no binary dust beyond the edges
    counts = pd.DataFrame({name: np.histogram(of, edges)[0] for name, of in groups.items()}, index=labels)
    heights = counts * (100 / counts.sum()) if share else counts

    def draw(axes):
        weights = [np.full(len(of), 100 / len(of) if share else 1) for of in groups.values()]
        style = {"stacked": not share, "rwidth": 0.86, "color": SERIES[: len(groups)], "label": list(groups)}
        axes.hist(list(groups.values()), edges, weights=weights, **style)
        for name, made in zip(heights, axes.containers, strict=True):
            for bar, (label, height) in zip(made, heights[name].items(), strict=True):
                bar.set_gid(f"{HINT}{name}, {label}: {number(height)}")
        for place, text in rules:
            axes.axvline(place, color=AXES, linestyle="--")
            axes.text(place, 1, text, transform=axes.get_xaxis_transform(), ha="center", va="bottom")
        axes.set(xlabel=x_label, ylabel=f"% of the {what}" if share else what)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=not share, steps=[1, 2, 5, 10]))
        if linear:
            axes.set_xscale("symlog", linthresh=linear, linscale=0.5)
            axes.set_xlim(0)
            axes.xaxis.set_major_formatter(lambda x, _: "" if 0 < x < linear else f"{x:g}")

    says = []
    for name in heights:
        listed = (f"{label}: {number(height)}" for label, height in heights[name].items() if height)
        says.append(f"{name}: {', '.join(listed)}")
    counted = {"counts": list(counts.itertuples(name=None)), "groups": list(groups)}
    return picture(run, title, ". ".join(says), draw) | counted


def bins_of(values: list[float]) -> tuple[list[float], list[str]]:
    """(edges, labels): a bin per integer, or about a dozen of equal width between round numbers."""
    low, high = min(values), max(values)
    if all(value == int(value) for value in values) and high - low <= 20:
        whole = range(int(low), int(high) + 1)
        return [k - 0.5 for k in (*whole, whole[-1] + 1)], [str(k) for k in whole]
    pad = 0 if low < high else 0.5
    edges = MaxNLocator(12, steps=[1, 2, 5, 10]).tick_values(low - pad, high + pad).tolist()
    return edges, [f"{a:g} to {b:g}" for a, b in itertools.pairwise(edges)]


# ---------------------------------------------------------------------------------------------------------------------
# Sections, in the order of the page: each has its figures, and the numbers that the page puts into tables and words.


def absent(run: Run, *files: str) -> dict:
    """A section that says what it would need."""
    reasons = dict.fromkeys(run.missing[file] for file in files if file in run.missing)
    return {"absent": "; ".join(reasons) or "no row has what is needed"}


def show_funnel(run: Run, args: Args) -> dict:
    """How many prompts came to each file, and how many stage 4 dropped for which reason."""
    rows, fates = run.rows, Counter(run.fates.values())
    counts = {
        "01_samples.jsonl": len(rows.get("01_samples.jsonl", [])),
        "02_scores.jsonl": sum(map(any, run.candidates.values())),
        "03_refined.jsonl": len(read_of(run.refined)),
        "04_denoised.jsonl": fates["kept"],
        "05_pairs.jsonl": len({str(pair["id"]) for pair in run.pairs}),
    }
    counts = {file: count for file, count in counts.items() if file in rows}
    reasons = (*REASONS, *sorted(fates.keys() - {*REASONS, "kept"})) if "04_dropped.jsonl" in rows else ()
    answers, dropped = run.candidates.values(), {reason: fates[reason] for reason in reasons}
    facts = {"counts": counts, "dropped": dropped, "most": max([*counts.values(), *dropped.values(), 1])}
    return facts | {"answers": sum(map(len, answers)), "read": len(read_of(run.candidates)), "prompts": len(answers)}


def show_scores(run: Run, args: Args) -> dict:
    groups = {"candidates": run.candidates, "refined": run.refined}
    read = {name: read_of(group) for name, group in groups.items() if read_of(group)}
    if not read:
        return absent(run, "02_scores.jsonl", "03_refined.jsonl")
    if "kept" in run.fates.values():
        for name, group in list(groups.items()):
            groups[f"{name}, kept prompts"] = {id: of for id, of in group.items() if run.fates.get(id) == "kept"}
    means = {name: shared.prompt_means(group, run.names) for name, group in groups.items()}
    scored = {name: f"{len(read_of(group))} of {sum(map(len, group.values()))}" for name, group in groups.items()}
    means["refined − candidates, same prompt"] = shared.gains(means["refined"], means["candidates"])
    mixed = [[*run.refined[id], scores] for id in run.refined for scores in run.candidates[id]]
    ties = [common.tie_rate(list(run.candidates.values())), common.tie_rate(mixed)]

    whole = all(score == int(score) for scores in read.values() for one in scores for score in one)
    charts = []
    for axis, name in enumerate(run.names):
        values = {group: [one[axis] for one in scores] for group, scores in read.items()}
        bins = bins_of([*itertools.chain(*values.values()), *((1, 10) if whole else ())])
        charts.append(bars(run, f"{name} scores", "score", values, "answers", share=True, bins=bins))
    return {"figures": charts, "means": means, "scored": scored, "ties": ties}


def show_scatter(run: Run, args: Args) -> dict:
    groups = (("candidates", run.candidates), ("refined", run.refined))
    points = [(kind, *scores[:2]) for kind, group in groups for scores in read_of(group)]
    points = pd.DataFrame(points, columns=["kind", "x", "y"])
    if points.empty:
        return absent(run, "02_scores.jsonl", "03_refined.jsonl")
    lines = [[kind, len(of), *map(round_half_up, of[["x", "y"]].mean())] for kind, of in points.groupby("kind")]
    drawn = points.sample(min(len(points), MOST_POINTS), random_state=args.seed % (1 << 32)).sort_index()
    if whole := bool((points[["x", "y"]] % 1 == 0).all(axis=None)):  # on a grid, so moved apart
        drawn[["x", "y"]] += np.random.default_rng(abs(args.seed)).uniform(-0.3, 0.3, (len(drawn), 2))

    def draw(axes):
        for i, (kind, of) in enumerate(drawn.groupby("kind")):
            marks = {"linestyle": "", "marker": "oD"[i], "markersize": 5, "alpha": 0.75, "markeredgewidth": 0}
            axes.plot(of.x, of.y, color=SERIES[i], label=kind, clip_on=False, **marks)
        primary, secondary = (shared.visible(name)[:40] for name in run.names[:2])
        axes.set(xlabel=f"{primary} (primary)", ylabel=f"{secondary} (secondary)")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(11, integer=whole, steps=[1, 2, 5, 10]))

    says = "; ".join(f"{count} {name}, mean {a} and {b}" for name, count, a, b in lines)
    shown = {"figures": [picture(run, "Each answer's two scores", says, draw)], "means": lines}
    return shown | {"whole": whole, "number": len(points), "drawn": len(drawn)}


def show_det(run: Run, args: Args) -> dict:
    if not run.dets:
        return absent(run, "02_scores.jsonl", "04_denoised.jsonl")
    fate = {id: run.fates.get(id, "not filtered") for id in run.dets}
    fate = {id: of if of in ("kept", "not filtered") else "dropped" for id, of in fate.items()}
    names = [name for name in ("kept", "dropped", "not filtered") if name in fate.values()]
    groups = {name: [det for id, det in run.dets.items() if fate[id] == name] for name in names}
    rho, least = run.argument("04_denoise", "rho"), run.argument("04_denoise", "det_min") or 0
    # bins are half decades, and one for 0, which no logarithm has
    positive = [det for det in (*run.dets.values(), rho or 0) if det > 0] or [1.0]
    low, high = (math.floor(2 * math.log10(end)) for end in (min(positive), max(positive)))
    edges = [0, *(10 ** (k / 2) for k in range(low, high + 2))]
    edges[1] = min(edges[1], *positive)  # binary dust
    labels = ["0", *(f"{a:.3g} to {b:.3g}" for a, b in itertools.pairwise(edges[1:]))]
    rules = [(value, f"{name} = {value:g}") for name, value in (("ρ", rho), ("det_min", least)) if value]
    title, label = "det Σ of a prompt's candidates", "det Σ (logarithmic; 0 apart)"
    chart = bars(run, title, label, groups, "prompts", rules=rules, bins=(edges, labels), linear=edges[1])
    groups = {name: pd.Series(values) for name, values in {**groups, "all": list(run.dets.values())}.items()}
    options = {name: run.argument("04_denoise", name) for name in ("ddof", "cov_scope", "informativeness")}
    return {"figures": [chart], "groups": groups, "rho": rho, "least": least} | options


def show_pairs(run: Run, args: Args) -> dict:
    if not run.pairs:
        return absent(run, "05_pairs.jsonl")
    margins, gaps = ([float(pair[name]) for pair in run.pairs] for name in ("margin", "gap"))
    totals = [[sum(pair.get(f"{side}_scores") or []) for side in ("chosen", "rejected")] for pair in run.pairs]
    facts = {"lower": sum(round(chosen - rejected, 9) < 0 for chosen, rejected in totals)}
    delta = run.argument("05_pairs", "delta")
    rules = [(delta, f"δ = {delta:g}")] if delta else []
    charts = [bars(run, "Margins", "sum of |ΔG|", {"pairs": margins}, "pairs", rules=rules)]
    charts.append(bars(run, "Gaps", "|Δ of the sum of G|", {"pairs": gaps}, "pairs"))
    if run.weights:
        w = np.array(run.weights)
        facts["effective"] = w.sum() ** 2 / (w**2).sum() / len(w)
        title, rules = f"Weights, α = {run.alpha:g}", [(1, "mean gap")]
        charts.append(bars(run, title, "(gap / mean gap)^α", {"pairs": run.weights}, "pairs", rules=rules))
    return facts | {"figures": charts}


def show_training(run: Run, args: Args) -> dict:
    if not run.trainings:
        return absent(run, "06_metrics.jsonl")
    return {"figures": [figure for name in CURVES if (figure := curve(run, name))]}


def curve(run: Run, name: str) -> dict | None:
    """A metric of all trainings over the steps, and over fixed prompts with a marker; None if no training has it."""
    lines, gammas, several = [], set(), len(run.trainings) > 1
    for i, (stem, made) in enumerate(run.trainings.items()):
        given = made["args"]
        if name == "rewards/margins" and given.get("loss") in ("spa", "simpo") and given.get("beta") is not None:
            gammas.add(given["beta"] * given.get("gamma_beta_ratio", 0))
        for j, (kind, style) in enumerate(LINES.items()):
            if points := [(row["step"], row[name]) for row in made[kind] if is_number(row.get(name))]:
                own = {"color": SERIES[(i if several else j) % len(SERIES)]}
                own["label"] = f"{shared.visible(stem)}, {kind}" if several else kind
                lines.append((points, style | own | ({"marker": ""} if len(points) > 60 else {})))
    if not lines:
        return None

    def draw(axes):
        for points, style in lines:
            axes.plot(*np.transpose(points), linewidth=1.5, **style)
        for gamma in sorted(gammas):
            axes.axhline(gamma, color=AXES, linestyle="--")
            axes.text(1, gamma, f"γ = {gamma:g}", transform=axes.get_yaxis_transform(), ha="right", va="bottom")
        if name == "rewards/accuracies":
            axes.set_ylim(-0.05, 1.05)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))

    ends = [(style["label"], *points[0], *points[-1]) for points, style in lines]
    says = [f"{label}: {number(a)} at step {first}, {number(b)} at step {last}" for label, first, a, last, b in ends]
    return picture(run, name, ". ".join(says), draw)


def choose(rows: list[dict], args: Args) -> list[dict]:
    """The rows of --ids in their order, else drawn ones."""
    if args.ids:
        by_id = {str(row["id"]): row for row in rows}
        return [by_id[id] for id in dict.fromkeys(args.ids) if id in by_id]
    return sorted(rows, key=lambda row: common.derive_seed(args.seed, row["id"]))[: args.prompts]


def show_prompts(run: Run, args: Args) -> dict:
    if not run.answers:
        return absent(run, "01_samples.jsonl")
    pairs, shown = defaultdict(list), []
    for pair, weight in itertools.zip_longest(run.pairs, run.weights):
        pairs[str(pair["id"])].append((pair, weight))
    for row in choose(run.answers, args):
        answers = {f"answer {i}": response for i, response in enumerate(row["responses"], 1)}
        answers |= {"refined": row["refined"]} if "refined" in row else {}
        label_of = {answer["text"]: label for label, answer in reversed(answers.items())}  # of equal texts the first
        id, lines = str(row["id"]), []
        for pair, weight in pairs[id]:
            sides = [label_of.get(pair[side][-1]["content"], "another text") for side in ("chosen", "rejected")]
            lines.append([" > ".join(sides), number(pair["margin"]), number(pair["gap"]), number(weight)])
        prompt = {"id": id, "asked": common.plain_text(row["prompt"]), "answers": answers, "names": run.names}
        prompt |= {"fate": run.fates.get(id, "not filtered"), "det": run.dets.get(id)}
        shown.append(prompt | {"pairs": lines if "05_pairs.jsonl" in run.rows else None})
    return {"shown": shown, "number": len(run.answers)}


def show_tests(runs: list[shared.Run], args: Args) -> list[dict]:
    """Of each test set the systems' mean scores, and their answers to the same prompts; the first is the base."""
    sets = []
    for test_set, (base, *others) in shared.by_test_set(runs).items():
        names = base.objectives
        means = {run.name: shared.prompt_means(run.groups, names) for run in (base, *others)}
        for run in others:
            shared.shared_ids(base, run)  # an id is the same prompt in both
            means[f"{run.name} − {base.name}"] = shared.gains(means[run.name], means[base.name])
        first = {run.name: {row["id"]: row["responses"][0] for row in run.rows} for run in (base, *others)}
        rows = choose([row for row in base.rows if all(row["id"] in of for of in first.values())], args)
        sets.append({"name": test_set or "Test", "names": names, "means": means, "rows": rows, "first": first})
        sets[-1]["unlike"] = shared.differences([base, *others])
    return sets


# ---------------------------------------------------------------------------------------------------------------------
# The page.

SECTIONS = {"funnel": show_funnel, "scores": show_scores, "scatter": show_scatter, "det": show_det}
SECTIONS |= {"pairs": show_pairs, "training": show_training, "prompts": show_prompts}


def build_page(runs: list[Run], test_runs: list[shared.Run], args: Args) -> str:
    """The whole page: the numbers that compare the runs on top, then one part a run."""
    shown = []
    for i, run in enumerate(tqdm(runs, desc="report", unit="run"), 1):
        shown.append({key: show(run, args) for key, show in SECTIONS.items()} | {"of": run, "anchor": f"run{i}"})
        shown[-1]["definitions"] = shared.definitions(run.scored_by)
        shown[-1]["means"] = [shared.prompt_means(groups, run.names) for groups in (run.candidates, run.refined)]
        lines, (fit, verdict) = common.check_lines(run.made), common.judge_verdict(run.made, run.names)
        shown[-1]["checked"] = [line.removeprefix("judge check: ") for line in lines] + [verdict] * (not fit)
    functions = (is_number, number, shared.estimate, common.tie_rate, common.plain_text)  # for the page
    facts = {"tests": show_tests(test_runs, args), "whole": bool(args.ids), "seed": args.seed, "curves": CURVES}
    return shared.render_page(PAGE.name, runs=shown, **facts, **{one.__name__: one for one in functions})


def main(args: Args) -> None:
    common.check_at_least(args, 0, "prompts")
    folders = shared.read_named(args.runs or [str(Path(args.run_dir).resolve())], "--runs", "NAME=DIR")
    folders = folders if args.runs else dict.fromkeys(folders, args.run_dir)
    runs = [read_run(name, Path(folder)) for name, folder in folders.items()]
    test_runs = shared.read_runs(args.test_runs, per_set=True) if args.test_runs else []
    rows = itertools.chain(*(run.answers for run in runs), *(run.rows for run in test_runs))
    there = {str(row["id"]) for row in rows}
    for id in args.ids or ():
        check(id in there, f"--ids: no prompt has the id '{id}'; 01_samples.jsonl has them")
    output = Path(args.output or Path(args.output_dir if args.runs else args.run_dir) / "report.html")
    check(not output.is_dir(), f"--output {output} is a folder; a file is wanted")
    output.parent.mkdir(parents=True, exist_ok=True)
    shared.write_text(output, build_page(runs, test_runs, args))
    for run in runs:
        said = [f"{len(run.answers)} prompts"]
        said += [f"{[*run.fates.values()].count('kept')} kept"] if "04_denoised.jsonl" in run.rows else []
        said += [f"{len(run.pairs)} pairs"] if "05_pairs.jsonl" in run.rows else []
        said += [f"{len(made['steps'])} training steps ({stem})" for stem, made in run.trainings.items()]
        print("\n  missing: ".join([f"{run.name}: {', '.join(said)}", *dict.fromkeys(run.missing.values())]))
    print(f"wrote {output} ({math.ceil(output.stat().st_size / 1024)} kB)")


if __name__ == "__main__":
    common.run_stage(main, Args)
