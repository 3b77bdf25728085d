"""Stage 4, dual-criterion denoising (SPA section 3.2; Algorithm 1, lines 11-21).

Keeps a prompt if its refined response beats every candidate on both axes (consistency) and the
candidates' scores vary, but not too much: det_min < det Σ <= ρ (informativeness). A prompt is kept or
dropped as a whole.

    reads   RUN_DIR/03_refined.jsonl
    writes  RUN_DIR/04_denoised.jsonl, the rows kept, each with "det"
            RUN_DIR/04_dropped.jsonl, the others, each with "reason" (and "det"):
            unscored, inconsistent, det_zero or det_above_rho, tried in this order
    run     python 04_denoise.py --rho 30 --run_dir runs/default
    next    python 05_pairs.py --run_dir runs/default

Hardware: none to speak of; no model, no torch. Exit code 3 if nothing is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from tqdm import tqdm

import common
from common import EmptyResult, arg, check


@dataclass
class Args:
    rho: float = arg(30.0, "upper bound of det Σ (paper, Table 5: 10, 20, 30, 40 or 50; the choice is ours)")
    det_min: float = arg(0.0, "strict lower bound of det Σ (paper: 0; more, with expected scores, is ours)")
    consistency: bool = arg(True, "the refined response must beat every candidate on both axes (paper)")
    informativeness: bool = arg(True, "det_min < det Σ <= rho (paper); w/o NF has both filters off")
    cov_scope: str = arg(
        "candidates", "Σ over the n candidates, or all: the refined one too (ours)", ("candidates", "all")
    )
    ddof: int = arg(0, "0: population variance; 1: sample variance (paper silent)", (0, 1))
    run_dir: str = arg("runs/default", "folder of this run's files")
    seed: int = arg(0, "unused here: nothing is drawn; taken so that a recipe can pass it to every stage")
    overwrite: bool = arg(False, "redo this stage although its files are there")


def is_consistent(refined: list, candidates: list[list]) -> bool:
    """Algorithm 1, line 12: s̃_a > max_i s_a^(i) and s̃_b > max_i s_b^(i), both strict.

    refined: [a, b]; candidates: the scored candidates' [a, b]. It names no element, so it decides on
    the whole set.
    """
    return all(refined[axis] > max(scores[axis] for scores in candidates) for axis in (0, 1))


def det_covariance(scores: list[list], ddof: int = 0) -> float:
    """Equation 1: det Σ of the score vectors [a, b], exact before one final rounding.

    det Σ = [(mΣa²−(Σa)²)(mΣb²−(Σb)²) − (mΣab−ΣaΣb)²] / (m² (m−ddof)²) for m scores. Floats report a
    determinant above 0 for many collinear sets, so decimals are scaled to integers first. 0 for m < 2.
    """
    m = len(scores)
    if m < 2:
        return 0.0
    exact = [Decimal(str(score)) for pair in scores for score in pair]
    places = max(0, *(-value.as_tuple().exponent for value in exact))
    whole = [int(value.scaleb(places)) for value in exact]
    a, b = whole[::2], whole[1::2]
    var_a = m * sum(x * x for x in a) - sum(a) ** 2
    var_b = m * sum(y * y for y in b) - sum(b) ** 2
    cov_ab = m * sum(x * y for x, y in zip(a, b, strict=True)) - sum(a) * sum(b)
    return (var_a * var_b - cov_ab**2) / (m**2 * (m - ddof) ** 2 * 10 ** (4 * places))


def denoise(row: dict, args: Args) -> tuple[str | None, float | None]:
    """(reason to drop the row or None, det Σ or None if unscored); responses without scores don't count."""
    candidates = [response["scores"] for response in row["responses"] if response["scores"] is not None]
    refined = row["refined"]["scores"]
    if refined is None or not candidates:
        return "unscored", None
    det = det_covariance(candidates + [refined] * (args.cov_scope == "all"), args.ddof)
    if args.consistency and not is_consistent(refined, candidates):
        return "inconsistent", det
    if args.informativeness and not det > args.det_min:
        return "det_zero", det
    if args.informativeness and not det <= args.rho:
        return "det_above_rho", det
    return None, det


# What to try when a filter has emptied the result.
ADVICE = {
    "unscored": "stage 2 or 3 could not read the scores: use --score_mode constrained or expected there",
    "inconsistent": "no refined response beats all its candidates: try 03_refine.py --attempts 4, "
    "--score_mode expected in 02 and 03, more prompts, or --no-consistency here",
    "det_zero": "the candidates' scores do not vary: try --score_mode expected in 02 and 03, a larger --n "
    "in 01, a smaller --det_min, or --no-informativeness here",
    "det_above_rho": "the candidates' scores vary too much: try a larger --rho",
}


def main(args: Args) -> None:
    check(
        0 <= args.det_min < args.rho,
        f"--det_min {args.det_min} --rho {args.rho}: 0 <= det_min < rho is wanted",
    )
    run_dir = Path(args.run_dir)
    source, kept_file, dropped_file = (
        run_dir / f for f in ("03_refined.jsonl", "04_denoised.jsonl", "04_dropped.jsonl")
    )
    rows = common.read_rows(source, made_by="03_refine.py", scored=True, refined=True)
    facts = common.read_facts(args.run_dir, "03_refine")
    record = common.check_run(args, "04_denoise", [kept_file, dropped_file], {source.name: source})

    dropped, dets, enough = dict.fromkeys(ADVICE, 0), [], False
    candidates, refined = common.ScoreHistogram(), common.ScoreHistogram()
    total = 0
    with common.replace_file(kept_file) as kept, common.replace_file(dropped_file) as others:
        for row in tqdm(rows, unit="prompt", desc="04 denoise"):
            total += 1
            enough = enough or len(row["responses"]) + (args.cov_scope == "all") >= 3
            reason, det = denoise(row, args)
            if reason is None:
                kept.write(common.dump_row(row | {"det": det}))
                dets.append(det)
                refined.add(row["refined"]["scores"])
                for response in row["responses"]:
                    candidates.add(response["scores"])
            else:
                others.write(common.dump_row(row | {"det": det, "reason": reason}))
                dropped[reason] += 1
        check(total > 0, f"{source} has no rows")
        check(
            enough or not args.informativeness,
            f"{source}: every prompt has fewer than 3 responses, so det Σ is always 0; sample with "
            "--n 3 or more, or pass --no-informativeness",
        )
    common.write_record(record | {"facts": facts, "complete": True})

    common.show_funnel("04 denoise", ("prompts in", total), dropped, "prompts kept")
    if dets:
        dets.sort()
        candidates.show(common.objective_names(facts), "kept candidates")
        refined.show(common.objective_names(facts), "kept refined")
        print(f"  det of the kept: min {dets[0]:.4g}, median {dets[len(dets) // 2]:.4g}, max {dets[-1]:.4g}")
    print(f"wrote {kept_file} and {dropped_file.name}")
    if not dets:
        worst = max(dropped, key=dropped.get)
        raise EmptyResult(f"nothing is left; most prompts fell to '{worst}': {ADVICE[worst]}")
    print(f"next: python 05_pairs.py --run_dir {args.run_dir}")


if __name__ == "__main__":
    common.run_stage(main, Args)
