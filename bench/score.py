"""Stage 2's scoring against free-text JSON judging, in one run.

    expected, constrained   common.judge with that --score_mode, in batches as 02_score.py makes them
    json                    transformers' generate, greedy, 16 prompts at a time, read by common.parse_scores

Responses are random words of the prompts' own: what a judge reads takes as long whatever it says.

    writes  nothing but what it prints: seconds of each turn, medians and ratios, and how many scores were read
    run     python bench/score.py
            python bench/score.py --words 240 --responses 80
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from common import arg  # noqa: E402


@dataclass
class Args:
    model: str = arg(common.DEFAULT_MODEL, "the judge")
    responses: int = arg(200, "responses to score, four a prompt of data/high_stakes.jsonl")
    words: int = arg(60, "longest response in words, the shortest being 5")
    batch_size: int = arg(72, "stage 2's")
    repeats: int = arg(3, "turns of each; the medians count")
    slow_repeats: int = arg(1, "turns of `json`, which takes long")
    threads: int = arg(2, "threads of torch on a CPU")


def make_items(args: Args) -> list[tuple[str, str]]:
    """(prompt, response), four of each prompt."""
    rng, lines = random.Random(0), common.read_lines(ROOT / "data" / "high_stakes.jsonl")
    prompts = [json.loads(line)["prompt"] for _, line in lines][: -(-args.responses // 4)]
    words = " ".join(prompts).split()
    items = [(prompt, " ".join(rng.choices(words, k=rng.randint(5, args.words)))) for prompt in prompts for _ in "1234"]
    return items[: args.responses]


def free_text(engine: common.Local, chats: list[list[dict]], names: list[str], limit: int) -> list:
    """The scores in the free answers that transformers' generate writes, 16 prompts at a time."""
    import torch

    rows, answers = [engine.encode(chat) for chat in chats], []
    ends = common.end_token_ids(engine.tokenizer, engine.model)
    for start in range(0, len(rows), 16):
        ids, mask = common.pad_left(rows[start : start + 16], engine.model.device)
        options = {"max_new_tokens": limit, "do_sample": False, "pad_token_id": ends[0], "eos_token_id": ends}
        with torch.inference_mode():
            output = engine.model.generate(input_ids=ids, attention_mask=mask, **options)
        answers += engine.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [common.parse_scores(answer, names) for answer in answers]


def main(args: Args) -> None:
    import torch

    torch.set_num_threads(args.threads)
    engine = common.Local(args.model, batch_size=args.batch_size)
    engine.open()
    judging = common.JudgeArgs()
    objectives, _ = common.judge_defaults(judging)
    names, limit = [name for name, _ in objectives], judging.judge_max_new_tokens
    items = make_items(args)
    chats = [common.as_messages(common.judge_prompt(objectives, *item, True)) for item in items]
    sizes = [(common.text_size(chat) + limit, 1) for chat in chats]

    def stage(mode: str) -> list:
        judging.score_mode, scores = mode, [None] * len(items)
        for batch in common.plan_batches(sizes, engine.batch_size, engine.cached_tokens):
            found = common.judge(engine, [items[i] for i in batch], judging, batch)
            for i, own in zip(batch, found, strict=True):
                scores[i] = own
        return scores

    works = {
        "expected": lambda: stage("expected"),
        "constrained": lambda: stage("constrained"),
        "json": lambda: free_text(engine, chats, names, limit),
    }
    lengths = [engine.length(chat) for chat in chats]
    print(f"{len(items)} responses, judge prompts of {min(lengths)} to {max(lengths)} tokens", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    scores: dict[str, list] = {}
    for turn in range(args.repeats):
        for name, work in works.items():
            if name != "json" or turn < args.slow_repeats:
                started = time.perf_counter()
                scores[name] = work()
                seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        each, read = ", ".join(f"{value:.1f}" for value in values), sum(own is not None for own in scores[name])
        print(f"  {name:<12}{statistics.median(values):>8.1f} s (median of {each}), read {read} of {len(items)}")
    ratios = [statistics.median(seconds["json"]) / statistics.median(seconds[name]) for name in list(works)[:2]]
    print(f"  json takes {ratios[0]:.2f} times as long as expected, {ratios[1]:.2f} times as long as constrained")


if __name__ == "__main__":
    common.run_stage(main, Args)
