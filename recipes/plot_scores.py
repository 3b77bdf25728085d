"""Mean scores of systems as bars or lines, from the CSV of eval/judge_table.py: the paper's Figures 5, 6 and 7.

reads   --table: judge_table.csv
writes  beside it judge_table.png and .pdf: a panel for each test set; bars of the 95 % intervals over prompts, and a
        dot for the mean of each seed
run     python recipes/plot_scores.py --table runs/eval/judge_table.csv
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "eval"))

import pandas as pd
import shared

import common
from common import arg, check


@dataclass
class Args:
    table: str = arg(None, "the CSV file that eval/judge_table.py has written")
    line: bool = arg(False, "points joined by lines, for systems that are steps of one thing, instead of bars")


def main(args: Args) -> None:
    path = Path(args.table or "")
    check(path.is_file(), f"--table {path}: no such file; eval/judge_table.py writes judge_table.csv")
    rows = pd.read_csv(path, dtype={"test_set": str, "seeds": str}, keep_default_na=False)
    wanted = {"test_set", "system", "measure", "mean", "low", "high", "seeds"}
    check(wanted <= set(rows.columns), f"{path} is no table of eval/judge_table.py: a column of it is missing")
    rows = rows[~rows["measure"].str.match(r"HH[\d.]+$|rep-4$")]
    sets = list(rows["test_set"].unique())
    with shared.figure(path, columns=len(sets), width=6.4 * len(sets)) as panels:
        for name, axes in zip(sets, panels if len(sets) > 1 else [panels], strict=True):
            own = rows[rows["test_set"] == name]
            systems, measures = list(own["system"].unique()), list(own["measure"].unique())
            for k, measure in enumerate(measures):
                part = own[own["measure"] == measure].set_index("system").loc[systems].astype({"mean": float})
                low, high = (
                    pd.to_numeric(part[side], errors="coerce") for side in ("low", "high")
                )  # of one prompt: none
                x = [
                    i + (0 if args.line else 0.8 / len(measures) * (k - (len(measures) - 1) / 2))
                    for i in range(len(part))
                ]
                error = {"yerr": [part["mean"] - low, high - part["mean"]], "capsize": 3, "color": shared.COLOURS[k]}
                if args.line:
                    axes.errorbar(x, part["mean"], marker="o", label=measure, **error)
                else:
                    axes.bar(x, part["mean"], 0.75 / len(measures), label=measure, ecolor="black", **error)
                dots = [(at, float(mean)) for at, means in zip(x, part["seeds"], strict=True) for mean in means.split()]
                axes.scatter(*zip(*dots, strict=True), s=8, color="black", zorder=3)
            axes.set_xticks(range(len(systems)), systems, rotation=20)
            axes.set(title=name, ylabel="mean score")
            axes.legend(ncols=len(measures), loc="lower center", bbox_to_anchor=(0.5, -0.35))
    print(f"wrote {path.with_suffix('.png')} and .pdf")


if __name__ == "__main__":
    common.run_stage(main, Args)
