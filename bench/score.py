"""Stage 2's scoring against free-text JSON judging and against a bare forward pass, in one run.

stage 2     common.judge with --score_mode expected, in batches as 02_score.py makes them
json        transformers' generate, 16 prompts at a time, up to 64 tokens, read by common.parse_scores
forward     bare forward passes, in rows of 512, over as many tokens as are distinct (what judge prompts share
            counts once), with the JSON around the scores: what reading them costs at least

writes  nothing but what it prints: responses/s of each turn, medians and ratios, and how often
        `constrained` agrees with `json` where that can be read
run     python bench/score.py
        python bench/score.py --teach 40 --responses 40 --repeats 1
            for the agreement: a model that writes no JSON by itself (smollm2-135m) is taught to, on other
            responses, with their length as the score
"""

from __future__ import annotations

import itertools
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
    words: int = arg(60, "longest response in words, drawn from the prompts")
    batch_size: int = arg(72, "stage 2's")
    repeats: int = arg(3, "turns of each; the medians count")
    slow_repeats: int = arg(1, "turns of `json`, which takes long")
    teach: int = arg(0, "training steps of four judge prompts, before all else")
    threads: int = arg(2, "threads of torch on a CPU")


def distinct_tokens(rows: list[list[int]]) -> int:
    """How many tokens a tree of all rows has: common beginnings count once."""
    rows = sorted(rows)
    shared = [common.shared_prefix([a, b]) for a, b in itertools.pairwise(rows)]
    return sum(map(len, rows)) - sum(shared)


def teach(model, tokenizer, objectives, names: list[str], items: list[tuple[str, str]]) -> None:
    """Fine-tunes a model in place to write the judge's JSON, four items a step; scores follow the length."""
    import torch

    end = common.end_token_ids(tokenizer, model)[-1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    for start in range(0, len(items), 4):
        rows, answers = [], []
        for prompt, response in items[start : start + 4]:
            first = min(10, 1 + len(response.split()) // 6)
            text = f'{{\n    "{names[0]}": {first},\n    "{names[1]}": {11 - first}\n}}'
            answers.append([*tokenizer(text, add_special_tokens=False).input_ids, end])
            judge_prompt = common.judge_prompt(objectives, prompt, response, True)
            rows.append(common.encode_prompt(tokenizer, judge_prompt) + answers[-1])
        ids, mask = common.pad_left(rows, end, model.device)
        labels = torch.full_like(ids, -100)
        for i, answer in enumerate(answers):
            labels[i, -len(answer) :] = ids[i, -len(answer) :]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        loss = model(ids, attention_mask=mask, position_ids=positions, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"  teaching, step {start // 4 + 1}: loss {loss.item():.3f}", flush=True)


def main(args: Args) -> None:
    import torch

    torch.set_num_threads(args.threads)
    backend = common.LocalModel(args.model)
    backend.open()
    tokenizer, model = backend.tokenizer, backend.model
    objectives = common.load_objectives("harmlessness", None)
    names = [name for name, _ in objectives]
    rng = random.Random(0)
    lines = common.read_lines(ROOT / "data" / "high_stakes.jsonl")
    prompts = [json.loads(line)["prompt"] for _, line in lines][: -(-args.responses // 4)]
    words = " ".join(prompts).split()

    def draw(prompt: str) -> tuple[str, str]:
        return prompt, " ".join(rng.choices(words, k=rng.randint(5, args.words)))

    items = [draw(prompt) for prompt in prompts for _ in range(4)][: args.responses]
    if args.teach:
        lesson = [draw(rng.choice(prompts)) for _ in range(4 * args.teach)]
        teach(model, tokenizer, objectives, names, lesson)
    texts = [common.judge_prompt(objectives, *item, True) for item in items]
    rows = [common.encode_prompt(tokenizer, text) for text in texts]
    skeleton = f'{{\n    "{names[0]}": 5,\n    "{names[1]}": '
    answer = tokenizer(skeleton, add_special_tokens=False).input_ids
    distinct = distinct_tokens([row + answer for row in rows])

    def judge(mode: str) -> list:
        groups = [list(range(i, min(i + 4, len(items)))) for i in range(0, len(items), 4)]
        widths = [max(len(rows[i]) for i in group) for group in groups]
        scores = [None] * len(items)
        for batch in common.plan_batches(widths, [len(group) for group in groups], args.batch_size):
            chosen = [i for g in batch for i in groups[g]]
            options = {"score_mode": mode, "with_instruction": True, "seeds": chosen}
            found = common.judge(backend, [items[i] for i in chosen], objectives, **options)
            for i, pair in zip(chosen, found, strict=True):
                scores[i] = pair
        return scores

    def stage() -> list:
        common.speed_up_attention(model)
        scores = judge("expected")
        model.set_attn_implementation("sdpa")  # the others have transformers' own
        return scores

    def free_text() -> list:
        ends, answers = common.end_token_ids(tokenizer, model), []
        for start in range(0, len(rows), 16):
            ids, mask = common.pad_left(rows[start : start + 16], ends[0], model.device)
            options = {"max_new_tokens": common.JUDGE_MAX_NEW_TOKENS, "do_sample": False}
            with torch.inference_mode():
                output = model.generate(
                    input_ids=ids, attention_mask=mask, pad_token_id=ends[0], eos_token_id=ends, **options
                )
            answers += tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return [common.parse_scores(answer, names) for answer in answers]

    def forward() -> None:
        with torch.inference_mode():
            for start in range(0, distinct, 4096):
                left = min(4096, distinct - start)
                size = (max(1, left // 512), min(512, left))
                model.base_model(torch.randint(0, len(tokenizer), size, device=model.device), use_cache=False)

    seconds: dict[str, list[float]] = {"stage 2": [], "json": [], "forward": []}
    results = {}
    works = (stage, free_text, forward)
    for turn in range(args.repeats):
        for (name, values), work in zip(seconds.items(), works, strict=True):
            if name == "json" and turn >= args.slow_repeats:
                continue
            started = time.time()
            results[name] = work()
            values.append(time.time() - started)
            print(f"  {name}: {values[-1]:.1f} s, {len(items) / values[-1]:.2f} responses/s", flush=True)
    ours = statistics.median(seconds["stage 2"])
    total, of_prompts = sum(map(len, rows)), distinct_tokens(rows)
    print(f"{args.model}, {len(items)} responses, judge prompts of {total} tokens")
    print(f"distinct tokens: {of_prompts} in the prompts, {distinct} with the JSON around the scores")
    for name, values in seconds.items():
        if not values:
            continue
        median = statistics.median(values)
        print(f"  {name:<10}{median:>8.1f} s (median of {len(values)}), {median / ours:.2f} times stage 2")
    free = results.get("json", [])
    read = [i for i, pair in enumerate(free) if pair is not None]
    scored = sum(pair is not None for pair in results["stage 2"])
    print(f"  read: stage 2 {scored}, json {len(read)} of {len(items)}")
    if read:
        constrained = judge("constrained")
        same = sum(constrained[i] == free[i] for i in read)
        print(f"  constrained equals json in {same} of these {len(read)}")


if __name__ == "__main__":
    common.run_stage(main, Args)
