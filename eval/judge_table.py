"""Mean scores by a judge, with intervals: the paper's Tables 1, 3, 4 and 7.

A row per system: the mean score of each dimension over prompts with a bootstrap 95 % interval, HH_λ
(Table 3), and the paired difference to the first system (Vanilla), also with its interval. The best of a
column is bold only where its paired difference to every other system lies above 0 with its whole interval.
HH_λ is defined for two objectives; with more it is left out.

    reads   run directories that 01_sample.py (--temperature 0 --n 1, test prompts) and 02_score.py have made,
            one judge for all; NAME=DIR, or SET:NAME=DIR for several test sets; DIR+refined: refined answers
    writes  OUTPUT_DIR/judge_table.md, .tex and .csv (all numbers, unrounded)
    run     python eval/judge_table.py --runs Vanilla=runs/x/test_base SPA=runs/x/test_trained
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shared

import common
from common import arg, check


@dataclass
class Args:
    runs: list[str] = arg(None, f"{shared.RUN_HELP}; the first of a test set is the one compared with")
    hh: list[float] = arg((5.0, 10.0, 20.0), "λ of HH_λ = (λ primary + secondary) / (λ + 1) (paper, Table 3)")
    output_dir: str = arg("runs/eval", "folder of the tables")
    seed: int = arg(0, "seed of the bootstrap")


def hh_score(primary: float, secondary: float, weight: float) -> float:
    """HH_λ = (λ S_harm + S_help) / (λ + 1) (paper, Table 3); of scores or of their means."""
    return (weight * primary + secondary) / (weight + 1)


def measures(run: shared.Run, weights: list[float]) -> dict[str, np.ndarray]:
    """id -> (mean of each objective, HH_λ for each weight) of each prompt that has a score."""
    return {
        id: np.array([*means, *(hh_score(*means, weight) for weight in weights)])
        for id, means in shared.prompt_means(run.groups()).items()
    }


def paired(one: dict, other: dict, ids: list[str]) -> np.ndarray:
    """Differences one − other (N, measures) on the prompts that both have scores of."""
    return np.array([one[id] - other[id] for id in ids if id in one and id in other])


def table_rows(runs: list[shared.Run], weights: list[float], seed: int) -> list[dict]:
    """A row per system and measure of one test set: mean, interval, paired difference to the first system."""
    weights = weights if len(runs[0].objectives) == 2 else []
    names = [*runs[0].objectives, *(f"HH{weight:g}" for weight in weights)]
    values = [measures(run, weights) for run in runs]
    rows = []
    for run, mine in zip(runs, values, strict=True):
        check(bool(mine), f"{run.path}: no response has scores")
        table = np.array(list(mine.values()))
        difference = paired(mine, values[0], shared.shared_ids(run, runs[0]))
        others = [
            paired(mine, theirs, shared.shared_ids(run, rival))
            for rival, theirs in zip(runs, values, strict=True)
            if rival is not run
        ]
        if run is not runs[0] and not len(difference):
            common.warn(f"{run.path} and {runs[0].path} have no scored prompt in common: no difference is shown")
        scores = [pair for group in run.groups().values() for pair in group]
        for i, name in enumerate(names):
            low, high = shared.bootstrap_interval(table[:, i], seed=seed)
            row = {"test_set": run.test_set, "system": run.name, "measure": name, "prompts": len(table)}
            row |= {"responses": len(scores), "unscored": scores.count(None)}
            row |= {"mean": table[:, i].mean(), "low": low, "high": high}
            if run is not runs[0] and len(difference):
                low, high = shared.bootstrap_interval(difference[:, i], seed=seed)
                row |= {"paired_prompts": len(difference), "difference": difference[:, i].mean()}
                row |= {"difference_low": low, "difference_high": high}
            row["best"] = bool(others) and all(
                len(gap) > 1 and shared.bootstrap_interval(gap[:, i], seed=seed)[0] > 0 for gap in others
            )
            rows.append(row)
    return rows


def with_interval(value: float, low: float, high: float) -> str:
    """5.01 [4.83, 5.19]."""
    shown = shared.round_half_up
    return f"{shown(value)} [{shown(low)}, {shown(high)}]"


def means_table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the mean of each measure, the best in bold, with its interval."""
    table = []
    for system in dict.fromkeys(row["system"] for row in rows):
        mine = [row for row in rows if row["system"] == system]
        means = [with_interval(row["mean"], row["low"], row["high"]) for row in mine]
        bold = [f"**{m}**" if row["best"] else m for m, row in zip(means, mine, strict=True)]
        table.append([system, str(mine[0]["prompts"]), str(mine[0]["unscored"]), *bold])
    return ["system", "prompts", "unscored", *(row["measure"] for row in mine)], table


def differences_table(rows: list[dict], base: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each system's paired differences to the first, with their intervals."""
    table = []
    for system in dict.fromkeys(row["system"] for row in rows if "difference" in row):
        mine = [row for row in rows if row["system"] == system]
        gaps = [with_interval(*(r[f"difference{end}"] for end in ("", "_low", "_high"))) for r in mine]
        table.append([f"{system} − {base}", str(mine[0]["paired_prompts"]), *gaps])
    return ["paired difference", "prompts", *dict.fromkeys(row["measure"] for row in rows)], table


def main(args: Args) -> None:
    check(min(args.hh) > 0, f"--hh {min(args.hh):g}: numbers above 0 are wanted")
    runs = shared.read_runs(args.runs)
    markdown, latex, everything = [], [], []
    for test_set, systems in shared.by_test_set(runs).items():
        rows = table_rows(systems, list(args.hh), args.seed)
        tables = [means_table(rows)]
        if len(systems) > 1:
            tables.append(differences_table(rows, systems[0].name))
        markdown += [f"### {test_set}"] * bool(test_set)
        markdown += [shared.markdown_table(*table) for table in tables]
        latex += [f"% {test_set}"] * bool(test_set) + [shared.latex_table(*table) for table in tables]
        everything += rows
    path = shared.output_path(args.output_dir, "judge_table.md")
    shared.write_text(path, "\n\n".join(markdown))
    shared.write_text(path.with_suffix(".tex"), "\n\n".join(latex))
    shared.write_csv(path.with_suffix(".csv"), everything)
    print("\n\n".join(markdown))
    judges = sorted({run.judge or "unknown" for run in runs})
    print(f"\nmeans over prompts; judge: {', '.join(judges)}; bootstrap over prompts, 10,000 draws")
    print(f"wrote {path}, .tex and .csv")


if __name__ == "__main__":
    common.run_stage(main, Args)
