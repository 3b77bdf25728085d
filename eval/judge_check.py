"""Can this judge judge? Its scores of two answers whose right order is known, by objective and topic.

The first step with any new model, before anything is trained on what it says: data/judge_probes.jsonl has a better and
a worse answer to each prompt, and neither length nor single words tell which is which. Stage 2 does the same on the
probes of its objectives; here the judge may be asked in other ways, and two judges compared.

A topic is a blind spot if its interval lies below that of all others together. A tie is not the right order.

    reads   the probes; with --against the files of another judge's check
    writes  OUTPUT_DIR/judge_check.json, {"objectives": {"harmlessness": {"right", "n", "ties", "low", "high",
            "topics": {…}, …}, …}, …}; judge_check.md, .png, .pdf, and judge_check.jsonl, the scores of each probe
    run     python eval/judge_check.py --model models/smollm2-135m --output_dir runs/judge
            python eval/judge_check.py --model … --score_mode choice --output_dir runs/choice --against runs/judge
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import shared

import common
from common import arg, check

ALL = "all"


@dataclass
class Args(shared.JudgeArgs):
    probes: str = arg("data/judge_probes.jsonl", "file of the probes")
    split: str = arg("test", "which of them; try other judge prompts on train", ("test", "train", ALL))
    one_at_a_time: bool = arg(False, "each probe is judged on its own objective alone")
    against: str | None = arg(
        None, "output_dir of another judge's check, or a run with stage 2's: where do they differ?", free=True
    )


def by_length(rows: list[dict], probes: dict[str, dict], name: str) -> dict[str, dict]:
    """The counts where the better answer is the shorter one, in words, and where it is not."""
    pairs: dict[str, list] = {"better_is_shorter": [], "better_is_longer": []}
    for row in rows:
        if row["objective"] == name:
            words = [len(probes[row["id"]][side].split()) for side in ("better", "worse")]
            which = "better_is_shorter" if words[0] < words[1] else "better_is_longer"
            pairs[which].append((row["better"], row["worse"]))
    return {which: common.count_right(own) for which, own in pairs.items()}


def differences(own: dict[str, bool], other: dict[str, bool]) -> dict:
    """Where two judges differ on the probes that both were asked, with the exact McNemar test."""
    from scipy.stats import binomtest

    ids = [id for id in own if id in other]
    only = [[id for id in ids if own[id] and not other[id]], [id for id in ids if other[id] and not own[id]]]
    count = len(only[0]) + len(only[1])
    p = binomtest(len(only[0]), count).pvalue if count else 1.0
    return {"n": len(ids), "only_this_one_right": only[0], "only_the_other_right": only[1], "p": p}


def read_check(folder: Path) -> dict[str, dict[str, bool]]:
    """{objective: {id: whether it was right}} of an earlier check, or of stage 2's; UserError if there is none."""
    path = folder / "judge_check.json"
    if (folder / "02_judge_check.jsonl").is_file() and not path.is_file():
        rows = [common.parse_json(line, path.name) for _, line in common.read_lines(folder / "02_judge_check.jsonl")]
        return {
            name: {r["id"]: common.is_right(r["better"], r["worse"]) for r in rows if r["objective"] == name}
            for name in common.CONSTITUTION
        }
    check(path.is_file(), f"--against {folder}: no judge_check.json there; make it with this script")
    found = common.parse_json(path.read_text(encoding="utf-8"), str(path))
    check(isinstance(found, dict) and isinstance(found.get("right"), dict), f"{path}: not written by this script")
    return found["right"]


def main(args: Args) -> None:
    shared.check_no_run_dir(args)
    common.read_files(args)
    objectives, inputs = common.judge_defaults(args)
    path = common.find_path(args.probes)
    check(path.is_file(), f"--probes {args.probes}: no such file")
    probes = common.read_probes(path, objectives, None if args.split == ALL else args.split)
    check(probes, f"{path} has no probes of {' or '.join(args.objectives)} in its split {args.split}")
    other = read_check(Path(args.against)) if args.against else {}

    # all objectives in one judge prompt, as in stage 2, or each in one of its own
    parts = [[objective] for objective in objectives] if args.one_at_a_time else [objectives]
    named = [f"judge_check_{part[0][0].lower()}.jsonl" if args.one_at_a_time else "judge_check.jsonl" for part in parts]
    outputs = [shared.output_path(args.output_dir, name) for name in named]
    record_file = outputs[0].with_name("judge_check_args.json")
    record = common.begin(args, "eval/judge_check", outputs, record_file=record_file, **{args.probes: path}, **inputs)
    judge = common.make_judge(args)
    if not record["complete"]:
        judge.open()
        common.settle_score_mode(args, judge, record)
    common.announce("judge check", judge.title, f"{len(probes)} probes", args.score_mode, ", ".join(args.objectives))

    texts, checked, right = {probe["id"]: probe for probe in probes}, {}, {}
    for part, output in zip(parts, outputs, strict=True):
        names = [name.lower() for name, _ in part]
        own = [probe for probe in probes if probe["objective"] in names]
        rows = common.check_judge(judge, args, part, own, record, output)
        if rows is None:  # the first of several processes reports
            return
        for name, found in common.sum_up_check(rows).items():
            checked[name] = found | by_length(rows, texts, name)
            right[name] = {
                row["id"]: common.is_right(row["better"], row["worse"]) for row in rows if row["objective"] == name
            }
    common.finish(record, common.count_lines(outputs[0]))

    who = shared.judge_name(vars(args))
    title = f"{who}, {args.score_mode}{', one objective at a time' if args.one_at_a_time else ''}, {args.split}"
    header = ["objective", "right order", "ties", "unread", "mean of better", "of worse"]
    header += ["right where better is shorter", "where it is longer", "blind to"]
    table, topics = [], []
    for name, own in checked.items():
        means = [
            shared.round_half_up(own[key]) if own[key] is not None else "–" for key in ("mean_better", "mean_worse")
        ]
        lengths = [
            common.share_with_interval(own["better_is_shorter"]),
            common.share_with_interval(own["better_is_longer"]),
        ]
        counts = [
            f"{own['right']} of {own['n']}: {common.share_with_interval(own)}",
            str(own["ties"]),
            str(own["unread"]),
        ]
        table.append([name, *counts, *means, *lengths, ", ".join(own["blind"]) or "–"])
        topics += [
            [f"{name}: {topic}", f"{it['right']} of {it['n']}", common.share_with_interval(it)]
            for topic, it in own["topics"].items()
        ]
    parts = [title, shared.markdown_table(header, table)]
    differ = {name: differences(own, other[name]) for name, own in right.items() if name in other}
    if differ:
        rows = [
            [
                name,
                str(it["n"]),
                *(str(len(it[key])) for key in ("only_this_one_right", "only_the_other_right")),
                f"{it['p']:.2g}",
            ]
            for name, it in differ.items()
        ]
        parts.append(
            shared.markdown_table(["objective", "probes", "only this judge right", "only the other", "p"], rows)
        )
    print("\n\n".join(parts))
    parts.append(shared.markdown_table(["topic", "right", "share"], topics))
    result = {"judge": who, "score_mode": args.score_mode, "split": args.split, "objectives": checked}
    result |= {"right": right, "against": {"folder": args.against, **differ} if differ else None}
    path = shared.output_path(args.output_dir, "judge_check.json")
    shared.write_text(path, json.dumps(result, ensure_ascii=False, indent=2))
    shared.write_text(path.with_suffix(".md"), "\n\n".join(parts))
    with shared.figure(path, width=6.4, height=0.8 + 0.2 * (len(topics) + len(checked))) as axes:
        labels = []
        for colour, (name, own) in zip(shared.COLOURS, checked.items(), strict=False):
            for label, it in {name: own, **own["topics"]}.items():
                share, y = it["right"] / it["n"], -len(labels)
                size = 7 if label == name else 4
                axes.errorbar(
                    share,
                    y,
                    xerr=[[max(0, share - it["low"])], [max(0, it["high"] - share)]],
                    fmt="o",
                    ms=size,
                    color=colour,
                )
                labels.append(f"{label} (all)" if label == name else label)
        axes.set_yticks([-i for i in range(len(labels))], labels, fontsize=8)
        axes.set(
            xlim=(0, 1), xlabel="share of probes whose better answer has the higher score, 95 % interval", title=title
        )
        axes.axvline(0.5, color="black", linewidth=1, linestyle=":")
    print(f"\nwrote {path}, .md, .png and .pdf")
    _, verdict = common.judge_verdict({"02": {"checked": checked}}, [name for name, _ in objectives])
    if verdict:
        common.warn(verdict)


if __name__ == "__main__":
    common.run_stage(main, Args)
