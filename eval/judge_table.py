"""Mean scores by a judge, with intervals: the paper's Tables 1, 3, 4 and 7.

With several test sets one table has them all, as the paper's Table 1: a row a system, the objectives of each set side
by side. Then, for each set, the means over prompts with their bootstrap 95 % intervals, HH_λ (Table 3; for two
objectives), and the paired differences to the set's first system (Vanilla). The best of a column is bold only where
its paired difference to every other system lies above 0 with its whole interval; how many cells would be bold by
chance is said below. Runs of other judges, ways of reading scores, judge prompts or definitions are refused.

    reads   run directories that 01_sample.py (--temperature 0 --n 1, test prompts) and 02_score.py have made,
            one judge for all; NAME=DIR, or SET:NAME=DIR for several test sets; DIR+refined: refined answers
    writes  OUTPUT_DIR/judge_table.md, .tex and .csv (all numbers, unrounded)
    run     python eval/judge_table.py --runs Vanilla=runs/x/test_base SPA=runs/x/test_trained
            python eval/judge_table.py --runs SafeRLHF:Vanilla=… SafeRLHF:SPA=… HoneSet:Vanilla=… HoneSet:SPA=…
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import pandas as pd
import shared
from scipy import integrate, stats

import common
from common import arg, check


@dataclass
class Args:
    runs: list[str] = arg(None, f"{shared.RUN_HELP}; the first of a test set is the one compared with")
    hh: list[float] = arg((5.0, 10.0, 20.0), "λ of HH_λ = (λ primary + secondary) / (λ + 1) (paper, Table 3)")
    allow_differences: bool = arg(False, "compare runs although judge, definitions or ways of reading differ")
    output_dir: str = arg("runs/eval", "folder of the tables")
    seed: int = arg(0, "seed of the bootstrap")


def hh_score(primary, secondary, weight: float):
    """HH_λ = (λ S_harm + S_help) / (λ + 1) (paper, Table 3); of scores or of their means."""
    return (weight * primary + secondary) / (weight + 1)


def bold_by_chance(systems: int) -> float:
    """How many cells of a column are bold on average where all systems are equal: 0.05 of two, fewer of more.

    A cell is bold if its mean lies 1.96 √2 standard errors above each other one: m ∫ φ(x) Φ(x − 1.96 √2)^(m − 1) dx.
    """
    gap = stats.norm.ppf(0.975) * math.sqrt(2)
    both = lambda x: stats.norm.pdf(x) * stats.norm.cdf(x - gap) ** (systems - 1)  # noqa: E731
    return systems * integrate.quad(both, -10, 10)[0] if systems > 1 else 0.0


def measure_runs(runs: list[shared.Run], weights: list[float], seed: int) -> list[dict]:
    """A row per system and measure of one test set: mean, interval, paired difference to the first system."""
    tables = [run.means() for run in runs]  # a row a prompt, a column an objective
    for own in tables:
        for weight in weights if own.shape[1] == 2 else ():
            own[f"HH{weight:g}"] = hh_score(own.iloc[:, 0], own.iloc[:, 1], weight)

    def paired(i: int, j: int) -> pd.DataFrame:  # differences on the prompts that both have scores of
        shared_ids = shared.shared_ids(runs[i], runs[j])
        ids = [id for id in shared_ids if id in tables[i].index and id in tables[j].index]
        return tables[i].loc[ids] - tables[j].loc[ids]

    rows = []
    for i, (run, own) in enumerate(zip(runs, tables, strict=True)):
        gaps = [paired(i, j) for j in range(len(runs)) if j != i]
        compared = i > 0 and len(gaps[0]) > 0
        if i and not compared:
            common.warn(f"{run.path} and {runs[0].path} have no scored prompt in common: no difference is shown")
        scores = [scores for group in run.groups().values() for scores in group]
        about = {"test_set": run.test_set, "system": run.name}
        counts = {"prompts": len(own), "responses": len(scores), "unscored": scores.count(None)}
        for name in own:
            row = about | {"measure": name} | counts | shared.estimate(own[name], seed=seed)
            if compared:
                row |= {"paired_prompts": len(gaps[0])} | shared.estimate(gaps[0][name], "difference", seed)
            above = [len(gap) > 1 and shared.bootstrap_interval(gap[name], seed=seed)[0] > 0 for gap in gaps]
            rows.append(row | {"best": bool(above) and all(above)})
    return rows


def table(rows: list[dict], cell, index: list[str], columns: list[str]) -> tuple[list, list[list[str]]]:
    """(header, rows) of texts: a row a system, a column a measure (of a test set), cell(row) in it; – for none."""
    frame = pd.DataFrame([row | {"cell": cell(row)} for row in rows])
    wide = frame.pivot_table(index=index, columns=columns, values="cell", aggfunc="first", sort=False)
    wide = wide.fillna("–").reset_index()
    return list(wide.columns), wide.astype(str).to_numpy().tolist()


def bold(text: str, row: dict) -> str:
    return f"**{text}**" if row["best"] else text


def overview(rows: list[dict], objectives: list[str]) -> tuple[list[tuple], list[list[str]]]:
    """The paper's Table 1: a row a system, the means on each test set's objectives; header of (set, objective)."""
    rows = [row for row in rows if row["measure"] in objectives]
    mean = lambda row: bold(shared.round_half_up(row["mean"]), row)  # noqa: E731
    header, cells = table(rows, mean, ["system"], ["test_set", "measure"])
    return [("", "system"), *header[1:]], cells


def set_tables(rows: list[dict]) -> list[tuple[list[str], list[list[str]]]]:
    """(header, rows) of one test set: means with intervals, the best bold; then differences to the first system."""
    index, mean = ["system", "prompts", "unscored"], lambda row: bold(shared.with_interval(row), row)
    tables, title = [table(rows, mean, index, ["measure"])], f"{{}} − {rows[0]['system']}"
    changes = [
        row | {"paired difference": title.format(row["system"]), "prompts": row["paired_prompts"]}
        for row in rows
        if "difference" in row
    ]
    if changes:
        change = lambda row: shared.with_interval(row, "difference")  # noqa: E731
        tables.append(table(changes, change, ["paired difference", "prompts"], ["measure"]))
    return tables


def chance_note(rows: list[dict]) -> str:
    """How many comparisons the tables make, and how many would stand out if no system differed from another."""
    columns = [n for n in Counter((row["test_set"], row["measure"]) for row in rows).values() if n > 1]
    best, changes = sum(row["best"] for row in rows), sum("difference" in row for row in rows)
    return (
        f"{sum(columns)} cells are compared in {len(columns)} columns, {best} of them bold; about "
        f"{sum(map(bold_by_chance, columns)):.2g} would be by chance if all systems were equal. Of {changes} intervals "
        f"of differences about {0.05 * changes:.2g} would leave out 0 by chance."
    )


def main(args: Args) -> None:
    check(min(args.hh) > 0, f"--hh {min(args.hh):g}: numbers above 0 are wanted")
    runs = shared.read_runs(args.runs, per_set=True, allow_differences=args.allow_differences)
    sets = shared.by_test_set(runs)
    rows = [row for systems in sets.values() for row in measure_runs(systems, list(args.hh), args.seed)]
    markdown, latex = [], []
    if len(sets) > 1:
        header, cells = overview(rows, [name for run in runs for name in run.objectives])
        flat = [f"{test_set}: {name}" if test_set else name for test_set, name in header]
        markdown, latex = [shared.markdown_table(flat, cells)], [shared.latex_table(header, cells)]
    for test_set in sets:
        tables = set_tables([row for row in rows if row["test_set"] == test_set])
        markdown += [f"### {test_set}"] * bool(test_set) + [shared.markdown_table(*own) for own in tables]
        latex += [f"% {test_set}"] * bool(test_set) + [shared.latex_table(*own) for own in tables]
    judges = ", ".join(sorted({run.judge or "unknown" for run in runs}))
    notes = [f"means over prompts; judge: {judges}; bootstrap over prompts, 10,000 draws"]
    notes += [f"not alike: {text}" for text in shared.differences(runs)]
    notes += [chance_note(rows)] if len(runs) > len(sets) else []
    path = shared.output_path(args.output_dir, "judge_table.md")
    text = "\n\n".join([*markdown, *notes])
    shared.write_text(path, text)
    shared.write_text(path.with_suffix(".tex"), "\n\n".join([*latex, *(f"% {note}" for note in notes)]))
    shared.write_csv(path.with_suffix(".csv"), rows)
    print(f"{text}\n\nwrote {path}, .tex and .csv")


if __name__ == "__main__":
    common.run_stage(main, Args)
