"""Stage 4, dual-criterion denoising (SPA section 3.2; Algorithm 1, lines 11-21).

Keeps a prompt, whole, if its refined response beats every candidate on every objective (consistency) and the scores of
the candidates vary, but not too much: det_min < det Σ <= rho (informativeness). Needs no GPU, no torch, no model.

    reads   RUN_DIR/03_refined.jsonl (or --input: another run's folder, or a file)
    writes  RUN_DIR/04_denoised.jsonl, the rows kept, each with "det"
            RUN_DIR/04_dropped.jsonl, the others, each with "det" and "reason" (see REASONS); exit code 3: all of them
    run     python 04_denoise.py --rho 30 --run_dir runs/default
    branch  python 04_denoise.py --rho 10 --input runs/default --run_dir runs/rho10
    next    python 05_pairs.py --run_dir runs/default
"""

import statistics
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from tqdm import tqdm

import common
from common import EmptyResult, arg, check

# The reasons to drop a prompt, in the order in which they are tried, and what to try if one has left nothing.
REASONS = {
    "unscored": ["--score_mode constrained (02, 03)", "to see in what 02 and 03 printed why scores are null"],
    "inconsistent": [
        "--score_mode expected (02, 03)",
        "more --attempts (03)",
        "more prompts",
        "--consistency off",
        "a stricter --constitution since candidates are at 10 already",
    ],
    "det_zero": ["--score_mode expected (02, 03)", "a larger --n (01)", "a smaller --det_min", "--no-informativeness"],
    "det_above_rho": ["a larger --rho", "--no-informativeness"],
    "not_drawn": ["a larger --max_prompts"],
}


@dataclass
class Args(common.RunArgs):
    input: str | None = arg(None, "run directory or file to read (default: the run directory)", free=True)
    rho: float = arg(30.0, "upper bound of det Σ (paper, Table 5: 10, 20, 30, 40 or 50; the choice is ours)")
    det_min: float = arg(0.0, "strict lower bound of det Σ (paper: 0; more, with expected scores, is ours)")
    consistency: str = arg("strict", "the refined response beats every candidate on every axis (paper); weak: "
        "is below none on any and above all on one (ours)", ("strict", "weak", "off"))  # fmt: skip
    informativeness: bool = arg(True, "det_min < det Σ <= rho (paper); w/o NF has both filters off")
    cov_scope: str = arg("candidates", "Σ over the candidates; all: the refined one too", ("candidates", "all"))
    max_prompts: int | None = arg(None, "keep so many, drawn by --seed: compares filters at equal size (ours)")
    ddof: int = arg(0, "0: population variance; 1: sample variance (paper silent)", (0, 1))


def scores_of(row: dict) -> tuple[list[list], list | None]:
    """(scores of the candidates that take part, (m, k); the refined response's, (k,)): those with scores and text."""
    *candidates, refined = [r["scores"] if r["text"].strip() else None for r in [*row["responses"], row["refined"]]]
    return [scores for scores in candidates if scores is not None], refined


def failed_axes(refined: list, candidates: list[list], weak: bool = False) -> tuple[int, ...]:
    """The axes on which s̃ > max_i s^(i), Algorithm 1, line 12, does not hold; none: the prompt is consistent."""
    best = [max(axis) for axis in zip(*candidates, strict=True)]
    if weak and any(own > top for own, top in zip(refined, best, strict=True)):  # better on one: then equal is enough
        return tuple(axis for axis, own in enumerate(refined) if own < best[axis])
    return tuple(axis for axis, own in enumerate(refined) if own <= best[axis])


def det_covariance(scores: list[list], ddof: int = 0) -> float:
    """Equation 1: det Σ of m score vectors, (m, k). In fractions, since floats give more than 0 for collinear sets."""
    m = len(scores)
    if m == 0 or m <= len(scores[0]):
        return 0.0
    axes = [[Fraction(str(value)) for value in axis] for axis in zip(*scores, strict=True)]
    axes = [[value - sum(axis) / m for value in axis] for axis in axes]
    cov = [[sum(x * y for x, y in zip(a, b, strict=True)) / (m - ddof) for b in axes] for a in axes]

    def det(s: list[list]) -> Fraction:  # expanded along the first row, s[0]
        minors = ([row[:j] + row[j + 1 :] for row in s[1:]] for j in range(len(s)))
        return sum((-1) ** j * s[0][j] * det(minor) for j, minor in enumerate(minors)) if s else Fraction(1)

    return float(det(cov))


def denoise(candidates: list[list], refined: list | None, args: Args) -> tuple[str | None, float | None, tuple]:
    """(reason to drop the prompt or None, det Σ, axes that fail), from what `scores_of` gives."""
    if refined is None or not candidates:
        return "unscored", None, ()
    failed = failed_axes(refined, candidates, args.consistency == "weak")
    det = det_covariance(candidates + [refined] * (args.cov_scope == "all"), args.ddof)
    if args.consistency != "off" and failed:
        return "inconsistent", det, failed
    if args.informativeness and not args.det_min < det <= args.rho:
        return "det_zero" if det <= args.det_min else "det_above_rho", det, failed
    return None, det, failed


def main(args: Args) -> None:
    check(0 <= args.det_min < args.rho, f"--det_min {args.det_min} --rho {args.rho}: 0 <= det_min < rho is wanted")
    common.check_at_least(args, 1, "max_prompts")
    source = common.find_input(args, "03_refined.jsonl")
    outputs = [Path(args.run_dir) / name for name in ("04_denoised.jsonl", "04_dropped.jsonl")]
    check(source.resolve() not in map(Path.resolve, outputs), f"this stage writes {source}: choose another --run_dir")
    made = common.made_by(source)

    # All rows are read once before anything is begun: a bad one costs nothing then. k objectives, at most m vectors.
    rows = common.read_rows(source, scored=True, refined=True)
    sizes = [[len(scores) for scores in scores_of(row)[0]] for row in rows]
    check(sizes, f"{source} has no rows")
    k, m = max(map(max, filter(None, sizes)), default=0), max(map(len, sizes)) + (args.cov_scope == "all")
    few = f"no prompt has {k + 1} scored responses, so det Σ of {k} objectives is always 0: sample with --n {k + 1}"
    check(m > k or k == 0 or not args.informativeness, f"{source}: {few} or more, or pass --no-informativeness")

    # The first line says what will be done. An empty result is worked out again, for its advice and exit code.
    names = common.names_of(made, k)
    above = f"refined above all candidates on {' and '.join(names)}"
    filters = {"strict": [above], "weak": [f"{above} (weakly)"], "off": []}[args.consistency]
    filters += [f"{args.det_min:g} < det Σ <= {args.rho:g}"] * args.informativeness
    common.announce("04 denoise", str(source), *(filters or ["both filters off"]))
    record = common.begin(args, "04_denoise", outputs, made, **{source.name: source})
    if record["complete"] and record.get("rows") != 0:
        print(f"{outputs[0]} is complete already; --overwrite redoes it")
        return

    # A draw over the prompts that pass the filters, so a larger one keeps the smaller one.
    drawn = None
    if args.max_prompts is not None:
        rows = common.read_rows(source, scored=True, refined=True)
        passed = [row["id"] for row in rows if denoise(*scores_of(row), args)[0] is None]
        drawn = set(sorted(passed, key=lambda id: common.derive_seed(args.seed, id))[: args.max_prompts])
        if len(passed) < args.max_prompts:
            common.warn(f"only {len(passed)} pass the filters, --max_prompts is {args.max_prompts}")

    # One pass: each row goes into one of the two files; both appear, whole, after the last row.
    dropped, failures, dets = Counter(dict.fromkeys(REASONS, 0)), Counter(), []
    uninformative = full = blank = 0
    with common.replace_file(outputs[0]) as kept, common.replace_file(outputs[1]) as others:
        for row in tqdm(common.read_rows(source, scored=True, refined=True), "04 denoise", unit="prompt", disable=None):
            candidates, refined = scores_of(row)
            reason, det, failed = denoise(candidates, refined, args)
            reason = "not_drawn" if reason is None and drawn is not None and row["id"] not in drawn else reason
            if reason is None:
                kept.write(common.dump_row(row | {"det": det}))
                dets.append(det)
            else:
                others.write(common.dump_row(row | {"det": det, "reason": reason}))
                dropped[reason] += 1
            # For the report: what does each filter say of this prompt, whichever of them are on?
            blank += sum(not response["text"].strip() for response in [*row["responses"], row["refined"]])
            if det is not None:
                failures[failed] += 1
                uninformative += not args.det_min < det <= args.rho
                full += max(map(max, candidates)) >= 10
    common.finish(record, len(dets), dropped=dropped)

    # What went in, what fell to which filter, and on which axes the refined response was not ahead.
    total, inconsistent = len(dets) + sum(dropped.values()), sum(failures[failed] for failed in failures if failed)
    axes = [f"{' and '.join(names[i] for i in failed)}: {n}" for failed, n in failures.most_common() if failed]
    common.show_funnel("04 denoise", ("prompts in", total), dropped, "prompts kept")
    print(f"  each filter alone drops: consistency {inconsistent}, informativeness {uninformative}")
    print(f"  not above every candidate on just … {', '.join(axes) or 'no axis'}")
    print("".join(f"  {line}\n" for line in common.check_lines(made)), end="")
    print(f"  a candidate is at 10, which nothing can beat: {full}; responses without text, left out: {blank}")

    # Nothing left is exit code 3: which filter has emptied it, and what to try, but for what can't help.
    if not dets:
        reason, made_03 = max(dropped, key=dropped.get), made.get("03", {})
        modes, mode = ["json", "constrained", "expected"], made_03.get("score_mode") or "json"  # each reads more
        modes = modes[: modes.index(mode) + 1] if mode in modes and not made_03.get("scorer") else modes
        pointless = [*modes, "--attempts" if full == inconsistent else "--constitution"]
        pointless += ["--det_min"] * (args.det_min == 0)
        advice = REASONS.get(reason, ["to let more pass there"])  # a filter of one's own may have a reason of its own
        tries = [what for what in advice if not any(word in what for word in pointless)]
        raise EmptyResult(f"nothing is left; {dropped[reason]} of {total} fell to '{reason}': try {', '.join(tries)}")
    print(f"  det Σ: min {min(dets):.4g}, median {statistics.median(dets):.4g}, max {max(dets):.4g}")
    print(f"wrote {outputs[0]} and {outputs[1].name}\nnext: python 05_pairs.py --run_dir {args.run_dir}")


if __name__ == "__main__":
    common.run_stage(main, Args)
