"""Which way did the prompts move? Primary × secondary scores before and after, and the paper's ordering.

Each prompt is a point (its mean scores on the first two objectives); the Pareto front is the points that no other one
beats on both axes.
From the first run to each other one every shared prompt moves up, down or sideways on each axis: where the
primary falls the priority is broken, whatever the secondary gained.

    reads   run directories with 02_scores.jsonl: the first is "before", each other one an "after"
    writes  OUTPUT_DIR/frontier.csv (a row per prompt and run), frontier.md, frontier.png, .pdf
    run     python eval/frontier.py --runs Vanilla=runs/x/test_base SPA=runs/x/test_trained
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import shared

import common
from common import arg, check

MOVES = ["up", "same", "down"]


@dataclass
class Args:
    runs: list[str] = arg(None, f"{shared.RUN_HELP}; the first is before")
    tolerance: float = arg(1e-6, "a change up to this much counts as none; about 0.1 for expected scores")
    allow_differences: bool = arg(False, "compare runs although judge, definitions or ways of reading differ")
    output_dir: str = arg("runs/eval", "folder of the table and the figure")


def pareto_front(points: np.ndarray) -> np.ndarray:
    """The points (N, 2) that no other one matches on both axes and beats on one, by rising first axis."""
    front, best = [], -math.inf
    for x, y in sorted(set(map(tuple, points.tolist())), reverse=True):
        if y > best:
            front.append((x, y))
            best = y
    return np.array(front[::-1])


def main(args: Args) -> None:
    common.check_at_least(args, 0, "tolerance")
    runs = shared.read_runs(args.runs, least=2, allow_differences=args.allow_differences)
    check(len({run.test_set for run in runs}) == 1, "--runs: one test set at a time")
    names = runs[0].objectives[:2]
    if len(runs[0].objectives) > 2:
        common.warn(f"of {len(runs[0].objectives)} objectives only {names[0]} and {names[1]} are shown")
    means, moves = [run.means()[names] for run in runs], {}
    for run, after in zip(runs[1:], means[1:], strict=True):
        shared.shared_ids(runs[0], run)  # an id is the same prompt in both
        change = shared.gains(after, means[0])
        check(len(change), f"{runs[0].path} and {run.path} have no scored prompt in common")
        # how many prompts made each pair of moves: a row a move of the primary, a column one of the secondary
        steps = np.where(change > args.tolerance, "up", np.where(change < -args.tolerance, "down", "same"))  # (N, 2)
        counts = pd.crosstab(steps[:, 0], steps[:, 1]).reindex(index=MOVES, columns=MOVES, fill_value=0)
        moves[f"{runs[0].name} → {run.name}"] = counts

    tables, path = {}, shared.output_path(args.output_dir, "frontier.md")
    with shared.figure(path, width=5.6, height=5.2) as axes:
        for run, points, marker, colour in zip(runs, means, "osD^vP*X" * 9, shared.COLOURS * 9, strict=False):
            on_front = pareto_front(points.to_numpy()).tolist()
            tables[run.name] = points.assign(on_front=[point in on_front for point in points.to_numpy().tolist()])
            primary, secondary = points.to_numpy().T
            own = {"marker": marker, "color": colour}
            axes.scatter(secondary, primary, s=16, alpha=0.45, **own)
            axes.step(*pareto_front(np.stack([secondary, primary], axis=1)).T, where="pre", color=colour, linewidth=1)
            label = f"{run.name}: mean {primary.mean():.2f}, {secondary.mean():.2f}"
            axes.scatter(secondary.mean(), primary.mean(), s=150, edgecolor="black", label=label, **own)
        axes.set(xlabel=f"{names[1]} (secondary)", ylabel=f"{names[0]} (primary)")
        axes.legend(title="large: mean; line: Pareto front", loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    facts = {"primary": names[0], "secondary": names[1], "unlike": shared.differences(runs)}
    text = shared.render_page("frontier.md", moves=moves, **facts)
    shared.write_table(args.output_dir, "frontier", text, pd.concat(tables, names=["run", "id"]).reset_index())
    print(f"{text}\nwrote {path}, .csv, .png and .pdf")


if __name__ == "__main__":
    common.run_stage(main, Args)
