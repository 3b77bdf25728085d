"""Does det Σ tell where a weak judge can be trusted? The paper's Figure 3, and the ρ that follows from it.

Two judges have scored the same responses. Prompts are added in the order of rising det Σ of the weak
judge's scores; for each prefix the RV coefficient says how alike the two judges' scores are. RV is biased
upwards when there are few rows, so three things stand beside it: its mean under permuted rows (exact), a
bootstrap interval over prompts, and the curve for prompts added in random order.

    reads   --weak and --strong: run directories with 02_scores.jsonl of the same responses
    writes  OUTPUT_DIR/rv.csv (a row per prefix), rv.md, rv.png and .pdf
    run     python eval/rv.py --weak runs/self --strong runs/judged
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import shared
from tqdm import tqdm

import common
from common import arg, check

PAPER_RHO = (10, 20, 30, 40, 50)  # Table 5's search space


@dataclass
class Args:
    weak: str = arg(None, "run directory scored by the judge whose det orders the prompts, NAME=DIR or DIR")
    strong: str = arg(None, "run directory with the other judge's scores of the same responses")
    steps: int = arg(40, "prefixes along the curve")
    orders: int = arg(200, "random orders of the prompts")
    draws: int = arg(1000, "bootstrap draws of each prefix")
    least: int = arg(5, "prompts of the smallest prefix")
    output_dir: str = arg("runs/eval", "folder of the table and the figure")
    seed: int = arg(0, "seed of bootstrap and random orders")


def permutation_mean(x, y) -> float:
    """Mean RV when the rows of y are permuted, all permutations alike, in closed form.

    sqrt(β_x β_y) / (n − 1), where β = tr(S)² / tr(S²) of the column-centred cross products S.
    """
    if math.isnan(shared.rv_coefficient(x, y)):  # one side does not vary
        return math.nan
    betas = [np.trace(s) ** 2 / np.sum(s * s) for s in (np.cov(x, rowvar=False), np.cov(y, rowvar=False))]
    return math.sqrt(betas[0] * betas[1]) / (len(x) - 1)


def paired_scores(weak: shared.Run, strong: shared.Run) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """(det of the weak scores, weak scores (n, k), strong scores (n, k)) of each prompt, by rising det.

    Only responses that both have scored; at least two of a prompt.
    """
    prompts = []
    for pairs in shared.scored_by_both(weak, strong).values():
        if len(pairs) > 1:
            x, y = (np.array(scores, dtype=float) for scores in zip(*pairs, strict=True))
            prompts.append((shared.det_covariance(x.tolist()), x, y))
    return sorted(prompts, key=lambda prompt: prompt[0])


def rv_of(prompts: list, chosen) -> float:
    """RV of both judges' scores of the chosen prompts (indices; one may come twice), a row a response."""
    return shared.rv_coefficient(*(np.concatenate([prompts[int(i)][side] for i in chosen]) for side in (1, 2)))


def curve(prompts: list, sizes: list[int], draws: int, orders: int, seed: int) -> pd.DataFrame:
    """A row per prefix: k, fraction, det, rows, RV, its interval, permutation mean, random orders' RV."""
    rng, rows, above = np.random.default_rng(abs(seed)), [], np.zeros(orders)
    shuffled = [rng.permutation(len(prompts)) for _ in range(orders)]
    for k in tqdm(sizes, desc="prefixes"):
        prefix = prompts[:k]
        at_random = pd.Series([rv_of(prompts, order[:k]) for order in shuffled])
        x, y = (np.concatenate([prompt[side] for prompt in prefix]) for side in (1, 2))
        row = {"k": k, "fraction": k / len(prompts), "det": prefix[-1][0], "rows": len(x)}
        ends = shared.bootstrap_interval(np.arange(k), lambda chosen: rv_of(prompts, chosen), draws=draws, seed=rng)
        row |= {"rv": shared.rv_coefficient(x, y), "low": ends[0], "high": ends[1]}
        row |= {"permutation_mean": permutation_mean(x, y), "random_mean": at_random.mean()}
        rows.append(row | dict(zip(("random_low", "random_high"), shared.quantiles(at_random), strict=True)))
        above += (at_random > rows[-1]["random_high"]).to_numpy()
    table = pd.DataFrame(rows)
    table.attrs["by_chance"] = float(np.quantile(above, 0.95))  # prefixes of a random order above the band, at most
    return table


def suggest_rho(rows: pd.DataFrame) -> float | None:
    """The largest det of a prefix that agrees better than as many random prompts do (ours).

    "Better" is above the upper end of the random orders' 95 % band; the whole set can't be. With so many prefixes a
    random order leaves its band somewhere too, so more must than in 95 % of them. None: det does not tell the reliable
    prompts from the others here.
    """
    better = rows[(rows["fraction"] < 1) & (rows["rv"] > rows["random_high"]) & (rows["det"] > 0)]  # 04 refuses ρ 0
    return better["det"].max() if len(better) > rows.attrs.get("by_chance", 0) else None


def main(args: Args) -> None:
    check(bool(args.weak and args.strong), "--weak and --strong: two run directories are wanted")
    common.check_at_least(args, 2, "steps", "orders", "draws", "least")
    weak, strong = shared.read_run(args.weak), shared.read_run(args.strong)
    same = weak.objectives == strong.objectives
    check(same, f"--weak was scored on {weak.objectives}, --strong on {strong.objectives}: compare equal ones")
    prompts = paired_scores(weak, strong)
    few = f"{len(prompts)} prompts have two responses that both judges scored; --least {args.least} are wanted"
    check(len(prompts) >= args.least, few)
    sizes = sorted(set(np.linspace(args.least, len(prompts), args.steps).round().astype(int).tolist()))
    rows = curve(prompts, sizes, args.draws, args.orders, args.seed)
    path = shared.output_path(args.output_dir, "rv.csv")
    with shared.figure(path) as axes:
        axes.fill_between(rows["k"], rows["random_low"], rows["random_high"], alpha=0.2, color="0.5")
        axes.plot(rows["k"], rows["random_mean"], "--", color="0.4", label="random order, 95 % band")
        axes.fill_between(rows["k"], rows["low"], rows["high"], alpha=0.2)
        axes.plot(rows["k"], rows["rv"], "o-", markersize=3, label="rising det, 95 % interval")
        axes.plot(rows["k"], rows["permutation_mean"], ":", label="mean of permuted rows")
        axes.set(xlabel="prompts, by rising det Σ of the weak judge", ylabel="RV coefficient", ylim=(0, 1.02))
        axes.legend(loc="lower right")

    dets = np.array([det for det, *_ in prompts])
    kept = {limit: np.mean((dets > 0) & (dets <= limit)) for limit in PAPER_RHO}
    facts = {"prompts": len(prompts), "whole": rows.iloc[-1], "dets": dets, "kept": kept, "rho": suggest_rho(rows)}
    text = shared.render_page("rv.md", median=np.median(dets), **facts)
    shared.write_table(args.output_dir, "rv", text, rows)
    print(f"\n{text}\nwrote {path}, .md, .png and .pdf")


if __name__ == "__main__":
    common.run_stage(main, Args)
