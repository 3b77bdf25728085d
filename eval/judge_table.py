"""Mean scores by a judge, with intervals: the paper's Tables 1, 3, 4 and 7.

With several test sets one table has them all, as the paper's Table 1: a row a system, the objectives of each set side
by side. Then, for each set, the means over prompts with their bootstrap 95 % intervals, HH_λ (Table 3; for two
objectives), and the paired differences to the set's first system (Vanilla). The best of a column is bold only where
its paired difference to every other system lies above 0 with its whole interval; how many cells would be bold by
chance is said below. rep-4 is how much of an answer it has said before, as text that falls apart does. Runs of other
judges, ways of reading scores, judge prompts or definitions are refused.

    reads   run directories that 01_sample.py (--temperature 0 --n 1, test prompts) and 02_score.py have made,
            one judge for all; NAME=DIR, or SET:NAME=DIR for several test sets; DIR+refined: refined answers. A name
            that stands several times is one system of several seeds: a prompt counts with its mean over them
    writes  OUTPUT_DIR/judge_table.md, .tex and .csv (all numbers, unrounded)
    run     python eval/judge_table.py --runs Vanilla=runs/x/test_base SPA=runs/x/test_trained
            python eval/judge_table.py --runs SafeRLHF:Vanilla=… SafeRLHF:SPA=… HoneSet:Vanilla=… HoneSet:SPA=…
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from dataclasses import dataclass

import pandas as pd
import shared
from scipy import integrate, stats

import common
from common import arg, check

REPEATED = "rep-4"


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


def repeated_ngrams(text: str, n: int = 4) -> float:
    """The share of a text's n-grams of words that stood in it before (seq-rep-n); 0 of fewer than n words."""
    words = text.split()
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def measure_runs(runs: list[shared.Run], weights: list[float], seed: int) -> list[dict]:
    """A row per system and measure of one test set: mean, interval, paired difference to the first system."""

    def means(run: shared.Run) -> pd.DataFrame:  # a row a prompt, a column an objective, and HH_λ
        own = run.means()
        for weight in weights if own.shape[1] == 2 else ():
            own[f"HH{weight:g}"] = hh_score(own.iloc[:, 0], own.iloc[:, 1], weight)
        texts = {row["id"]: [response["text"] for response in row["responses"]] for row in run.rows}
        own[REPEATED] = [statistics.fmean(map(repeated_ngrams, texts[id])) for id in own.index]
        return own

    for pair in itertools.combinations(runs, 2):
        shared.shared_ids(*pair)  # an id is the same prompt in both
    rows, tables = [], [means(run) for run in runs]
    for i, (run, own) in enumerate(zip(runs, tables, strict=True)):
        gaps, by_seed = [shared.gains(own, other) for other in tables if other is not own], list(map(means, run.seeds))
        compared = i > 0 and len(gaps[0]) > 0
        if i and not compared:
            common.warn(f"{run.path} and {runs[0].path} have no scored prompt in common: no difference is shown")
        scores = [scores for group in run.groups.values() for scores in group]
        about = {"test_set": run.test_set, "system": run.name}
        counts = {"prompts": len(own), "responses": len(scores), "unscored": scores.count(None)}
        for name in own:
            row = about | {"measure": name} | counts | shared.estimate(own[name], seed=seed)
            if compared:
                row |= {"paired_prompts": len(gaps[0])} | shared.estimate(gaps[0][name], "difference", seed)
            row["seeds"] = " ".join(f"{one[name].mean():.6g}" for one in by_seed)  # the mean of each
            rivals = gaps if name != REPEATED else []  # more of that is not better
            above = [len(gap) > 1 and shared.bootstrap_interval(gap[name], seed=seed)[0] > 0 for gap in rivals]
            rows.append(row | {"best": bool(above) and all(above)})
    return rows


def main(args: Args) -> None:
    check(min(args.hh) > 0, f"--hh {min(args.hh):g}: numbers above 0 are wanted")
    runs = shared.read_runs(args.runs, per_set=True, allow_differences=args.allow_differences, seeds=True)
    rows, sets = [], []
    for test_set, systems in shared.by_test_set(runs).items():
        rows += (found := measure_runs(systems, list(args.hh), args.seed))
        by_system = {run.name: [row for row in found if row["system"] == run.name] for run in systems}
        sets.append({"name": test_set, "objectives": systems[0].objectives, "systems": by_system})
    # how many comparisons the tables make, and how many would stand out if no system differed from another
    compared = [row for row in rows if row["measure"] != REPEATED]
    columns = [n for n in Counter((row["test_set"], row["measure"]) for row in compared).values() if n > 1]
    facts = {"columns": columns, "by_chance": sum(map(bold_by_chance, columns))}
    facts |= {"bold": sum(row["best"] for row in compared), "changes": sum("difference" in row for row in compared)}
    facts["judges"] = sorted({run.judge or "unknown" for run in runs})
    facts["unlike"] = shared.differences([one for run in runs for one in run.seeds])
    text, latex = (shared.render_page(f"judge_table.{kind}", sets=sets, **facts) for kind in ("md", "tex"))
    path = shared.write_table(args.output_dir, "judge_table", text, rows)
    shared.write_text(path.with_suffix(".tex"), latex)
    print(f"{text}\n\nwrote {path}, .tex and .csv")


if __name__ == "__main__":
    common.run_stage(main, Args)
