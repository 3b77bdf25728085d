"""Stage 1's sampling against transformers' generate: the same model, prompts and settings, in one run.

    stage 1     as 01_sample.py has it: longest first, each prompt read once (a GPU: continuous batching)
    plain loop  the same without continuous batching, where stage 1 has it
    batches     generate, 8 sequences at a time in file order
    one by one  generate, one prompt at a time with num_return_sequences

Useful tokens are those of the responses, up to the end token; what a finished row waits for others is not.
With --shape the weights and prompts are random, and a response ends at every token with the same chance, so
that lengths are uneven without a model at hand.

    writes  nothing but what it prints: useful tokens/s of each turn, medians and ratios
    run     python bench/generate.py
            python bench/generate.py --shape 8b --prompts 64 --n 5 --max_new_tokens 256 --slow_repeats 0
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

# of Llama 3.1 8B; tiny is for tests
SHAPES = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
PROMPT_TOKENS = (64, 256)  # fewest and most of a random prompt


@dataclass
class Args:
    model: str = arg(common.DEFAULT_MODEL, "model to sample from")
    shape: str | None = arg(None, "random weights of this shape instead", tuple(SHAPES))
    mean_length: int = arg(128, "of responses with --shape; 0: all have --max_new_tokens")
    prompts: int = arg(48, "prompts of data/high_stakes.jsonl, or random ones with --shape")
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


def random_model(shape: dict, mean_length: int):
    """(model, tokenizer) with random weights, on a GPU in bfloat16; a share of the tokens ends a response."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.LlamaConfig(**shape, max_position_embeddings=4096, bos_token_id=None)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    ends = round(shape["vocab_size"] / mean_length) if mean_length else 1  # the one is hardly ever drawn
    model.generation_config.eos_token_id = list(range(ends))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape["vocab_size"])}, unk_token="w1"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0")
    return model.eval(), tokenizer


def main(args: Args) -> None:
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    how = {"continuous": torch.cuda.is_available(), "batch_size": args.batch_size}
    if args.shape:
        model, tokenizer = random_model(SHAPES[args.shape], args.mean_length)
        backend = common.LocalModel.of(model, tokenizer, args.shape, **how)
        drawn, size = random.Random(0), SHAPES[args.shape]["vocab_size"]
        lengths = [drawn.randint(*PROMPT_TOKENS) for _ in range(args.prompts)]
        encoded = [[drawn.randrange(size // 2, size) for _ in range(length)] for length in lengths]
    else:
        backend = common.LocalModel(args.model, **how)
        backend.open()
        model, tokenizer = backend.model, backend.tokenizer
        lines = common.read_lines(ROOT / "data" / "high_stakes.jsonl")
        prompts = [json.loads(line)["prompt"] for _, line in lines][: args.prompts]
        encoded = [common.encode_prompt(tokenizer, prompt) for prompt in prompts]
    options = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
    groups = common.plan_batches([len(ids) for ids in encoded], [args.n] * len(encoded), backend.sequences())

    def sample(batch: list[int]) -> list:
        return backend.decode([encoded[i] for i in batch], [args.n] * len(batch), batch, **options)

    def stage(continuous: bool) -> int:
        before, backend.continuous = backend.tokens_out, continuous
        common.speed_up_attention(model)
        for _ in common.run_batches(backend, groups, [False] * len(encoded), sample):
            pass
        model.set_attn_implementation("sdpa")  # the others have transformers' own
        return backend.tokens_out - before

    def batches() -> int:
        rows = [ids for ids in encoded for _ in range(args.n)]
        return sum(plain_generate(model, tokenizer, rows[i : i + 8], 1, args) for i in range(0, len(rows), 8))

    def one_by_one() -> int:
        return sum(plain_generate(model, tokenizer, [ids], args.n, args) for ids in encoded)

    with backend.session(decodes=True):  # tries continuous batching
        continuous = backend.continuous
    works = {"stage 1": lambda: stage(continuous), "batches": batches, "one by one": one_by_one}
    if continuous:
        works["plain loop"] = lambda: stage(False)
    rates: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(args.repeats):
        for name, work in works.items():
            if name == "one by one" and turn >= args.slow_repeats:
                continue
            started = time.time()
            rates[name].append(work() / (time.time() - started))
            print(f"  {name}: {rates[name][-1]:.1f} useful tokens/s", flush=True)
    ours = statistics.median(rates["stage 1"])
    print(
        f"{args.shape or args.model}, {len(encoded)} prompts × {args.n}, up to {args.max_new_tokens} tokens"
    )
    for name, values in rates.items():
        if not values:
            continue
        median = statistics.median(values)
        rate = f"{median:>8.1f} useful tokens/s (median of {len(values)})"
        print(f"  {name:<12}{rate}, stage 1 is {ours / median:.2f} times that")


if __name__ == "__main__":
    common.run_stage(main, Args)
