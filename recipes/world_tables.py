"""The tables and the figure of the controlled world, from what recipes/world_runs.py has written.

Every table has a system to which the others are compared: paired differences over the cells (a base and a seed), with
Student's 95 % interval over the cells. Single intervals just off 0 mean nothing among so many.

    reads   OUTPUT_DIR/base{B}/seed{S}/results.jsonl
    writes  OUTPUT_DIR/world.md (all tables), world.csv (every row), world.svg (the figure)
    run     python recipes/world_tables.py --output_dir runs/world
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]

import matplotlib  # noqa: E402
import pandas as pd  # noqa: E402
import world  # noqa: E402
from scipy import stats  # noqa: E402

import common  # noqa: E402
from common import arg, check  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FILTERS = ["SPA", "consistency only", "informativeness only", "w/o NF"]
SOUPS = ["6:4", "7:3", "8:2", "9:1"]
LOSSES = ["SPA", "SimPO", "DPO", "SFT"]
KINDS = [f"{kind}, {prompts} prompts" for kind in ("strict", "weak", "off") for prompts in ("same", "new")]
ROUNDS = [f"{kind}, round {turn}" for kind in KINDS for turn in range(2, 9)]
# title -> (the system to compare with, the others, σ)
TABLES = {
    "Does SPA raise both goals, and how much of it is the refined answer?": (
        "base", ["SPA", "no refined answer", "no refined answer, w/o NF", "refined pairs only"], 1.0),
    **{f"Filters, each with all it keeps, σ = {s:g}": ("w/o NF", FILTERS[:3], s) for s in (0.0, 1.0, 2.0, 3.0)},
    **{f"Filters at equal numbers of prompts, σ = {s:g}": (
        "w/o NF, equal", [f"{name}, equal" for name in FILTERS[:3]], s) for s in (0.0, 1.0, 2.0, 3.0)},
    "What does α trade?": ("SPA", ["SimPO", "α=0.5", "α=2", "α=4"], 1.0),
    "Order and gap": ("SPA", [f"soup {name}, refined and filters" for name in SOUPS] + [
        "lexicographic, gap 7:3", "lexicographic, signed gap", "weighted 7:3, total gap"], 1.0),
    "Weighted sums as in appendix A (no refined answer, no filters)": (
        "no refined answer, w/o NF", [f"soup {name}" for name in SOUPS] + ["SPA"], 1.0),
    "Losses at equal steps": ("SPA", LOSSES[1:], 1.0),
    "Losses along the training path (60 steps elsewhere)": (
        "SPA", [f"{name}, {steps} steps" for steps in (15, 120) for name in LOSSES], 1.0),
    "Rounds": ("SPA", ["weak consistency", "w/o NF", *ROUNDS], 1.0),
    "A scorer that is blind to one class of hazards": (
        "SPA", ["w/o NF", "blind scorer", "blind scorer, w/o NF"], 1.0),
    "Three objectives: harmlessness a, helpfulness b, brevity c (four candidates)": (
        "order ab, w/o NF", [f"order {order}{kind}" for kind in (", w/o NF", ", weak consistency", "")
                             for order in ("ab", "abc", "acb") if order + kind != "ab, w/o NF"], 1.0),
}  # fmt: skip
SHOWN = [
    "G_a",
    "G_b",
    "G_c",
    "HH",
    "hazards",
    "hazards 2",
    "G_a fell",
    "G_b benign",
    "G_a T=1",
    "G_b T=1",
    "prompts",
    "pairs",
]
SHOWN += ["wrong", "wrong primary", "kept with", "kept without", "det with", "det without"]
FEW = {"G_c": "Three", "hazards 2": "blind", "kept with": "blind", "kept without": "blind", "det with": "blind",
       "det without": "blind"}  # columns of one table  # fmt: skip


@dataclass
class Args:
    output_dir: str = arg("runs/world", "folder of the world's runs")


def mean_and_interval(values: pd.Series) -> tuple[float, float]:
    """The mean over cells, and half of Student's 95 % interval (nan with one cell)."""
    values = values.dropna()
    half = stats.t.ppf(0.975, len(values) - 1) * values.std() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean(), half


def with_interval(values: pd.Series) -> str:
    """+0.20 [-0.11, +0.51]; – where there is nothing, no interval of a single cell."""
    mean, half = mean_and_interval(values)
    interval = "" if math.isnan(half) else f" [{mean - half:+.2f}, {mean + half:+.2f}]"
    return "–" if math.isnan(mean) else f"{mean:+.2f}{interval}"


def markdown(table: pd.DataFrame) -> str:
    rows = [list(table), ["---"] * table.shape[1], *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def make_table(rows: pd.DataFrame, title: str, reference: str, others: list[str], sigma: float) -> pd.DataFrame:
    """Means over the cells in which a system could be trained, and paired differences from the reference there."""
    found = []
    cells = {name: own.set_index(["base", "seed"]) for name, own in rows.groupby("system")}
    at = {name: own[(own.sigma == sigma) | (name == "base")] for name, own in cells.items()}
    for name in [reference, *others]:
        if name not in at or at[name].empty:
            continue
        own = at[name]
        row = {"system": name, "cells": int(own.G_a.notna().sum())}
        for key in [key for key in SHOWN if FEW.get(key, "") in title]:
            digits = 0 if key in ("prompts", "pairs") else 3 if key.startswith("wrong") else 2
            value = own[key].mean() if key in own else math.nan
            row[key] = "" if math.isnan(value) else f"{value:.{digits}f}"
        for key in ("G_a", "G_b", *["G_c"] * ("Three" in title), "HH") if reference in at else ():
            row[f"Δ{key}"] = "" if name == reference else with_interval(own[key] - at[reference][key])
        found.append(row)
    return pd.DataFrame(found)


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Primary against secondary goal: systems as points with intervals, the base, and the ideal."""
    shown = {  # system: what the figure calls it, and where its name stands, in points
        "base": ("the model before", (8, 6)), "SPA": ("SPA", (8, -14)), "SimPO": ("SimPO", (-38, 8)),
        "DPO": ("DPO", (8, 8)), "SFT": ("SFT", (8, -14)), "soup 9:1": ("weighted sum 9:1", (-70, -18)),
        "no refined answer, w/o NF": ("SPA without refined answers and filters", (-120, 24)),
        "soup 6:4": ("weighted sum 6:4", (10, -14)),
    }  # fmt: skip
    plt.rcParams |= {"svg.hashsalt": "world", "svg.fonttype": "none"}  # the same bytes from the same numbers
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, (label, offset) in shown.items():
        own = rows[(rows.system == name) & (rows.sigma == (0.0 if name == "base" else 1.0))]
        if own.G_a.notna().any():
            (a, half_a), (b, half_b) = mean_and_interval(own.G_a), mean_and_interval(own.G_b)
            bars = axes.errorbar(b, a, xerr=half_b, yerr=half_a, marker="o", capsize=2, linestyle="")
            axes.annotate(label, (b, a), offset, textcoords="offset points", color=bars[0].get_color())
    test = [json.loads(line) for _, line in common.read_lines(path.parent / "test.jsonl")]
    prompts = [row["prompt"] for row in test if row["topic"] == "conflict"]
    ideal = [world.truth(prompt, best_answer(prompt)) for prompt in prompts]
    a, b = (sum(value[i] for value in ideal) / len(ideal) for i in (0, 1))
    axes.plot(b, a, marker="*", markersize=14, linestyle="", color="black")
    axes.annotate("the best possible", (b, a), (-40, 12), textcoords="offset points")
    axes.set(
        xlabel="helpfulness, true (1 to 10)", ylabel="harmlessness, true (1 to 10)", ylim=(None, 10.5), xlim=(None, 10)
    )
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def best_answer(prompt: str) -> str:
    """Substitutes for the hazards, everything else as asked, with caution and tip."""
    context, things = world.read_prompt(prompt)
    words = [f"s{i}" if world.hazard(context, i) else f"a{i}" for i in things]
    return " ".join([world.CARE, *words, world.TIP])


def main(args: Args) -> None:
    folder = Path(args.output_dir)
    files = sorted(folder.glob("base*/seed*/results.jsonl"))
    check(files, f"{folder} has no results; recipes/world_runs.py writes them")
    lines = (line for file in files for _, line in common.read_lines(file))
    rows = pd.DataFrame([json.loads(line) for line in lines if line.endswith("\n")])  # a cut row is none
    rows.to_csv(folder / "world.csv", index=False)
    refined = rows[rows.system == "data: refined"].groupby("sigma")
    names = [f"{who} {key}" for who in ("candidates", "best", "refined") for key in ("G_a", "G_b")] + [
        "refined above all"
    ]
    parts = [
        "## The refined answers themselves, on the training prompts\n\n"
        + markdown(refined[names].mean().round(2).reset_index())
    ]
    for title, (reference, others, sigma) in TABLES.items():
        table = make_table(rows, title, reference, others, sigma)
        asked = reference in set(rows.system)  # a run for one question may have trained the others alone
        against = f"Differences from “{reference}”." if asked else f"No differences: “{reference}” was not trained."
        if len(table) > 1:
            parts.append(f"## {title}\n\n{against}\n\n" + markdown(table))
    text = "\n\n".join(parts) + "\n"
    (folder / "world.md").write_text(text, encoding="utf-8")
    print(text)
    draw(rows, folder / "world.svg")


if __name__ == "__main__":
    common.run_stage(main, Args)
