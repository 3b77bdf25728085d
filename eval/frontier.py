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
import shared

import common
from common import arg, check

MOVES = ("up", "same", "down")


@dataclass
class Args:
    runs: list[str] = arg(None, f"{shared.RUN_HELP}; the first is before")
    tolerance: float = arg(1e-6, "a change up to this much counts as none; about 0.1 for expected scores")
    output_dir: str = arg("runs/eval", "folder of the table and the figure")


def pareto_front(points: np.ndarray) -> np.ndarray:
    """The points (N, 2) that no other one matches on both axes and beats on one, by rising first axis."""
    front, best = [], -math.inf
    for x, y in sorted(set(map(tuple, points.tolist())), reverse=True):
        if y > best:
            front.append((x, y))
            best = y
    return np.array(front[::-1])


def move(before: float, after: float, tolerance: float) -> str:
    """up, same or down."""
    return "same" if abs(after - before) <= tolerance else "up" if after > before else "down"


def movements(before: dict, after: dict, ids: list[str], tolerance: float) -> dict[tuple[str, str], int]:
    """How many prompts made each pair of moves (primary, secondary)."""
    counts = dict.fromkeys(((a, b) for a in MOVES for b in MOVES), 0)
    for id in ids:
        counts[tuple(move(*axis, tolerance) for axis in zip(before[id], after[id], strict=True))] += 1
    return counts


def share(counts: dict[tuple[str, str], int], test) -> str:
    """The share of prompts whose moves pass test(primary, secondary), in per cent."""
    return f"{sum(n for moves, n in counts.items() if test(*moves)) / sum(counts.values()):.0%}"


def main(args: Args) -> None:
    common.check_at_least(args, 0, "tolerance")
    runs = shared.read_runs(args.runs, least=2)
    names = runs[0].objectives
    if len(names) > 2:
        common.warn(f"of {len(names)} objectives only {names[0]} and {names[1]} are shown")
    means = [{id: point[:2] for id, point in shared.prompt_means(run.groups()).items()} for run in runs]
    texts, table = [], []
    for run, after in zip(runs[1:], means[1:], strict=True):
        ids = [id for id in shared.shared_ids(runs[0], run) if id in means[0] and id in after]
        check(bool(ids), f"{runs[0].path} and {run.path} have no scored prompt in common")
        counts = movements(means[0], after, ids, args.tolerance)
        rows = [
            [f"{names[0]} {a}", *(str(counts[a, b]) for b in MOVES), share(counts, lambda p, s, a=a: p == a)]
            for a in MOVES
        ]
        rows.append(["all", *(share(counts, lambda p, s, b=b: s == b) for b in MOVES), str(len(ids))])
        broken = share(counts, lambda p, s: p == "down")
        kept = share(counts, lambda p, s: p == "up" or (p == "same" and s == "up"))
        header = [f"{runs[0].name} → {run.name}", *(f"{names[1]} {b}" for b in MOVES), "all"]
        texts.append(
            shared.markdown_table(header, rows)
            + f"\n\nbetter in the paper's order (primary up, or equal and secondary up): {kept}; "
            f"priority broken (primary down): {broken}"
        )
    for run, points in zip(runs, means, strict=True):
        front = {tuple(point) for point in pareto_front(np.array(list(points.values()))).tolist()}
        table += [
            {"run": run.name, "id": id, names[0]: p, names[1]: s, "on_front": (p, s) in front}
            for id, (p, s) in points.items()
        ]
    path = shared.output_path(args.output_dir, "frontier.csv")
    shared.write_csv(path, table)
    shared.write_text(path.with_suffix(".md"), "\n\n".join(texts))
    with shared.figure(path, width=5.6, height=5.2) as axes:
        for run, points, marker, colour in zip(runs, means, "osD^vP*X" * 9, shared.COLOURS * 9, strict=False):
            primary, secondary = np.array(list(points.values())).T
            axes.scatter(secondary, primary, s=16, alpha=0.45, marker=marker, color=colour)
            front = pareto_front(np.stack([secondary, primary], axis=1))
            axes.step(*front.T, where="pre", color=colour, linewidth=1)
            label = f"{run.name}: mean {primary.mean():.2f}, {secondary.mean():.2f}"
            axes.scatter(
                secondary.mean(), primary.mean(), s=150, marker=marker, color=colour, edgecolor="black", label=label
            )
        axes.set(xlabel=f"{names[1]} (secondary)", ylabel=f"{names[0]} (primary)")
        axes.legend(title="large: mean; line: Pareto front", loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    print("\n\n".join(texts))
    print(f"wrote {path}, {path.with_suffix('.md').name}, .png and .pdf")


if __name__ == "__main__":
    common.run_stage(main, Args)
