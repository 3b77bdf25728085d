"""What helps a weak judge? The judge check of one model, asked in nine ways, in one table.

The settings of the ways were chosen on the probes' train split (--split train), what is reported is the test split.

    writes  OUTPUT_DIR/NAME/ for each way, as eval/judge_check.py; OUTPUT_DIR/weak_judge.md, the table
    run     python recipes/weak_judge.py --model models/smollm2-135m --output_dir runs/weak_judge
            python recipes/weak_judge.py --ways plain choice --model …
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from common import arg, check  # noqa: E402

WAYS = {
    "plain": ["--score_mode", "constrained"],  # Figure 9 with the instruction, integers: the default
    "verbatim": ["--score_mode", "constrained", "--no-with_instruction"],  # Figure 9 as it is printed
    "expected": ["--score_mode", "expected"],
    "expected, verbatim": ["--score_mode", "expected", "--no-with_instruction"],
    "json": ["--score_mode", "json"],
    "one at a time": ["--score_mode", "constrained", "--one_at_a_time"],
    "expected, one at a time": ["--score_mode", "expected", "--one_at_a_time"],
    "few-shot": ["--score_mode", "expected", "--judge_template", "few_shot.txt"],
    "choice": ["--score_mode", "choice"],
}
# (objective of a train probe, its side, the two scores that the example is given, by hand)
EXAMPLES = (
    ("harmlessness", "worse", (1, 4)), ("helpfulness", "better", (9, 9)),
    ("harmlessness", "better", (10, 7)), ("helpfulness", "worse", (9, 2)),
)  # fmt: skip


@dataclass
class Args:
    model: str = arg(common.DEFAULT_MODEL, "the judge")
    ways: list[str] = arg(tuple(WAYS), "which of them", tuple(WAYS))
    objectives: list[str] = arg(("harmlessness", "helpfulness"), "two, as stage 2")
    split: str = arg("test", "of the probes", ("test", "train", "all"))
    output_dir: str = arg("runs/weak_judge", "folder of the results")


def few_shot_template(objectives: list[str]) -> str:
    """Figure 9 with examples from the train split in front of what is to be judged, each with its scores."""
    named = [[name.capitalize(), ""] for name in objectives]
    probes = common.read_probes(ROOT / "data" / "judge_probes.jsonl", named, "train")
    head, tail = common.JUDGE_TEMPLATE.split("{instruction_part}")
    shown, of = [], {name: iter([p for p in probes if p["objective"] == name]) for name in objectives}
    for objective, side, scores in EXAMPLES:
        name = dict(zip(("harmlessness", "helpfulness"), objectives, strict=True))[objective]
        probe = next(of[name], None)
        check(probe, f"--objectives: data/judge_probes.jsonl has no examples of '{name}'")
        text = common.INSTRUCTION_PART.format(instruction=probe["prompt"]) + f"### Response:\n{probe[side]}\n\n"
        answer = {name.capitalize(): score for name, score in zip(objectives, scores, strict=True)}
        shown.append((text + json.dumps(answer, indent=4)).replace("{", "{{").replace("}", "}}"))
    return head + "\n\n".join(shown) + "\n\n{instruction_part}" + tail


def main(args: Args) -> None:
    check(len(args.objectives) == 2, "--objectives: two are wanted, since the examples have two scores")
    folder, rows = Path(args.output_dir), []
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "few_shot.txt").write_text(few_shot_template(args.objectives), encoding="utf-8")
    for way in args.ways:
        options = [str(folder / word) if word == "few_shot.txt" else word for word in WAYS[way]]
        own = folder / way.replace(", ", "_").replace(" ", "_")
        call = [
            "--model",
            args.model,
            "--objectives",
            *args.objectives,
            "--split",
            args.split,
            "--output_dir",
            str(own),
        ]
        command = [sys.executable, ROOT / "eval" / "judge_check.py", *call, *options]
        done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
        last = done.stderr.strip().rpartition("\n")[2]
        unread = "responses could be scored" in last  # json where the model can't write it: common.check_readable
        check(unread or done.returncode != 2, last.removeprefix("judge_check.py: error: "))
        sys.stderr.write(done.stderr)
        if unread and done.returncode == 2:
            rows.append(f"| {way} | not readable |  |")
            continue
        check(done.returncode == 0, f"eval/judge_check.py ended with exit code {done.returncode}")
        found = json.loads((own / "judge_check.json").read_text(encoding="utf-8"))["objectives"]
        cells = []
        for name in args.objectives:
            it = found[name]
            cells.append(
                f"{it['right']} of {it['n']}, {common.share_with_interval(it)}"
                + (f", {it['ties']} ties" if it["ties"] else "")
            )
        rows.append(f"| {way} | {' | '.join(cells)} |")
    head = f"| way of asking | {' | '.join(args.objectives)} |\n| --- | --- | --- |\n"
    (folder / "weak_judge.md").write_text(head + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"\n{args.model}, {args.split} split\n\n{head}" + "\n".join(rows) + f"\nwrote {folder / 'weak_judge.md'}")


if __name__ == "__main__":
    common.run_stage(main, Args)
