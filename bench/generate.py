"""Stage 1's sampling against transformers' generate: the same model, prompts and settings, in one run.

    stage 1     as 01_sample.py has it: longest first, each prompt read once (a GPU: continuous batching)
    batches     generate, 8 sequences at a time in file order
    one by one  generate, one prompt at a time with num_return_sequences

Useful tokens are those of the responses, up to the end token; what a finished row waits for others is not.

    writes  nothing but what it prints: useful tokens/s of each turn, medians and ratios
    run     python bench/generate.py
"""

from __future__ import annotations

import json
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
    model: str = arg(common.DEFAULT_MODEL, "model to sample from")
    prompts: int = arg(48, "prompts of data/high_stakes.jsonl")
    n: int = arg(3, "responses a prompt")
    max_new_tokens: int = arg(128, "longest response")
    temperature: float = arg(1.0, "sampling temperature")
    batch_size: int = arg(144, "stage 1's sequences at a time")
    repeats: int = arg(3, "turns of each; the medians count")
    slow_repeats: int = arg(1, "turns of `one by one`, which takes long")
    threads: int = arg(2, "threads of torch on a CPU")


def plain_generate(model, tokenizer, rows: list[list[int]], copies: int, args: Args) -> int:
    """Useful tokens of one call of transformers' generate."""
    import torch

    ends = common.end_token_ids(tokenizer, model)
    ids, mask = common.pad_left(rows, ends[0], model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            num_return_sequences=copies,
            max_new_tokens=args.max_new_tokens,
            do_sample=True,
            temperature=args.temperature,
            top_p=1.0,
            top_k=0,
            repetition_penalty=1.0,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
    useful = 0
    for row in output[:, ids.shape[1] :].tolist():
        useful += next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return useful


def main(args: Args) -> None:
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    backend = common.LocalModel(args.model, continuous=True, batch_size=args.batch_size)
    backend.open()
    tokenizer, model = backend.tokenizer, backend.model
    lines = common.read_lines(ROOT / "data" / "high_stakes.jsonl")
    prompts = [json.loads(line)["prompt"] for _, line in lines][: args.prompts]
    encoded = [common.encode_prompt(tokenizer, prompt) for prompt in prompts]

    def stage() -> int:
        before = backend.tokens_out
        common.speed_up_attention(model)
        counts = [args.n] * len(encoded)
        options = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
        for batch in common.plan_batches([len(ids) for ids in encoded], counts, backend.sequences()):
            backend.decode([encoded[i] for i in batch], [args.n] * len(batch), batch, **options)
        model.set_attn_implementation("sdpa")  # the others have transformers' own
        return backend.tokens_out - before

    def batches() -> int:
        rows = [ids for ids in encoded for _ in range(args.n)]
        return sum(plain_generate(model, tokenizer, rows[i : i + 8], 1, args) for i in range(0, len(rows), 8))

    def one_by_one() -> int:
        return sum(plain_generate(model, tokenizer, [ids], args.n, args) for ids in encoded)

    rates: dict[str, list[float]] = {"stage 1": [], "batches": [], "one by one": []}
    for turn in range(args.repeats):
        for (name, values), work in zip(rates.items(), (stage, batches, one_by_one), strict=True):
            if work is one_by_one and turn >= args.slow_repeats:
                continue
            started = time.time()
            values.append(work() / (time.time() - started))
            print(f"  {name}: {values[-1]:.1f} useful tokens/s", flush=True)
    ours = statistics.median(rates["stage 1"])
    print(f"{args.model}, {len(encoded)} prompts × {args.n}, up to {args.max_new_tokens} tokens")
    for name, values in rates.items():
        if not values:
            continue
        median = statistics.median(values)
        rate = f"{median:>8.1f} useful tokens/s (median of {len(values)})"
        print(f"  {name:<12}{rate}, stage 1 is {ours / median:.2f} times that")


if __name__ == "__main__":
    common.run_stage(main, Args)
