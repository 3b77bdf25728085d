"""Stage 1's and stage 3's decoding against transformers' generate: the same model, prompts and settings, in one run.

    stage 1     --n sampled responses to each prompt, in batches as common.map_rows plans them
    stage 3     one greedy answer to Figure 10 with --n of these responses as its candidates: long prompts
    generate    the same conversations in file order, 8 sequences at a time

The two take turns. Useful tokens are those of the answers up to the end token; what a finished row waits is not.

    writes  nothing but what it prints: useful tokens/s of each turn, medians, and the ratio of the medians
    run     python bench/generate.py
            python bench/generate.py --max_new_tokens 256
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from common import arg  # noqa: E402


@dataclass
class Args:
    model: str = arg(common.DEFAULT_MODEL, "model to sample from")
    prompts: int = arg(48, "prompts of data/high_stakes.jsonl")
    n: int = arg(3, "responses a prompt, and candidates in Figure 10")
    max_new_tokens: int = arg(128, "longest answer")
    batch_size: int = arg(72, "of the stages")
    peer_batch_size: int = arg(8, "of generate")
    repeats: int = arg(3, "turns of each; the medians count")
    cases: list[str] = arg(("stage 1", "stage 3"), "what to measure", ("stage 1", "stage 3"))
    threads: int = arg(2, "threads of torch on a CPU")


def decode(engine: common.Local, chats: list[list[dict]], n: int, temperature: float, limit: int) -> list:
    """The completions of n copies of each conversation, in batches as a stage makes them."""
    sizes = [(common.text_size(chat) + limit, n) for chat in chats]
    completions: list = [None] * len(chats)
    for batch in common.plan_batches(sizes, engine.batch_size, engine.cached_tokens):
        copies = [chats[i] for i in batch for _ in range(n)]
        seeds = [common.derive_seed(i, j) for i in batch for j in range(n)]
        done = engine.complete(copies, seeds, max_new_tokens=limit, temperature=temperature)
        for place, i in enumerate(batch):
            completions[i] = done[place * n : (place + 1) * n]
    return completions


def peer_decode(engine: common.Local, chats: list[list[dict]], n: int, temperature: float, limit: int, size: int):
    """Useful tokens of the same by transformers' generate, `size` sequences at a time in file order."""
    import torch

    ends = common.end_token_ids(engine.tokenizer, engine.model)
    rows, useful = [engine.encode(chat) for chat in chats for _ in range(n)], 0
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    for start in range(0, len(rows), size):
        ids, mask = common.pad_left(rows[start : start + size], engine.model.device)
        with torch.inference_mode():
            output = engine.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=limit, eos_token_id=ends, pad_token_id=ends[0],
                **sampling,
            )  # fmt: skip
        for row in output[:, ids.shape[1] :].tolist():
            useful += next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return useful


def race(title: str, engine: common.Local, chats: list[list[dict]], n: int, temperature: float, args: Args) -> None:
    """Measures both in turns and prints."""

    def ours() -> int:
        return sum(one.tokens for own in decode(engine, chats, n, temperature, args.max_new_tokens) for one in own)

    def peer() -> int:
        return peer_decode(engine, chats, n, temperature, args.max_new_tokens, args.peer_batch_size)

    lengths = [engine.length(chat) for chat in chats]
    shape = f"{len(chats)} prompts of {min(lengths)} to {max(lengths)} tokens × {n}, up to {args.max_new_tokens} more"
    print(f"{title}: {shape}", flush=True)
    rates: dict[str, list[float]] = {title: [], "generate": []}
    for _ in range(args.repeats):
        for name, work in ((title, ours), ("generate", peer)):
            started = time.perf_counter()
            rates[name].append(work() / (time.perf_counter() - started))
    for name, values in rates.items():
        each = ", ".join(f"{value:.1f}" for value in values)
        print(f"  {name:<9}{statistics.median(values):>8.1f} useful tokens/s (median of {each})")
    ratio = statistics.median(rates[title]) / statistics.median(rates["generate"])
    print(f"  {title} is {ratio:.2f} times generate in batches of {args.peer_batch_size}", flush=True)


def main(args: Args) -> None:
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    engine = common.Local(args.model, batch_size=args.batch_size)
    engine.open()
    lines = common.read_lines(ROOT / "data" / "high_stakes.jsonl")
    prompts = [json.loads(line)["prompt"] for _, line in lines][: args.prompts]
    chats = [common.as_messages(prompt) for prompt in prompts]
    if "stage 1" in args.cases:
        race("stage 1", engine, chats, args.n, 1.0, args)
    if "stage 3" in args.cases:
        refine = importlib.import_module("03_refine")
        judging = SimpleNamespace(objectives=["harmlessness", "helpfulness"], constitution=None)
        answers = decode(engine, chats, args.n, 1.0, args.max_new_tokens)
        candidates = [[{"text": one.text, "scores": [8, 5]} for one in own] for own in answers]
        asked = zip(prompts, candidates, strict=True)
        forms = [refine.refine_messages("paper", common.load_objectives(judging), *one) for one in asked]
        race("stage 3", engine, forms, 1, 0.0, args)


if __name__ == "__main__":
    common.run_stage(main, Args)
