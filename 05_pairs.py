"""Stage 5, preference pairs (SPA section 3.3, equation 2).

Of the n candidates and the refined response, every ordered pair whose first is lexicographically greater in its scores
(the primary objective first) and at least δ away becomes a preference pair. Needs no GPU, no torch, no model.

    reads   RUN_DIR/04_denoised.jsonl (or --input: another run's folder, or a file such as 02_scores.jsonl)
    writes  RUN_DIR/05_pairs.jsonl, one row per pair, the conversational preference format (exit code 3: no pair):
            {"id": "…", "prompt": [{"role": "user", "content": "…"}], "chosen": [{"role": "assistant", "content": "…"}],
             "rejected": [{…}], "chosen_scores": [9, 9], "rejected_scores": [7, 6], "margin": 5, "gap": 5}
            and "chosen_truncated": true, "rejected_truncated": true where the length limit cut a response
    run     python 05_pairs.py --delta 2 --run_dir runs/default
    branch  python 05_pairs.py --delta 4 --input runs/default --run_dir runs/delta4
    next    accelerate launch 06_train.py --run_dir runs/default
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import common
from common import EmptyResult, arg, check


@dataclass
class Args(common.RunArgs):
    input: str | None = arg(None, "run directory or file to read (default: the run directory)", free=True)
    delta: float = arg(2.0, "smallest margin Σ|ΔG| of a pair (paper, Table 5: 2, 3 or 4; the choice is ours)")
    gap: str | None = arg(None, "what weighs a pair: total: |ΔΣG| (paper); signed: the same, 0 where the total falls; "
        "composite: of --weights, as --rule weighted has it (ours)", ("total", "signed", "composite"))  # fmt: skip
    rule: str = arg("lex", "lex: equation 2; pareto: section 2; weighted: Reward Soups", ("lex", "pareto", "weighted"))
    weights: list[float] | None = arg(None, "of weighted and composite, one an objective (paper: 6 4, 7 3, 8 2, 9 1)")
    refined_only: bool = arg(False, "only pairs with the refined response (ours)")
    keep_system: bool = arg(False, "put the system prompt that the preferred response had into the prompt (ours)")


def composite(scores: list, weights: list[float]) -> float:
    """Reward Soups, appendix A: (a G_a + b G_b + …) / (a + b + …)."""
    return sum(w * score for w, score in zip(weights, scores, strict=True)) / sum(weights)


def is_preferred(y: list, other: list, rule: str, weights: list[float] | None = None) -> bool:
    """Whether the scores y = [G_a, G_b, …], in order of priority, are preferred to `other`."""
    if rule == "lex":
        return y > other  # equation 2, for any k: Python compares lists lexicographically
    if rule == "pareto":
        # Section 2: G_a >= and G_b >. For k > 2 (ours): none is worse, and one behind the primary is better.
        no_worse = all(own >= its for own, its in zip(y, other, strict=True))
        return no_worse and any(own > its for own, its in zip(y[1:], other[1:], strict=True))
    return round(composite(y, weights) - composite(other, weights), 9) > 0


def margin_and_gap(y: list, other: list, kind: str | None, weights: list[float] | None = None) -> tuple[float, float]:
    """(Σ|ΔG|, for δ; |ΔΣG|, or as `kind` says, for equation 3's weight): (8, 5) and (7, 6) have 2 and 0."""
    margin = sum(abs(own - its) for own, its in zip(y, other, strict=True))
    weighted = kind == "composite" or (kind is None and weights)
    gap = composite(y, weights) - composite(other, weights) if weighted else sum(y) - sum(other)
    gap = max(gap, 0) if kind == "signed" else abs(gap)
    return round(margin, 9), round(gap, 9)  # in binary 9.3 − 9.1 is not 0.2; integers stay integers


def build_pairs(row: dict, args: Args) -> tuple[list[dict], list[float]]:
    """Equation 2 for one prompt: (the rows of 05_pairs.jsonl, best first; margins of pairs closer than δ)."""
    # Responses with scores and text take part; of those with the same text only the first.
    members, refined, pairs, too_close = {}, row.get("refined"), [], []
    for response in [*row["responses"], *filter(None, [refined])]:
        if response["scores"] is not None and response["text"].strip():
            members.setdefault(response["text"], response)
    for y in sorted(members.values(), key=lambda member: member["scores"], reverse=True):
        for other in members.values():
            allowed = not args.refined_only or y is refined or other is refined
            if not allowed or not is_preferred(y["scores"], other["scores"], args.rule, args.weights):
                continue
            margin, gap = margin_and_gap(y["scores"], other["scores"], args.gap, args.weights)
            if margin < args.delta:
                too_close.append(margin)
                continue
            # One row: the prompt, both responses as messages, their scores, and whether the length limit cut them.
            sides, system = {"chosen": y, "rejected": other}, y.get("system") if args.keep_system else None
            pair = {"id": row["id"], "prompt": common.as_messages(row["prompt"], system)}
            pair |= {side: [{"role": "assistant", "content": one["text"]}] for side, one in sides.items()}
            pair |= {f"{side}_scores": one["scores"] for side, one in sides.items()} | {"margin": margin, "gap": gap}
            # Stage 6 gives the latter no end token, since they did not end.
            pair |= {f"{side}_truncated": True for side, one in sides.items() if one.get("truncated")}
            pairs.append(pair)
    return pairs, too_close


def margin_table(thousandths: Counter) -> str:
    """How many pairs have which margin, in thousandths: steps of 1, or about ten if there are other than whole ones."""
    whole, spread = all(margin % 1000 == 0 for margin in thousandths), max(thousandths) - min(thousandths)
    width = 1000 if whole else next((w for w in (10, 20, 50, 100, 200, 500, 1000, 2000) if 10 * w >= spread), 10_000)
    steps = Counter()
    for margin, count in thousandths.items():
        steps[margin // width * width] += count
    return f"in steps of {width / 1000:g}: " + ", ".join(f"{low / 1000:g}: {n}" for low, n in sorted(steps.items()))


def main(args: Args) -> None:
    common.check_at_least(args, 0, "delta")
    weighted = args.rule == "weighted" or args.gap == "composite"
    check((args.weights is None) != weighted, "--weights go together with --rule weighted, or --gap composite")
    source, output = common.find_input(args, "04_denoised.jsonl"), Path(args.run_dir) / "05_pairs.jsonl"
    made = common.made_by(source)

    # All rows are read once before anything is begun: a bad one costs nothing then. There are k objectives.
    sizes = [max(len(one["scores"] or []) for one in row["responses"]) for row in common.read_rows(source, scored=True)]
    k = max(sizes, default=0)
    check(k, f"{source} has no rows with scores; see what the stage before it printed")
    fits = args.weights is None or (len(args.weights) == k and min(args.weights) >= 0 < sum(args.weights))
    check(fits, f"--weights {args.weights}: {k} numbers >= 0 are wanted, one an objective, not all 0")

    # The first line says what will be done. An empty result is worked out again, for its advice and exit code.
    names = common.names_of(made, k)
    summed = args.rule == "weighted"  # the weights of a composite gap do not order
    goals = [f"{w:g} {name}" for w, name in zip(args.weights, names, strict=True)] if summed else names
    rule = f"{args.rule} rule on {(' and ' if summed else ' before ').join(goals)}"
    common.announce("05 pairs", str(source), rule, f"margin >= {args.delta:g}", "refined only" * args.refined_only)
    record = common.begin(args, "05_pairs", [output], made, **{source.name: source})
    if record["complete"] and record.get("rows") != 0:
        print(f"{output} is complete already; --overwrite redoes it")
        return

    # One pass, prompt by prompt; the file appears, whole, after the last one.
    without = pairs = close = blank = zero_gap = lower_total = widest = gap_sum = 0
    chosen, rejected, margins = common.ScoreHistogram(), common.ScoreHistogram(), Counter()
    with common.replace_file(output) as file:
        for row in tqdm(common.read_rows(source, scored=True), "05 pairs", unit="prompt", disable=None):
            built, too_close = build_pairs(row, args)
            pairs += len(built)
            without += not built
            close += len(too_close)
            widest = max(widest, *too_close, 0)
            blank += sum(not one["text"].strip() for one in [*row["responses"], *filter(None, [row.get("refined")])])
            for pair in built:
                file.write(common.dump_row(pair))
                chosen.add(pair["chosen_scores"])
                rejected.add(pair["rejected_scores"])
                gap_sum += pair["gap"]
                zero_gap += pair["gap"] == 0
                lower_total += round(sum(pair["chosen_scores"]) - sum(pair["rejected_scores"]), 9) < 0
                margins[int(pair["margin"] * 1000 + 1e-6)] += 1
    common.finish(record, pairs)

    # No pair is exit code 3. Else the report: the scores on both sides, the margins, and what the weights will be like.
    common.show_funnel("05 pairs", ("prompts in", len(sizes)), {"without a pair": without}, "prompts with pairs")
    print(f"  pairs closer than --delta: {close}; responses without text, left out: {blank}")
    if not pairs:
        why = f"the widest of {close} ordered pairs is {widest:g} apart: try a --delta below {args.delta:g}"
        none = "no prompt has two responses that the rule orders" + ", one of them refined" * args.refined_only
        raise EmptyResult(f"no pair: {why if close else none}")
    chosen.show(names, "chosen")
    rejected.show(names, "rejected")
    print(f"  pairs: {pairs}, mean gap {gap_sum / pairs:.3f}")
    print(f"  margin, {margin_table(margins)}")
    print(f"  zero gap (weight 0 in SPA): {zero_gap}; preferred response has the lower total: {lower_total}")
    if lower_total and args.rule == "lex" and args.gap != "signed":  # (9, 5) before (8, 9)
        print("    That is meant: the primary goal comes first; such a pair gets its weight from |gap|, as others do.")
    if gap_sum == 0:
        common.warn("every gap is 0, so SPA's weights are undefined; --loss simpo in 06 does not need them")
    print(f"wrote {output}\nnext: accelerate launch 06_train.py --run_dir {args.run_dir}")


if __name__ == "__main__":
    common.run_stage(main, Args)
