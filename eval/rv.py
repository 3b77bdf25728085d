"""Does det Σ tell where a weak judge can be trusted? The paper's Figure 3, and the ρ that follows from it.

Two judges have scored the same responses. Prompts are added in the order of rising det Σ of the weak
judge's scores; for each prefix the RV coefficient says how alike the two judges' scores are. RV is biased
upwards when there are few rows, so three things stand beside it: its mean under permuted rows (exact), a
bootstrap interval over prompts, and the curve for prompts added in random order.

    reads   --weak and --strong: run directories with 02_scores.jsonl of the same responses
    writes  OUTPUT_DIR/rv.csv (a row per prefix) and rv.png, .pdf
    run     python eval/rv.py --weak runs/self --strong runs/judged
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
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
    betas = []
    for m in (x, y):
        centred = np.asarray(m, dtype=float) - np.mean(m, axis=0)
        cross = centred.T @ centred
        square = float((cross * cross).sum())
        betas.append(float(np.trace(cross)) ** 2 / square if square > 1e-24 else math.nan)
    return math.sqrt(betas[0] * betas[1]) / (len(x) - 1) if len(x) > 1 else math.nan


def paired_scores(weak: shared.Run, strong: shared.Run) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """(det of the weak scores, weak scores (n, k), strong scores (n, k)) of each prompt, by rising det.

    Only responses that both have scored; at least two of a prompt. Raises UserError if texts differ.
    """
    theirs = {row["id"]: row for row in strong.rows}
    mine = {row["id"]: row for row in weak.rows}
    prompts = []
    for id in shared.shared_ids(weak, strong):
        texts = [[response["text"] for response in rows[id]["responses"]] for rows in (mine, theirs)]
        check(texts[0] == texts[1], f"id '{id}': {weak.path} and {strong.path} have other responses")
        pairs = [
            (one["scores"], other["scores"])
            for one, other in zip(mine[id]["responses"], theirs[id]["responses"], strict=True)
            if one["scores"] is not None and other["scores"] is not None
        ]
        if len(pairs) > 1:
            x, y = (np.array(scores, dtype=float) for scores in zip(*pairs, strict=True))
            prompts.append((shared.det_covariance(x.tolist()), x, y))
    return sorted(prompts, key=lambda prompt: prompt[0])


def stacked(prompts: list) -> tuple[np.ndarray, np.ndarray]:
    """All weak and all strong scores of some prompts, a row per response."""
    return np.concatenate([x for _, x, _ in prompts]), np.concatenate([y for *_, y in prompts])


def curve(prompts: list, sizes: list[int], draws: int, orders: int, seed: int) -> list[dict]:
    """A row per prefix: k, fraction, det, rows, RV, its interval, permutation mean, random orders' RV."""
    rng = np.random.default_rng(seed)
    at_random = np.array(
        [
            [shared.rv_coefficient(*stacked([prompts[i] for i in order[:k]])) for k in sizes]
            for order in (rng.permutation(len(prompts)) for _ in tqdm(range(orders), desc="random orders"))
        ]
    )
    rows = []
    for column, k in enumerate(tqdm(sizes, desc="prefixes")):
        prefix = prompts[:k]
        x, y = stacked(prefix)
        samples = rng.integers(0, k, (draws, k))
        found = [shared.rv_coefficient(*stacked([prefix[i] for i in sample])) for sample in samples]
        low, high = shared.quantiles(found)
        read = at_random[~np.isnan(at_random[:, column]), column]
        random_low, random_high = shared.quantiles(read)
        rows.append(
            {
                "k": k,
                "fraction": k / len(prompts),
                "det": prefix[-1][0],
                "rows": len(x),
                "rv": shared.rv_coefficient(x, y),
                "low": low,
                "high": high,
                "permutation_mean": permutation_mean(x, y),
                "random_mean": float(np.mean(read)) if len(read) else math.nan,
                "random_low": random_low,
                "random_high": random_high,
            }
        )
    return rows


def suggest_rho(rows: list[dict]) -> float | None:
    """The largest det of a prefix that agrees better than as many random prompts do (ours).

    "Better" is above the upper end of the random orders' 95 % band; the whole set can't be. None: no such
    prefix, so det does not tell the reliable prompts from the others here.
    """
    better = [row["det"] for row in rows if row["fraction"] < 1 and row["rv"] > row["random_high"]]
    return max(better, default=None)


def main(args: Args) -> None:
    check(bool(args.weak and args.strong), "--weak and --strong: two run directories are wanted")
    common.check_at_least(args, 2, "steps", "orders", "draws", "least")
    weak, strong = shared.read_run(args.weak), shared.read_run(args.strong)
    prompts = paired_scores(weak, strong)
    check(
        len(prompts) >= args.least,
        f"{len(prompts)} prompts have two responses that both judges scored; --least {args.least} are wanted",
    )
    sizes = sorted(set(np.linspace(args.least, len(prompts), args.steps).round().astype(int).tolist()))
    rows = curve(prompts, sizes, args.draws, args.orders, args.seed)
    path = shared.output_path(args.output_dir, "rv.csv")
    shared.write_csv(path, rows)
    with shared.figure(path) as axes:
        k = [row["k"] for row in rows]
        axes.fill_between(k, *([row[f"random_{e}"] for row in rows] for e in ("low", "high")), alpha=0.2, color="0.5")
        axes.plot(k, [row["random_mean"] for row in rows], "--", color="0.4", label="random order, 95 % band")
        axes.fill_between(k, [row["low"] for row in rows], [row["high"] for row in rows], alpha=0.2)
        axes.plot(k, [row["rv"] for row in rows], "o-", markersize=3, label="rising det, 95 % interval")
        axes.plot(k, [row["permutation_mean"] for row in rows], ":", label="mean of permuted rows")
        axes.set(xlabel="prompts, by rising det Σ of the weak judge", ylabel="RV coefficient", ylim=(0, 1.02))
        axes.legend(loc="lower right")

    whole, rho = rows[-1], suggest_rho(rows)
    print(f"\n{len(prompts)} prompts, {whole['rows']} responses that both judges scored")
    print(
        f"  RV {whole['rv']:.4f}, 95 % interval {whole['low']:.4f} to {whole['high']:.4f}, "
        f"permuted {whole['permutation_mean']:.4f}"
    )
    dets = np.array([det for det, *_ in prompts])
    kept = ", ".join(f"{rho}: {np.mean((dets > 0) & (dets <= rho)):.0%}" for rho in PAPER_RHO)
    print(f"  det: min {dets.min():.3g}, median {np.median(dets):.3g}, max {dets.max():.3g}")
    print(f"  share of prompts kept by 0 < det ≤ ρ, for the paper's ρ: {kept}")
    if rho is None:
        print("  no prefix agrees better than as many random prompts: det does not order reliability here")
    else:
        print(f"  suggested: 04_denoise.py --rho {rho:.4g}, the largest det up to which prompts agree better")
        print("  than 97.5 % of equally many random ones")
    print(f"wrote {path}, {path.with_suffix('.png').name} and .pdf")


if __name__ == "__main__":
    common.run_stage(main, Args)
