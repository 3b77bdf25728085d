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
from scipy.stats import binomtest

import common
from common import arg, check

ALL = "all"


@dataclass
class Args(shared.JudgeArgs):
    probes: str = arg("data/judge_probes.jsonl", "file of the probes")
    split: str = arg("test", "which of them; try other judge prompts on train", ("test", "train", ALL))
    one_at_a_time: bool = arg(False, "each probe is judged on its own objective alone")
    against: str | None = arg(None, "output_dir of another check, or a run: where do the judges differ?", free=True)


def by_length(rows: list[dict], probes: dict[str, dict]) -> dict[str, dict]:
    """The counts where the better answer is the shorter one, in words, and where it is the longer one."""
    pairs: dict[str, list] = {"better_is_shorter": [], "better_is_longer": []}
    for row in rows:
        better, worse = (len(probes[row["id"]][side].split()) for side in ("better", "worse"))
        if better != worse:
            pairs["better_is_shorter" if better < worse else "better_is_longer"].append((row["better"], row["worse"]))
    return {which: common.count_right(own) for which, own in pairs.items()}


def right_of(rows: list[dict]) -> dict[str, dict[str, bool]]:
    """{objective: {id: whether the better answer has the higher score}}."""
    found: dict[str, dict] = {row["objective"]: {} for row in rows}
    for row in rows:
        found[row["objective"]][row["id"]] = common.is_right(row["better"], row["worse"])
    return found


def differences(own: dict[str, bool], other: dict[str, bool]) -> dict:
    """Where two judges differ on the probes that both were asked, with the exact McNemar test."""
    ids = [id for id in own if id in other]
    only = [[id for id in ids if own[id] and not other[id]], [id for id in ids if other[id] and not own[id]]]
    count = len(only[0]) + len(only[1])
    p = binomtest(len(only[0]), count).pvalue if count else 1.0
    return {"n": len(ids), "only_this_one_right": only[0], "only_the_other_right": only[1], "p": p}


def read_check(folder: Path) -> dict[str, dict[str, bool]]:
    """{objective: {id: whether it was right}} of an earlier check, or of stage 2's; UserError if there is none."""
    path, of_stage = folder / "judge_check.json", folder / "02_judge_check.jsonl"
    if of_stage.is_file() and not path.is_file():
        fields = {"id", "objective", "better", "worse"}
        return right_of([row for _, row in shared.read_jsonl(of_stage, fields, "not a row of 02_score.py")])
    check(path.is_file(), f"--against {folder}: no judge_check.json there; make it with this script")
    found = common.parse_json(path.read_text(encoding="utf-8"), str(path))
    check(isinstance(found, dict) and isinstance(found.get("right"), dict), f"{path}: not written by this script")
    return found["right"]


def draw(path: Path, checked: dict[str, dict], title: str) -> None:
    """The shares with their intervals, of each objective and below it of its topics."""
    points = [
        (f"{label} (all)" if label == name else label, it, 7 if label == name else 4, colour)
        for colour, (name, own) in zip(shared.COLOURS, checked.items(), strict=False)
        for label, it in {name: own, **own["topics"]}.items()
    ]
    with shared.figure(path, width=6.4, height=0.8 + 0.2 * len(points)) as axes:
        for y, (_, it, size, colour) in enumerate(points):
            share = it["right"] / it["n"]
            ends = [[max(0, share - it["low"])], [max(0, it["high"] - share)]]
            axes.errorbar(share, y, xerr=ends, fmt="o", ms=size, color=colour)
        axes.set_yticks(range(len(points)), [label for label, *_ in points], fontsize=8)
        axes.invert_yaxis()
        label = "share of probes whose better answer has the higher score, 95 % interval"
        axes.set(xlim=(0, 1), xlabel=label, title=title)
        axes.axvline(0.5, color="black", linewidth=1, linestyle=":")


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

    rows = []
    for part, output in zip(parts, outputs, strict=True):
        names = [name.lower() for name, _ in part]
        own = [probe for probe in probes if probe["objective"] in names]
        rows += common.check_judge(judge, args, part, own, record, output) or ()
    if common.processes()[0] > 0:  # the first of several reports
        return
    common.finish(record, common.count_lines(outputs[0]))
    texts, checked, right = {probe["id"]: probe for probe in probes}, common.sum_up_check(rows), right_of(rows)
    for name, found in checked.items():
        found |= by_length([row for row in rows if row["objective"] == name], texts)

    who = shared.judge_name(vars(args))
    title = f"{who}, {args.score_mode}{', one objective at a time' if args.one_at_a_time else ''}, {args.split}"
    differ = {name: differences(own, other[name]) for name, own in right.items() if name in other}
    facts = {"title": title, "checked": checked, "differ": differ, "share": common.share_with_interval}
    text = shared.render_page("judge_check.md", **facts)
    print(text.partition("\n\n| topic")[0])
    result = {"judge": who, "score_mode": args.score_mode, "split": args.split, "objectives": checked}
    result |= {"right": right, "against": {"folder": args.against, **differ} if differ else None}
    path = shared.output_path(args.output_dir, "judge_check.json")
    shared.write_text(path, json.dumps(result, ensure_ascii=False, indent=2))
    shared.write_text(path.with_suffix(".md"), text)
    draw(path, checked, title)
    print(f"\nwrote {path}, .md, .png and .pdf")
    _, verdict = common.judge_verdict({"02": {"checked": checked}}, [name for name, _ in objectives])
    if verdict:
        common.warn(verdict)


if __name__ == "__main__":
    common.run_stage(main, Args)
