"""Stage 5, preference pairs (SPA section 3.3, equation 2).

Of the n candidates and the refined response, every ordered pair whose first is lexicographically
greater in (primary, secondary) and at least δ away becomes a preference pair.

    reads   RUN_DIR/04_denoised.jsonl (or --input)
    writes  RUN_DIR/05_pairs.jsonl, one row per pair, the conversational preference format:
            {"id": "…", "prompt": [{"role": "user", "content": "…"}],
             "chosen": [{"role": "assistant", "content": "…"}], "rejected": [{…}],
             "chosen_scores": [9, 9], "rejected_scores": [7, 6], "margin": 5, "gap": 5}
    run     python 05_pairs.py --delta 2 --run_dir runs/default
    next    accelerate launch 06_train.py --run_dir runs/default

Hardware: none to speak of; no model, no torch. Exit code 3 if there is no pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import common
from common import EmptyResult, arg, check


@dataclass
class Args:
    delta: float = arg(
        2.0, "smallest |ΔG_a| + |ΔG_b| of a pair (paper, Table 5: 2, 3 or 4; the choice is ours)"
    )
    rule: str = arg(
        "lex",
        "which response is preferred. lex: equation 2; pareto: section 2, >= on primary and > on secondary; "
        "weighted: the larger (a G_a + b G_b) / (a + b), the Reward Soups baseline",
        ("lex", "pareto", "weighted"),
    )
    weights: tuple[float, float] = arg((6.0, 4.0), "a and b of --rule weighted (paper: 6 4, 7 3, 8 2, 9 1)")
    refined_only: bool = arg(False, "only pairs with the refined response (ours)")
    keep_system: bool = arg(
        False, "put the system prompt that the preferred response had into the prompt (ours)"
    )
    input: str = arg(
        "04_denoised.jsonl", "file in the run directory, or a path; `refined` may be missing in it"
    )
    run_dir: str = arg("runs/default", "folder of this run's files")
    seed: int = arg(0, "unused here: nothing is drawn; taken so that a recipe can pass it to every stage")
    overwrite: bool = arg(False, "redo this stage although its files are there")


def tidy(value: float) -> float:
    """Without the binary dust of sums of decimals (9.3 − 9.1 is not 0.2); integers stay integers."""
    return value if isinstance(value, int) else round(value, 9)


def composite(scores: list, weights: tuple[float, float]) -> float:
    """Reward Soups, appendix A: (a G_a + b G_b) / (a + b)."""
    return (weights[0] * scores[0] + weights[1] * scores[1]) / (weights[0] + weights[1])


def is_preferred(y: list, other: list, rule: str, weights: tuple[float, float]) -> bool:
    """Whether the scores y = (G_a, G_b) are preferred to `other`."""
    if rule == "lex":  # equation 2
        return y[0] > other[0] or (y[0] == other[0] and y[1] > other[1])
    if rule == "pareto":  # section 2
        return y[0] >= other[0] and y[1] > other[1]
    return tidy(composite(y, weights) - composite(other, weights)) > 0


def margin_and_gap(y: list, other: list, rule: str, weights: tuple[float, float]) -> tuple[float, float]:
    """(|ΔG_a| + |ΔG_b|, for δ; |Δ(G_a + G_b)|, for the weight of equation 3).

    They differ: (8, 5) against (7, 6) has margin 2 and gap 0. For `weighted` the gap is the composite's.
    """
    margin = abs(y[0] - other[0]) + abs(y[1] - other[1])
    gap = abs((y[0] + y[1]) - (other[0] + other[1]))
    if rule == "weighted":
        gap = abs(composite(y, weights) - composite(other, weights))
    return tidy(margin), tidy(gap)


def build_pairs(row: dict, args: Args) -> list[dict]:
    """Equation 2 for one prompt: the pairs as rows of 05_pairs.jsonl, the best preferred response first."""
    labelled = [(response, False) for response in row["responses"]]
    labelled += [(row["refined"], True)] if "refined" in row else []
    distinct: dict[str, tuple[dict, bool]] = {}  # of equal texts only the first takes part
    for response, is_refined in labelled:
        if response["scores"] is not None:
            distinct.setdefault(response["text"], (response, is_refined))
    members = list(distinct.values())
    pairs = []
    for y, y_refined in sorted(members, key=lambda member: member[0]["scores"], reverse=True):
        system = [{"role": "system", "content": y["system"]}] if args.keep_system and y.get("system") else []
        for other, other_refined in members:
            if not is_preferred(y["scores"], other["scores"], args.rule, args.weights):
                continue
            margin, gap = margin_and_gap(y["scores"], other["scores"], args.rule, args.weights)
            if margin < args.delta or (args.refined_only and not (y_refined or other_refined)):
                continue
            pairs.append(
                {
                    "id": row["id"],
                    "prompt": [*system, {"role": "user", "content": row["prompt"]}],
                    "chosen": [{"role": "assistant", "content": y["text"]}],
                    "rejected": [{"role": "assistant", "content": other["text"]}],
                    "chosen_scores": y["scores"],
                    "rejected_scores": other["scores"],
                    "margin": margin,
                    "gap": gap,
                }
            )
    return pairs


def main(args: Args) -> None:
    common.check_at_least(args, 0, "delta")
    check(
        min(args.weights) >= 0 < sum(args.weights), f"--weights {args.weights}: two numbers >= 0, not both 0"
    )
    source, output = Path(args.run_dir) / args.input, Path(args.run_dir) / "05_pairs.jsonl"
    rows = common.read_rows(source, made_by="04_denoise.py", scored=True)
    facts = common.read_facts(args.run_dir, "04_denoise")
    record = common.check_run(args, "05_pairs", [output], {source.name: source})

    prompts = without = pairs = zero_gap = lower_total = 0
    gap_sum, margins = 0.0, {}
    chosen, rejected = common.ScoreHistogram(), common.ScoreHistogram()
    with common.replace_file(output) as file:
        for row in tqdm(rows, unit="prompt", desc="05 pairs"):
            prompts += 1
            built = build_pairs(row, args)
            without += not built
            for pair in built:
                file.write(common.dump_row(pair))
                pairs += 1
                chosen.add(pair["chosen_scores"])
                rejected.add(pair["rejected_scores"])
                gap_sum += pair["gap"]
                zero_gap += pair["gap"] == 0
                lower_total += tidy(sum(pair["chosen_scores"]) - sum(pair["rejected_scores"])) < 0
                margins[int(pair["margin"])] = margins.get(int(pair["margin"]), 0) + 1
        check(prompts > 0, f"{source} has no rows")
    common.write_record(record | {"facts": facts, "complete": True})

    common.show_funnel("05 pairs", ("prompts in", prompts), {"without a pair": without}, "prompts with pairs")
    if pairs:
        chosen.show(common.objective_names(facts), "chosen")
        rejected.show(common.objective_names(facts), "rejected")
        print(f"  pairs: {pairs}, mean gap {gap_sum / pairs:.3f}")
        print("  margin, rounded down: " + ", ".join(f"{m}: {count}" for m, count in sorted(margins.items())))
        print(
            f"  zero gap (weight 0 in SPA): {zero_gap}; preferred response has the lower total: {lower_total}"
        )
    print(f"wrote {output}")
    if not pairs:
        raise EmptyResult(
            f"no pair is at least --delta {args.delta:g} apart: try a smaller one (expected scores need < 2)"
        )
    if gap_sum == 0:
        common.warn(
            "every gap is 0, so SPA's weights are undefined; 06_train.py --loss simpo does not need them"
        )
    print(f"next: accelerate launch 06_train.py --run_dir {args.run_dir}")


if __name__ == "__main__":
    common.run_stage(main, Args)
