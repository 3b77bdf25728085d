"""Stage 6, priority alignment (SPA section 3.4, equation 3; Algorithm 1, lines 25-30).

Fine-tunes all weights on the pairs with the uncertainty-weighted SimPO loss

    w_i = (gap_i / mean gap)^α
    loss_i = −w_i · log σ(β/|y| · log π(y|x) − β/|y⁻| · log π(y⁻|x) − γ)

or with one of the paper's comparisons: simpo (w = 1), dpo (a frozen reference), sft (the preferred
responses alone). Each distinct response goes through the model once, however many pairs it is in.

    reads   RUN_DIR/05_pairs.jsonl
    writes  RUN_DIR/06_model/ (--output_dir), a Hugging Face checkpoint, and beside it
            06_metrics.jsonl, one row per step: {"step": 1, "loss": …, "rewards/margins": …, …}
    run     accelerate launch 06_train.py --run_dir runs/default
            python 06_train.py …  is the same on one device

Hardware: float32 weights, gradients and AdamW take 16 bytes a parameter: 2 GB for 135M, 8 × 80 GB for 8B.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common
from common import arg, check

PROJECTION_CHUNK = 256  # response positions whose logits over the vocabulary are in memory at a time


@dataclass
class Args:
    loss: str = arg(
        "spa",
        "spa: equation 3; simpo: all weights 1; dpo; sft (paper, Table 1)",
        ("spa", "simpo", "dpo", "sft"),
    )
    alpha: float = arg(1.0, "exponent of the weights (paper, Table 5: 1, 2, 3 or 4; the choice is ours)")
    beta: float | None = arg(None, "reward scale; default: 2.0 (SimPO's), for dpo 0.01 (ours)")
    gamma_beta_ratio: float = arg(0.25, "γ/β, the target margin (SimPO's default; its recipes: 0.1 to 1.6)")
    gap_mean: str = arg(
        "dataset",
        "mean gap over the data set (Algorithm 1) or the global batch (section 3.4)",
        ("dataset", "batch"),
    )
    learning_rate: float = arg(1e-6, "peak (paper, Table 5: 5e-7, 1e-6, 5e-6 or 1e-5; the choice is ours)")
    warmup_ratio: float = arg(0.1, "share of the steps with rising learning rate; then a cosine (SimPO's)")
    epochs: int = arg(1, "passes over the pairs (paper silent)")
    batch_size: int = arg(16, "prompts per optimizer step over all processes (paper silent)")
    max_grad_norm: float = arg(1.0, "gradient clipping (SimPO's)")
    weight_decay: float = arg(0.0, "of AdamW (SimPO's)")
    max_length: int = arg(4096, "prompt and response in tokens; longer prompts lose their left (ours)")
    tokens_per_batch: int = arg(
        8192, "padded tokens in one forward pass; changes memory, never the gradient (ours)"
    )
    gradient_checkpointing: bool = arg(False, "recompute activations: less memory, a third more time")
    output_dir: str | None = arg(None, "folder of the trained model; default: 06_model in the run directory")
    model: str | None = arg(None, "model to train; default: the model of stage 1")
    chat_template: str | None = arg(None, "file with a Jinja chat template; default: that of stage 1")
    run_dir: str = arg("runs/default", "folder of this run's files")
    seed: int = arg(0, "seed of the order of the prompts")
    overwrite: bool = arg(False, "train again although the model is there")


# ---------------------------------------------------------------------------------------------------
# The losses.


def pair_weights(gaps, alpha: float, mean_gap: float | None = None) -> torch.Tensor:
    """w_i = (gap_i / mean gap)^α (section 3.4), float32 of shape (P,).

    gaps: P numbers >= 0; mean_gap: None for the mean of these gaps. Raises UserError if the mean is 0.
    """
    gaps = torch.as_tensor(gaps, dtype=torch.float64)
    mean = gaps.mean().item() if mean_gap is None else float(mean_gap)
    check(mean > 0, "the mean gap is 0: no pair's totals differ, so no weight is defined; use --loss simpo")
    return ((gaps / mean) ** alpha).float()


def spa_loss(chosen_logps, rejected_logps, weights, beta: float, gamma: float) -> torch.Tensor:
    """Equation 3, before the mean over pairs; all tensors have shape (P,), so has the result.

    chosen_logps, rejected_logps: log π(y|x) / |y|, the average log-probability per response token, end
    token included. weights: w_i; all 1 gives SimPO. γ is absolute: gamma_beta_ratio · β.
    """
    return -weights * F.logsigmoid(beta * (chosen_logps - rejected_logps) - gamma)  # equation 3


def dpo_loss(chosen_logps, rejected_logps, chosen_reference, rejected_reference, beta: float) -> torch.Tensor:
    """DPO (arXiv 2305.18290, equation 7), before the mean; sums of log-probabilities, each of shape (P,)."""
    return -F.logsigmoid(beta * ((chosen_logps - chosen_reference) - (rejected_logps - rejected_reference)))


def response_logps(model, input_ids, attention_mask, response_mask) -> torch.Tensor:
    """Σ_t log π(y_t | x, y_<t) of every row, float32 of shape (B,).

    input_ids, attention_mask, response_mask: (B, T); response_mask is 1 at response tokens. The
    vocabulary projection runs at response positions only, chunk by chunk, and its logits are computed
    again in the backward pass, so memory does not grow with tokens × vocabulary.
    """
    hidden = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False
    ).last_hidden_state  # (B, T, H)
    predicted = response_mask[:, 1:].bool()  # position t is predicted at t − 1
    states, targets = hidden[:, :-1][predicted], input_ids[:, 1:][predicted]  # (N, H), (N,)
    head = model.get_output_embeddings()

    def project(states, targets):
        logits = head(states).float()  # (chunk, V); the softmax is always in float32
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    chunks = zip(states.split(PROJECTION_CHUNK), targets.split(PROJECTION_CHUNK), strict=True)
    logps = torch.cat([checkpoint(project, s, t, use_reentrant=False) for s, t in chunks])
    rows = predicted.nonzero()[:, 0]
    return torch.zeros(len(input_ids), device=logps.device).index_add(0, rows, logps)


# ---------------------------------------------------------------------------------------------------
# Data: pairs grouped by prompt, each distinct response tokenized once.


def read_pairs(path: Path, needs_gap: bool) -> list[dict]:
    """The rows of 05_pairs.jsonl, checked; UserError with file and line."""
    check(path.exists(), f"{path} not found; run 05_pairs.py with this --run_dir first")
    pairs = []
    for number, line in common.read_lines(path):
        where = f"{path}, line {number}"
        row = common.parse_json(line, where)
        for key in ("prompt", "chosen", "rejected", *(["gap"] if needs_gap else [])):
            check(isinstance(row, dict) and key in row, f"{where}: no '{key}' in the row; add it")
        for key in ("prompt", "chosen", "rejected"):
            fits = isinstance(row[key], list) and row[key]
            fits = fits and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in row[key])
            check(bool(fits), f"{where}: '{key}' must be a list of messages with 'role' and 'content'")
        gap = row.get("gap", 0)
        fits = isinstance(gap, (int, float)) and not isinstance(gap, bool) and 0 <= gap < math.inf
        check(fits, f"{where}: 'gap' must be a number, 0 or more")
        pairs.append(row)
    check(bool(pairs), f"{path} has no pairs; see what 04_denoise.py and 05_pairs.py printed")
    return pairs


def encode_response(tokenizer, prompt: list[dict], response: list[dict], ends: list[int], max_length: int):
    """(prompt ids, response ids with one end token), or None if the response leaves no room for a prompt.

    The whole conversation is rendered, as the template wants it; what follows the rendered prompt is the
    response. A longer prompt loses tokens on its left.
    """
    before = common.render_chat(tokenizer, prompt, add_generation_prompt=True)
    whole = common.render_chat(tokenizer, prompt + response, add_generation_prompt=False)
    before_text, whole_text = ("".join(text for text, _ in pieces) for pieces in (before, whole))
    check(
        whole_text.startswith(before_text),
        "the chat template writes a prompt differently once it is answered (a thinking model?), so its "
        "response can't be told apart; pass a plain one with --chat_template FILE",
    )
    prompt_ids, whole_ids = (common.encode_pieces(tokenizer, pieces) for pieces in (before, whole))
    ids = whole_ids[len(prompt_ids) :]
    if whole_ids[: len(prompt_ids)] != prompt_ids:  # tokens merge over the border: cut the text instead
        skip, rest = len(before_text), []
        for text, is_plain in whole:
            rest += [(text[skip:], is_plain)] if len(text) > skip else []
            skip = max(0, skip - len(text))
        ids = common.encode_pieces(tokenizer, rest)
    last_end = max((i for i, token in enumerate(ids) if token in ends), default=None)
    if last_end is not None:
        ids = ids[: last_end + 1]  # what a template writes after the end token is never generated
    elif tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    room = max_length - len(ids)
    return (prompt_ids[-room:], ids) if ids and room > 0 else None


def group_pairs(tokenizer, pairs: list[dict], ends: list[int], args: Args) -> tuple[list[dict], int]:
    """(groups, how many pairs were dropped); one group a prompt, with each distinct response once:

    {"id", "sequences": [(prompt ids, response ids), …], "pairs": [(chosen, rejected, gap), …]}; `pairs`
    index into `sequences`. With --loss sft only the distinct preferred responses are kept.
    """
    groups: dict[str, dict] = {}
    dropped = 0
    for pair in pairs:
        key = json.dumps([pair.get("id"), pair["prompt"]])
        group = groups.setdefault(key, {"id": pair.get("id"), "sequences": [], "pairs": [], "index": {}})
        indices = []
        for side in ("chosen", "rejected") if args.loss != "sft" else ("chosen",):
            text = json.dumps(pair[side])
            if text not in group["index"]:
                encoded = encode_response(tokenizer, pair["prompt"], pair[side], ends, args.max_length)
                group["index"][text] = len(group["sequences"]) if encoded else None
                group["sequences"] += [encoded] if encoded else []
            indices.append(group["index"][text])
        if None in indices:
            dropped += 1
        elif args.loss != "sft":
            group["pairs"].append((*indices, pair.get("gap", 0)))
    usable = [
        group for group in groups.values() if group["pairs"] or (args.loss == "sft" and group["sequences"])
    ]
    return usable, dropped


def to_batch(sequences: list[tuple], device) -> dict[str, torch.Tensor]:
    """Right-padded (B, T) int64 tensors: input_ids, attention_mask, response_mask. Masks go by position."""
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    ids, attention, responses = [], [], []
    for prompt, response in sequences:
        padding = [0] * (width - len(prompt) - len(response))
        ids.append(prompt + response + padding)
        attention.append([1] * (len(prompt) + len(response)) + padding)
        responses.append([0] * len(prompt) + [1] * len(response) + padding)
    names = ("input_ids", "attention_mask", "response_mask")
    return {
        k: torch.tensor(v, device=device) for k, v in zip(names, (ids, attention, responses), strict=True)
    }


def pack(lengths: list[list[int]], budget: int) -> list[list[int]]:
    """Indices of items in bins: item i is len(lengths[i]) rows, a bin's rows × longest row <= budget.

    Longest first, so rows in a bin are of like length; an item larger than the budget stands alone.
    """
    bins, width, rows = [], 0, 0
    for i in sorted(range(len(lengths)), key=lambda i: (-max(lengths[i]), i)):
        if not bins or (rows + len(lengths[i])) * width > budget:
            bins.append([])
            width, rows = max(lengths[i]), 0
        bins[-1].append(i)
        rows += len(lengths[i])
    return bins


# ---------------------------------------------------------------------------------------------------
# One optimizer step's loss and its gradient.


def sequence_lengths(group: dict) -> list[int]:
    return [len(prompt) + len(response) for prompt, response in group["sequences"]]


def group_losses(groups: list[dict], logps: torch.Tensor, args: Args) -> tuple[torch.Tensor, dict]:
    """(the losses of these prompts: per pair (P,), or per response token-sum for sft, metrics per pair).

    logps: (S,) summed log-probabilities of all sequences of `groups`, in order. A group's pairs carry
    their weight in "weights", and its sequences their reference log-probabilities in "reference".
    """
    device = logps.device
    counts = [len(response) for group in groups for _, response in group["sequences"]]
    lengths = torch.tensor(counts, device=device, dtype=logps.dtype)  # |y|
    if args.loss == "sft":
        return -logps, {"logps/chosen": logps.detach() / lengths}
    offsets = itertools.accumulate((len(group["sequences"]) for group in groups), initial=0)
    index = [
        (offset + c, offset + r)
        for offset, group in zip(offsets, groups, strict=False)
        for c, r, _ in group["pairs"]
    ]
    chosen, rejected = torch.tensor(index, device=device).T  # each (P,)
    if args.loss == "dpo":
        reference = torch.tensor([value for group in groups for value in group["reference"]], device=device)
        losses = dpo_loss(logps[chosen], logps[rejected], reference[chosen], reference[rejected], args.beta)
        rewards = args.beta * (logps - reference)
    else:
        weights = torch.tensor([w for group in groups for w in group["weights"]], device=device)
        average = logps / lengths  # log π(y|x) / |y|
        losses = spa_loss(
            average[chosen], average[rejected], weights, args.beta, args.beta * args.gamma_beta_ratio
        )
        rewards = args.beta * average
    rewards, average = rewards.detach(), logps.detach() / lengths
    margins = rewards[chosen] - rewards[rejected]
    return losses, {
        "rewards/chosen": rewards[chosen],
        "rewards/rejected": rewards[rejected],
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
        "logps/chosen": average[chosen],
        "logps/rejected": average[rejected],
    }


def all_logps(accelerator, model, groups: list[dict], budget: int) -> list[torch.Tensor]:
    """Summed log-probabilities of every group's sequences, without gradient, on every process; float32, CPU.

    The processes share the work; each makes as many forward passes as the busiest, since sharded weights
    are gathered by all of them together.
    """
    sequences = [sequence for group in groups for sequence in group["sequences"]]
    bins = pack([[len(prompt) + len(response)] for prompt, response in sequences], budget)
    rank, world = accelerator.process_index, accelerator.num_processes
    result = torch.zeros(len(sequences), device=accelerator.device)
    with torch.no_grad():
        rounds = range(0, len(bins), world)
        for start in tqdm(rounds, desc="06 log-probabilities", unit="batch", leave=False, disable=rank > 0):
            members = bins[min(start + rank, len(bins) - 1)]
            values = model(**to_batch([sequences[i] for i in members], accelerator.device))
            if start + rank < len(bins):
                result[members] = values.float()
    result = accelerator.reduce(result, "sum").cpu()
    return list(result.split([len(group["sequences"]) for group in groups]))


def plan_passes(
    groups: list[dict], budget: int
) -> tuple[list[list[dict]], list[tuple[dict, list[list[int]]]]]:
    """(forward passes that hold whole prompts, [(a prompt too large for one pass, its parts), …])."""
    whole, split = [], []
    for members in pack([sequence_lengths(group) for group in groups], budget):
        parts = pack([[length] for length in sequence_lengths(groups[members[0]])], budget)
        if len(members) == 1 and len(parts) > 1:
            split.append((groups[members[0]], parts))
        else:
            whole.append([groups[i] for i in members])
    return whole, split


def backward_step(accelerator, model, groups: list[dict], args: Args, denominator: float) -> dict[str, float]:
    """The gradient of Σ losses / denominator over the prompts of one step; returns the metrics' sums.

    Every process takes its share of the prompts, packed whole into passes of --tokens_per_batch. A prompt
    whose responses don't fit together is split: its log-probabilities are computed without graph, dloss/dlogp
    from them, and then each part's log-probabilities are weighted by it. The gradient is the same. All
    processes make equally many passes (the missing ones with weight 0), so none waits for another.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    plans = [plan_passes(groups[r::world], args.tokens_per_batch) for r in range(world)]
    whole, split = plans[rank]
    looks = max(sum(len(parts) for _, parts in split) for _, split in plans)
    passes = max(len(whole) + sum(len(parts) for _, parts in split) for whole, split in plans)
    sums = dict.fromkeys(metric_names(args), 0.0)

    def forward(sequences):
        return model(**to_batch(sequences, accelerator.device))

    def losses_of(chosen, logps):
        losses, metrics = group_losses(chosen, logps, args)
        for name, values in {"loss": losses.detach(), **metrics}.items():
            sums[name] += values.sum().item()
        return losses.sum() / denominator

    weighted = []  # (sequences, dloss/dlogp): the parts of split prompts
    with torch.no_grad():
        for group, parts in split:
            logps = torch.zeros(len(group["sequences"]), device=accelerator.device)
            for part in parts:
                logps[part] = forward([group["sequences"][i] for i in part]).float()
            with torch.enable_grad():
                logps.requires_grad_()
                (slope,) = torch.autograd.grad(losses_of([group], logps), logps)
            weighted += [([group["sequences"][i] for i in part], slope[part]) for part in parts]
        for _ in range(looks - len(weighted)):
            forward(groups[0]["sequences"][:1])

    todo = [("whole", chosen) for chosen in whole] + [("part", part) for part in weighted]
    todo += [("nothing", None)] * (passes - len(todo))
    delay = accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    for number, (kind, item) in enumerate(todo, 1):
        with accelerator.no_sync(model) if delay and number < passes else contextlib.nullcontext():
            if kind == "whole":
                loss = losses_of(
                    item, forward([sequence for group in item for sequence in group["sequences"]])
                )
            elif kind == "part":
                loss = (forward(item[0]) * item[1]).sum()
            else:
                loss = forward(groups[0]["sequences"][:1]).sum() * 0.0
            accelerator.backward(loss * world)  # the processes' gradients are averaged, ours are summed
    total = accelerator.reduce(torch.tensor([*sums.values()], device=accelerator.device), "sum")
    return dict(zip(sums, total.tolist(), strict=True))


def metric_names(args: Args) -> list[str]:
    """What group_losses reports, the loss first."""
    if args.loss == "sft":
        return ["loss", "logps/chosen"]
    rewards = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    return ["loss", *rewards, "logps/chosen", "logps/rejected"]


def total_metrics(groups: list[dict], logps: list[torch.Tensor], args: Args) -> dict[str, float]:
    """Loss and metrics over all pairs, from log-probabilities that were computed without gradient."""
    losses, metrics = group_losses(groups, torch.cat(logps), args)
    scale = denominator_of(groups, args)
    return {"loss": losses.sum().item() / scale} | {k: v.mean().item() for k, v in metrics.items()}


def denominator_of(groups: list[dict], args: Args) -> float:
    """What the summed losses are divided by: pairs, or for sft response tokens."""
    if args.loss == "sft":
        return sum(len(response) for group in groups for _, response in group["sequences"])
    return sum(len(group["pairs"]) for group in groups)


def set_weights(groups: list[dict], args: Args, mean_gap: float | None) -> None:
    """Puts w_i beside the pairs of every group; mean_gap None: the mean over these groups."""
    gaps = [gap for group in groups for *_, gap in group["pairs"]]
    weights = pair_weights(gaps, args.alpha, mean_gap) if args.loss == "spa" else torch.ones(len(gaps))
    stream = iter(weights.tolist())
    for group in groups:
        group["weights"] = [next(stream) for _ in group["pairs"]]


def plan_steps(count: int, args: Args) -> list[list[int]]:
    """The prompts of every optimizer step of every epoch; the order depends on seed and epoch alone."""
    steps = []
    for epoch in range(args.epochs):
        order = list(range(count))
        random.Random(common.derive_seed(args.seed, "epoch", epoch)).shuffle(order)
        steps += [order[i : i + args.batch_size] for i in range(0, count, args.batch_size)]
    return steps


def learning_rate_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Linear warm-up (the first step already moves), then a cosine to 0; step counts from 0."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---------------------------------------------------------------------------------------------------
# Saving.

MODEL_CARD = """\
---
base_model: {base}
library_name: transformers
tags: [alignment, preference-optimization, spa]
---
# {name}

{base}, trained with Self-Priority Alignment (SPA, arXiv 2511.06222), loss `{loss}`, on {pairs} preference
pairs of {prompts} prompts that the model sampled, scored and refined itself. No human labels.
It has not been evaluated for any use; what it was trained on decides what it does.

Arguments: `{arguments}`

Versions: {versions}

```bibtex
@article{{spa2025,
  title = {{SPA: Achieving Consensus in LLM Alignment via Self-Priority Optimization}},
  journal = {{arXiv:2511.06222}},
  year = {{2025}}
}}
```
"""


def save_model(accelerator, model, tokenizer, folder: Path, card: str) -> None:
    """Writes the checkpoint beside `folder` and puts it in its place when it is whole.

    All processes take part: sharded weights are gathered, and the first process writes them.
    """
    model, state = accelerator.unwrap_model(model), {}
    for name, value in model.state_dict().items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value  # gathered by all together
        if accelerator.is_main_process:
            state[name] = value.detach().to("cpu", copy=True)
    if not accelerator.is_main_process:
        return
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial, state_dict=state)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def check_args(args: Args) -> None:
    positive = ("alpha", "beta", "learning_rate", "epochs", "batch_size", "max_length", "tokens_per_batch")
    for name in (*positive, "max_grad_norm"):  # a norm clipped to 0 would train nothing, silently
        check(getattr(args, name) > 0, f"--{name} {getattr(args, name)}: more than 0 is wanted")
    common.check_at_least(args, 0, "gamma_beta_ratio", "weight_decay")
    check(0 <= args.warmup_ratio < 1, f"--warmup_ratio {args.warmup_ratio}: from 0 to below 1 is wanted")


def main(args: Args) -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    kinds = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP)
    kind = accelerator.distributed_type
    check(kind in kinds, f"accelerate's {kind} is not supported; see configs/")
    sharded, first_process = kind == DistributedType.FSDP, accelerator.is_main_process
    args.beta = args.beta if args.beta is not None else 0.01 if args.loss == "dpo" else 2.0
    check_args(args)
    run_dir = Path(args.run_dir)
    source, folder = run_dir / "05_pairs.jsonl", Path(args.output_dir or run_dir / "06_model")
    args.output_dir = str(folder)
    stem = folder.name.removesuffix("_model")
    metrics_file, record_file = (
        folder.with_name(f"{stem}_metrics.jsonl"),
        folder.with_name(f"{stem}_args.json"),
    )
    pairs = read_pairs(source, needs_gap=args.loss == "spa")
    facts = common.read_facts(args.run_dir, "05_pairs")
    args.model = args.model or facts.get("model", common.DEFAULT_MODEL)
    args.chat_template = args.chat_template or facts.get("chat_template")
    record = common.check_run(args, "06_train", [folder, metrics_file], {source.name: source}, record_file)
    if record["complete"]:
        accelerator.print(f"{folder} is complete already; --overwrite trains again")
        return

    # The pairs, the weights and the order of the steps: the same on every process.
    tokenizer = common.load_tokenizer(args.model, args.chat_template)
    model = common.load_model(args.model, "float32", device=accelerator.device)
    common.check_vocabulary(tokenizer, model, args.model)
    args.max_length = min(args.max_length, common.context_length(model.config))
    groups, dropped = group_pairs(tokenizer, pairs, common.end_token_ids(tokenizer, model), args)
    check(bool(groups), f"no response fits into --max_length {args.max_length} with its prompt")
    steps = plan_steps(len(groups), args)
    set_weights(groups, args, None)
    for step in steps if args.loss == "spa" and args.gap_mean == "batch" else []:
        gaps = [gap for g in step for *_, gap in groups[g]["pairs"]]
        check(sum(gaps) > 0, "a batch has only gaps of 0: use a larger --batch_size or --gap_mean dataset")
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # such a config loads, but refuses to be saved after hours of training
        model.generation_config.do_sample = True

    gamma = args.beta * args.gamma_beta_ratio
    accelerator.print(f"loss {args.loss}: β {args.beta:g}, γ {gamma:g}, γ/β {args.gamma_beta_ratio:g}")
    accelerator.print(
        f"processes: {accelerator.num_processes}, mixed precision: {accelerator.mixed_precision}"
    )
    if args.gamma_beta_ratio > 1.6:
        common.warn(f"--gamma_beta_ratio {args.gamma_beta_ratio:g} is above 1.6; it is γ/β, not γ")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # without it the model stays in evaluation mode: no dropout, for the loss is exact
    model.forward = functools.partial(response_logps, model)  # so that wrappers around the model see one call
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    if sharded and accelerator.mixed_precision == "bf16":  # accelerate's policy would round our sums to bf16
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    model, optimizer = accelerator.prepare(model, optimizer)
    check(all(p.dtype == torch.float32 for p in model.parameters()), "the weights are not in float32")
    factor = functools.partial(learning_rate_factor, steps=len(steps), warmup_ratio=args.warmup_ratio)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, factor)
    if first_process:
        record["facts"] = facts | {"base_model": args.model, "model": str(folder), "loss": args.loss}
        common.write_record(record)

    before = all_logps(accelerator, model, groups, args.tokens_per_batch)
    for group, values in zip(groups, before, strict=True):
        group["reference"] = values.tolist()  # dpo's frozen reference, computed once
    first = {"step": 0, **{f"all/{k}": v for k, v in total_metrics(groups, before, args).items()}}

    started, tokens = time.time(), 0
    with (
        open(metrics_file if first_process else os.devnull, "w", encoding="utf-8") as log,
        tqdm(steps, desc="06 train", unit="step", disable=not first_process) as bar,
    ):
        log.write(common.dump_row(first))
        for number, step in enumerate(bar, 1):
            batch = [groups[g] for g in step]
            if args.gap_mean == "batch":
                set_weights(batch, args, None)
            denominator = denominator_of(batch, args)
            sums = backward_step(accelerator, model, batch, args, denominator)
            norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            ids = ", ".join(str(group["id"]) for group in batch)
            finite = math.isfinite(sums["loss"]) and math.isfinite(norm)
            check(
                finite, f"step {number}: the loss is not finite; its prompts: {ids}; lower --learning_rate?"
            )
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            tokens += sum(length for group in batch for length in sequence_lengths(group))
            count = sum(len(group["sequences"]) for group in batch) if args.loss == "sft" else denominator
            values = {name: value / count for name, value in sums.items()} | {
                "loss": sums["loss"] / denominator
            }
            row = {"step": number, "epoch": number * args.epochs / len(steps), **values}
            log.write(common.dump_row(row | {"grad_norm": norm, "learning_rate": rate}))
            log.flush()
            shown = {"loss": f"{values['loss']:.4f}", "tokens/s": f"{tokens / (time.time() - started):.0f}"}
            if args.loss != "sft":
                margin, accuracy = values["rewards/margins"], values["rewards/accuracies"]
                shown |= {"margin": f"{margin:.3f}", "acc": f"{accuracy:.2f}"}
            bar.set_postfix(shown)
        set_weights(groups, args, None)
        after = all_logps(accelerator, model, groups, args.tokens_per_batch)
        last = {f"all/{k}": v for k, v in total_metrics(groups, after, args).items()}
        log.write(common.dump_row({"step": len(steps), **last}))

    card = MODEL_CARD.format(
        base=args.model,
        name=folder.name,
        loss=args.loss,
        pairs=len(pairs) - dropped,
        prompts=len(groups),
        arguments=json.dumps(asdict(args)),
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    )
    save_model(accelerator, model, tokenizer, folder, card)
    if first_process:
        common.write_record(record | {"complete": True})
        report(args, groups, first, last, len(pairs), dropped, len(steps))
        if not sharded:
            show_sample(accelerator.unwrap_model(model), tokenizer, pairs[0]["prompt"])
        print(f"wrote {folder} and {metrics_file.name}")
        print(f"next: python 01_sample.py --model {folder} --split test --run_dir {run_dir}/test")
    accelerator.end_training()


def report(args, groups: list[dict], first: dict, last: dict, pairs: int, dropped: int, steps: int) -> None:
    """Prints what was used and the metrics over all pairs before and after training."""
    common.show_funnel("06 train", ("pairs in", pairs), {"longer than --max_length": dropped}, "pairs used")
    responses = sum(len(group["sequences"]) for group in groups)
    print(f"  prompts: {len(groups)}, distinct responses: {responses}, optimizer steps: {steps}")
    if args.loss == "spa":
        weights = torch.tensor([w for group in groups for w in group["weights"]])
        effective = (weights.sum() ** 2 / (weights**2).sum()).item()
        zero = (weights == 0).float().mean().item()
        print(f"  weights: effective sample size {effective:.1f} of {len(weights)}, zero {zero:.0%}")
    print(f"  {'over all pairs':<22}{'before':>10}{'after':>10}")
    for name, value in last.items():
        print(f"  {name.removeprefix('all/'):<22}{first[name]:>10.4f}{value:>10.4f}")
    print("  (a falling rewards/chosen is usual: only its difference to rewards/rejected is trained)")


def show_sample(model, tokenizer, prompt: list[dict]) -> None:
    """Prints the trained model's greedy answer to one prompt: gibberish would be seen at once."""
    vars(model).pop("forward", None)  # the class's own forward again
    ids = common.encode_pieces(tokenizer, common.render_chat(tokenizer, prompt, True))
    options = {"temperature": 0.0, "max_new_tokens": 64, "seed": 0}
    ((sample,),) = common.generate(model.eval(), tokenizer, [ids], [1], **options)
    print(f"  asked: {prompt[-1]['content'][:100]!r}\n  the trained model: {sample.text[:200]!r}")


if __name__ == "__main__":
    common.run_stage(main, Args)
