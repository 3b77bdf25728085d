"""What a run costs: the kit's own processor time a prompt, its growth, and the calls and tokens asked of a model.

Stages 1 to 5 run on 100, 1,000 and 10,000 prompts with an engine that answers at once, so what is measured is the kit:
reading, prompts, tokens, joins, filters, pairs, files. The engine counts what it was asked for; from that and from the
rates of a real engine, which are given and not measured here, the second table calculates a run's time. Stage 6's is 8
operations a weight and token: 2 forward, 4 backward, 2 for what --gradient_checkpointing computes again.

    writes  nothing but what it prints: both tables
    run     python bench/scale.py --read 20000 --written 4000
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from common import arg  # noqa: E402

STAGES = ("01_sample", "02_score", "03_refine", "04_denoise", "05_pairs")


@dataclass
class Args:
    sizes: list[int] = arg((100, 1_000, 10_000), "prompts")
    n: int = arg(5, "responses a prompt (paper, Table 5: 3 or 5)")
    words: int = arg(220, "of a response, about 300 tokens; a prompt has a tenth")
    read: float = arg(20_000.0, "tokens a second that the engine reads: assumed, of an 8B model on one 80 GB GPU")
    written: float = arg(4_000.0, "tokens a second that it writes in large batches: assumed too")
    parameters: float = arg(8e9, "of the model that stage 6 trains")
    operations: float = arg(
        4e14, "floating-point operations a second in training: assumed, 40 % of an H100's in bfloat16"
    )
    devices: int = arg(8, "GPUs, each with a copy of the model")


class Stub(common.Engine):
    """Answers at once, with random words and scores; counts calls, and tokens as 4 of 3 words."""

    def __init__(self, words: int):
        super().__init__("a stub that answers at once")
        self.rng, self.calls, self.batch_size = random.Random(0), 0, 72
        known = [json.loads(line)["prompt"] for _, line in common.read_lines(ROOT / "data" / "high_stakes.jsonl")]
        self.texts = [" ".join(self.rng.choices(" ".join(known).split(), k=words)) for _ in range(500)]

    def asked(self, chats: list, written: int) -> None:
        self.calls += len(chats)
        self.count(sum(len(common.plain_text(chat).split()) for chat in chats) * 4 // 3, written)

    def complete(self, chats: list, seeds: list[int], **sampling) -> list[common.Completion]:
        texts = [f"{self.rng.choice(self.texts)} {seed % 1000}" for seed in seeds]
        self.asked(chats, sum(len(text.split()) for text in texts) * 4 // 3)
        return [common.Completion(text, len(text.split()), False) for text in texts]

    def choose(self, chats: list, skeleton: list[str], options: list[str]) -> list[list[common.Choice]]:
        # The refined response comes last, alone, and gets the best scores: stage 4 keeps most prompts.
        self.asked(chats, len(chats) * (len(skeleton) - 1))
        low, high = (9, 9) if self.refining else (3, 7)
        drawn = [[self.rng.randint(low, high) for _ in skeleton[1:]] for _ in chats]
        return [
            [common.Choice(k, [0.0 if i == k else -1e9 for i in range(len(options))]) for k in own] for own in drawn
        ]

    refining = False


def run(size: int, args: Args) -> tuple[dict[str, float], dict[str, tuple]]:
    """({stage: processor seconds}, {stage: (calls, tokens read, tokens written)}) of one run."""
    seconds, asked, engine = {}, {}, Stub(args.words)
    common.make_engine, common.make_judge = lambda *_: engine, lambda *_: engine
    with tempfile.TemporaryDirectory() as name:
        prompts = Path(name, "prompts.jsonl")
        with open(prompts, "w", encoding="utf-8") as file:
            for i in range(size):
                text = " ".join(engine.rng.choice(engine.texts).split()[: args.words // 10])
                file.write(common.dump_row({"id": f"p{i}", "prompt": f"{text} {i}?"}))
        for stage in STAGES:
            module, before = importlib.import_module(stage), (engine.calls, engine.tokens_in, engine.tokens_out)
            options = {"prompts": str(prompts), "n": args.n} if stage[:2] == "01" else {}
            options |= {"judge_check": False} if stage[:2] == "02" else {}
            engine.refining, started = stage[:2] == "03", time.process_time()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                module.main(module.Args(run_dir=name, **options))
            after = (engine.calls, engine.tokens_in, engine.tokens_out)
            seconds[stage], asked[stage] = (
                time.process_time() - started,
                tuple(b - a for a, b in zip(before, after, strict=True)),
            )
    return seconds, asked


def main(args: Args) -> None:
    run(10, args)  # imports
    found = {size: run(size, args) for size in args.sizes}
    print("| processor ms a prompt | " + " | ".join(f"{size:,} prompts" for size in args.sizes) + " |")
    print("|" + " --- |" * (1 + len(args.sizes)))
    for stage in STAGES:
        print(f"| {stage} | " + " | ".join(f"{found[size][0][stage] / size * 1000:.2f}" for size in args.sizes) + " |")

    largest = max(args.sizes)
    print("\n| a prompt | calls | tokens read | tokens written | hours for 300 | hours for a million | |")
    print("|" + " --- |" * 7)
    total = 0.0
    for stage in STAGES[:3]:
        calls, read, written = (count / largest for count in found[largest][1][stage])
        hours = (read / args.read + written / args.written) / args.devices / 3600
        total += hours
        row = f"{calls:.0f} | {read:,.0f} | {written:,.0f} | {hours * 300:.3f} | {hours * 1e6:,.0f}"
        print(f"| {stage} | {row} | calculated |")
    tokens = (args.n + 1) * args.words * 1.1 * 4 / 3
    hours = 8 * args.parameters * tokens / args.operations / args.devices / 3600
    total += hours
    print(f"| 06_train | – | {tokens:,.0f} | – | {hours * 300:.3f} | {hours * 1e6:,.0f} | calculated, one epoch |")
    print(f"| all | | | | {total * 300:.3f} | {total * 1e6:,.0f} | calculated, {args.devices} devices |")


if __name__ == "__main__":
    common.run_stage(main, Args)
