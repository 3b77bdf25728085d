"""Stage 6, priority alignment (SPA section 3.4, equation 3; Algorithm 1, lines 25-30).

Fine-tunes all weights on the pairs with the uncertainty-weighted SimPO loss

    w_i = (gap_i / mean gap)^α
    loss_i = −w_i · log σ(β/|y| · log π(y|x) − β/|y⁻| · log π(y⁻|x) − γ)

or with one of the paper's comparisons: simpo (w = 1), dpo (a frozen reference), sft (the preferred
responses alone). Each distinct response goes through the model once, however many pairs it is in.

    reads   RUN_DIR/05_pairs.jsonl
    writes  RUN_DIR/06_model/ (--output_dir), a Hugging Face checkpoint, and beside it
            06_metrics.jsonl, one row per step: {"step": 1, "loss": …, "rewards/margins": …, …}
            06_checkpoints/ while it runs: the same command goes on from the last one
    run     accelerate launch --config_file configs/ddp.yaml 06_train.py --run_dir runs/default
            also configs/fsdp.yaml, zero3.yaml; python 06_train.py …  is the same on one device

Hardware: float32 weights, gradients and AdamW take 16 bytes a parameter: 2 GB for 135M, 8 × 80 GB for 8B.

The metrics, means over the pairs of a step (over a set of prompts before and after training: eval/…, held
out by --eval_fraction, or else train/…, over up to 64 prompts of the pairs themselves):

    loss                  what is minimised; for sft, per response token
    rewards/chosen        β/|y| · log π(y|x) of the preferred response; dpo: β · log (π/π_ref).
                          It usually falls: only its difference to rewards/rejected is trained
    rewards/rejected      the same of the other response
    rewards/margins       rewards/chosen − rewards/rejected; the loss wants it above γ
    rewards/accuracies    share of the pairs with a margin above 0
    logps/chosen, logps/rejected      log-probability per token; near 0 means learnt by heart
    weights/effective_sample_size     (Σ w)² / Σ w² as a share of the pairs: 1 if all weights are equal
    weights/zero_fraction             share of the pairs with weight 0 (equal totals), which teach nothing
    grad_norm             of the whole gradient, before clipping
    learning_rate, epoch, num_tokens  the step's rate; passes over the pairs; distinct tokens so far
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
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
from safetensors import SafetensorError
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common
from common import UserError, arg, check

PROJECTION_CHUNK = 256  # response positions whose logits over the vocabulary are in memory at a time
MEASURED_PROMPTS = 64  # measured before and after training where none are held out
LAUNCHES = {DistributedType[name] for name in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED")}
# what may differ when an interrupted run goes on, for it doesn't change the result
MEMORY_OPTIONS = ("tokens_per_batch", "gradient_checkpointing", "attn_implementation", "share_prompts")
MAY_CHANGE = (*MEMORY_OPTIONS, "save_steps", "tracker")


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
    label_smoothing: float = arg(
        0.0, "share of pairs taken to be the wrong way round (ours; not in the paper)"
    )
    sft_weight: float = arg(
        0.0, "adds this × −log π(y|x)/|y| of the preferred response (ours; not in the paper)"
    )
    max_grad_norm: float = arg(1.0, "gradient clipping (SimPO's)")
    weight_decay: float = arg(0.0, "of AdamW (SimPO's)")
    max_length: int = arg(4096, "prompt and response in tokens; longer prompts lose their left (ours)")
    tokens_per_batch: int = arg(
        8192, "padded tokens in one forward pass; changes memory, never the gradient (ours)"
    )
    share_prompts: bool = arg(
        True, "read a prompt once for several responses where that is cheaper (sdpa only)"
    )
    gradient_checkpointing: bool = arg(False, "recompute activations: less memory, a third more time")
    attn_implementation: str | None = arg(
        None, "attention function of transformers: sdpa, flash_attention_2, eager, …; default: its own choice"
    )
    eval_fraction: float = arg(0.0, "share of the prompts held out of training, for eval/… metrics (ours)")
    eval_steps: int = arg(0, "steps between two evaluations; 0: at the end of every epoch")
    save_steps: int = arg(25, "steps between two checkpoints to resume from, 12 bytes a parameter; 0: none")
    tracker: str | None = arg(
        None, "also log to this one; it must be installed", ("tensorboard", "wandb", "trackio")
    )
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


def preference_nll(logits: torch.Tensor, smoothing: float) -> torch.Tensor:
    """−log σ(logits), (P,); smoothed as in cDPO, a share of it is the opposite preference's."""
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def spa_loss(chosen_logps, rejected_logps, weights, beta, gamma, label_smoothing=0.0) -> torch.Tensor:
    """Equation 3, before the mean over pairs; all tensors have shape (P,), so has the result.

    chosen_logps, rejected_logps: log π(y|x) / |y|, the average log-probability per response token, end
    token included. weights: w_i; all 1 gives SimPO. γ is absolute: gamma_beta_ratio · β.
    """
    logits = beta * (chosen_logps - rejected_logps) - gamma
    return weights * preference_nll(logits, label_smoothing)  # equation 3


def dpo_loss(
    chosen_logps, rejected_logps, chosen_reference, rejected_reference, beta, label_smoothing=0.0
) -> torch.Tensor:
    """DPO (arXiv 2305.18290, equation 7), before the mean; sums of log-probabilities, each of shape (P,)."""
    logits = beta * ((chosen_logps - chosen_reference) - (rejected_logps - rejected_reference))
    return preference_nll(logits, label_smoothing)


def logits_of(model, states: torch.Tensor) -> torch.Tensor:
    """The logits (N, V) of hidden states (N, H), in float32: the head, and what some models do after it."""
    config, logits = model.config.get_text_config(), model.get_output_embeddings()(states).float()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return cap * torch.tanh(scale * logits / cap) if cap else scale * logits


def check_logits(model, ids: list[int]) -> None:
    """Raises UserError if `logits_of` does not give the logits of the model itself."""
    if any(hasattr(weight, "ds_numel") for weight in model.parameters()):
        return  # DeepSpeed has sharded the weights: nothing can be read before accelerator.prepare
    ids = torch.tensor([ids[:64]], device=model.device)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits[0].float()
        ours = logits_of(model, model.base_model(ids, use_cache=False).last_hidden_state[0])
    same = not (ours - plain).abs().max() > 1e-3 * plain.abs().max()  # NaN is found, and named, later
    kind = type(model).__name__
    check(
        same, f"{kind} changes the logits of its head in a way of its own: add it to logits_of in 06_train.py"
    )


def response_logps(
    model, input_ids, attention_mask, position_ids, parents, targets, owners, responses: int
) -> torch.Tensor:
    """Σ_t log π(y_t | x, y_<t) of every response in a batch of `to_batch`, float32 of shape (responses,).

    The vocabulary projection runs only where a response token is predicted, chunk by chunk, and its logits
    are computed again in the backward pass, so memory does not grow with tokens × vocabulary.
    """
    hidden = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state  # (B, T, H)
    states = hidden.flatten(0, 1)[parents]  # (N, H)

    def project(states, targets):
        logits = logits_of(model, states)  # (chunk, V); the softmax is always in float32
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    chunks = zip(states.split(PROJECTION_CHUNK), targets.split(PROJECTION_CHUNK), strict=True)
    logps = torch.cat([checkpoint(project, s, t, use_reentrant=False) for s, t in chunks])
    return torch.zeros(responses, device=logps.device).index_add(0, owners, logps)


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


def share_prompts(group: dict, hidden_size: int, budget: int) -> list[list[int]]:
    """Which responses of a prompt (indices of its sequences) share a row behind it, so that it is read once.

    The cheapest rows of 1, 2, … responses, none wider than `budget`: a token of a row of width w costs
    24 H² multiplications and additions a layer in the weights and 4 H w in the attention, so 6 H + w.
    """
    prompts, responses = zip(*group["sequences"], strict=True)
    count, best = len(responses), None
    for size in range(1, count + 1 if all(prompt == prompts[0] for prompt in prompts) else 2):
        rows = [list(range(i, min(i + size, count))) for i in range(0, count, size)]
        widths = [len(prompts[row[0]]) + sum(len(responses[i]) for i in row) for row in rows]
        cost = sum(width * (6 * hidden_size + width) for width in widths)
        if size == 1 or (cost < best[0] and max(widths) <= budget):
            best = cost, rows
    return best[1]


def rows_of(group: dict) -> list[tuple]:
    """The rows of a prompt: (prompt ids, [response ids, …]), its responses in order."""
    sequences = group["sequences"]
    return [(sequences[row[0]][0], [sequences[i][1] for i in row]) for row in group["rows"]]


def width_of(row: tuple) -> int:
    prompt, responses = row
    return len(prompt) + sum(map(len, responses))


def to_batch(rows: list[tuple], device) -> dict[str, torch.Tensor]:
    """The arguments of `response_logps` for rows of (prompt ids, [response ids, …]), right-padded.

    input_ids, position_ids: (B, T) int64; attention_mask: (B, T), or where a row has several responses
    (B, 1, T, T) bool, each response seeing the prompt and itself; parents (N,): the places in (B·T) that
    predict the N response tokens `targets`; owners (N,): whose they are. All go by position, not by id.
    """
    size = len(rows), max(map(width_of, rows))
    ids, positions = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    seen = torch.zeros(size, dtype=torch.long)
    parents, targets, owners, trees, count = [], [], [], [], 0
    for i, (prompt, responses) in enumerate(rows):
        start, spans = len(prompt), [(0, len(prompt))]
        for response in responses:
            end = start + len(response)
            places = [len(prompt) - 1, *range(start, end - 1)]
            parents += [i * size[1] + place for place in places]
            targets += response
            owners += [count] * len(response)
            positions[i, start:end] = torch.arange(len(prompt), len(prompt) + len(response))
            spans.append((start, end))
            start, count = end, count + 1
        ids[i, :start] = torch.tensor(prompt + [token for response in responses for token in response])
        positions[i, : len(prompt)] = torch.arange(len(prompt))
        seen[i, :start] = 1
        trees.append(spans)
    mask = seen
    if count > len(rows):
        mask = torch.eye(size[1], dtype=torch.bool).repeat(len(rows), 1, 1)[:, None]  # padding sees itself
        for i, spans in enumerate(trees):
            mask[i, 0, : spans[-1][1], : spans[0][1]] = True
            for start, end in spans:
                mask[i, 0, start:end, start:end] = torch.ones(
                    end - start, end - start, dtype=torch.bool
                ).tril()
    tensors = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    tensors |= {
        "parents": torch.tensor(parents),
        "targets": torch.tensor(targets),
        "owners": torch.tensor(owners),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()} | {"responses": count}


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


def group_losses(groups: list[dict], logps: torch.Tensor, args: Args) -> tuple[torch.Tensor, dict]:
    """(the losses of these prompts: per pair (P,), or per response token-sum for sft, metrics per pair).

    logps: (S,) summed log-probabilities of all sequences of `groups`, in order. A group's pairs carry
    their weight in "weights", and its sequences their reference log-probabilities in "reference".
    """
    device = logps.device
    counts = [len(response) for group in groups for _, response in group["sequences"]]
    average = logps / torch.tensor(counts, device=device, dtype=logps.dtype)  # log π(y|x) / |y|
    if args.loss == "sft":
        return -logps, {"logps/chosen": average.detach()}
    offsets = itertools.accumulate((len(group["sequences"]) for group in groups), initial=0)
    index = [
        (offset + c, offset + r)
        for offset, group in zip(offsets, groups, strict=False)
        for c, r, _ in group["pairs"]
    ]
    chosen, rejected = torch.tensor(index, device=device).T  # each (P,)
    if args.loss == "dpo":
        reference = torch.tensor([value for group in groups for value in group["reference"]], device=device)
        references = reference[chosen], reference[rejected]
        losses = dpo_loss(logps[chosen], logps[rejected], *references, args.beta, args.label_smoothing)
        rewards = args.beta * (logps - reference)
    else:
        weights = torch.tensor([w for group in groups for w in group["weights"]], device=device)
        gamma = args.beta * args.gamma_beta_ratio
        losses = spa_loss(average[chosen], average[rejected], weights, args.beta, gamma, args.label_smoothing)
        rewards = args.beta * average
    if args.sft_weight:
        losses = losses - args.sft_weight * average[chosen]
    rewards, average = rewards.detach(), average.detach()
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
    rows = [row for group in groups for row in rows_of(group)]
    ends = list(itertools.accumulate(len(responses) for _, responses in rows))
    bins = pack([[width_of(row)] for row in rows], budget)
    rank, world = accelerator.process_index, accelerator.num_processes
    result = torch.zeros(ends[-1], device=accelerator.device)
    with torch.no_grad():
        rounds = range(0, len(bins), world)
        for start in tqdm(rounds, desc="06 log-probabilities", unit="batch", leave=False, disable=rank > 0):
            members = bins[min(start + rank, len(bins) - 1)]
            values = model(**to_batch([rows[i] for i in members], accelerator.device))
            if start + rank < len(bins):
                result[[j for i in members for j in range(ends[i] - len(rows[i][1]), ends[i])]] = (
                    values.float()
                )
    reshard(model)
    result = accelerator.reduce(result, "sum").cpu()
    return list(result.split([len(group["sequences"]) for group in groups]))


def reshard(model) -> None:
    """After a forward pass alone FSDP2 keeps the last weights gathered; a checkpoint wants all in shards."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def plan_passes(
    groups: list[dict], budget: int
) -> tuple[list[list[dict]], list[tuple[dict, list[list[int]]]]]:
    """(forward passes that hold whole prompts, [(a prompt too large for one pass, its rows in parts), …])."""
    whole, split = [], []
    widths = [list(map(width_of, rows_of(group))) for group in groups]
    for members in pack(widths, budget):
        parts = pack([[width] for width in widths[members[0]]], budget)
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
    sums = torch.zeros(len(metric_names(args)), device=accelerator.device)

    def forward(rows):
        return model(**to_batch(rows, accelerator.device))

    def losses_of(chosen, logps):
        losses, metrics = group_losses(chosen, logps, args)
        sums.add_(torch.stack([losses.detach().sum(), *(values.sum() for values in metrics.values())]))
        return losses.sum() / denominator

    weighted = []  # (rows, dloss/dlogp): the parts of split prompts
    with torch.no_grad():
        for group, parts in split:
            rows, logps = rows_of(group), torch.zeros(len(group["sequences"]), device=accelerator.device)
            members = [[i for row in part for i in group["rows"][row]] for part in parts]
            for part, chosen in zip(parts, members, strict=True):
                logps[chosen] = forward([rows[row] for row in part]).float()
            with torch.enable_grad():
                logps.requires_grad_()
                (slope,) = torch.autograd.grad(losses_of([group], logps), logps)
            for part, chosen in zip(parts, members, strict=True):
                weighted.append(([rows[row] for row in part], slope[chosen]))
        for _ in range(looks - len(weighted)):
            forward(rows_of(groups[0])[:1])

    todo = [("whole", chosen) for chosen in whole] + [("part", part) for part in weighted]
    todo += [("nothing", None)] * (passes - len(todo))
    # FSDP reduces in every pass, for whole gradients would not fit; DeepSpeed steps in the last backward.
    delay = accelerator.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    for number, (kind, item) in enumerate(todo, 1):
        accelerator.sync_gradients = number == passes
        with accelerator.no_sync(model) if delay and number < passes else contextlib.nullcontext():
            if kind == "whole":
                loss = losses_of(item, forward([row for group in item for row in rows_of(group)]))
            elif kind == "part":
                loss = (forward(item[0]) * item[1]).sum()
            else:
                loss = forward(rows_of(groups[0])[:1]).sum() * 0.0
            accelerator.backward(loss * world)  # the processes' gradients are averaged, ours are summed
    return dict(zip(metric_names(args), accelerator.reduce(sums, "sum").tolist(), strict=True))


def metric_names(args: Args) -> list[str]:
    """What group_losses reports, the loss first."""
    if args.loss == "sft":
        return ["loss", "logps/chosen"]
    rewards = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
    return ["loss", *rewards, "logps/chosen", "logps/rejected"]


def total_metrics(groups: list[dict], logps: list[torch.Tensor], args: Args, prefix: str) -> dict[str, float]:
    """Loss and metrics over whole prompts, from log-probabilities that were computed without gradient."""
    losses, metrics = group_losses(groups, torch.cat(logps), args)
    means = {"loss": losses.sum() / denominator_of(groups, args)} | {k: v.mean() for k, v in metrics.items()}
    return {f"{prefix}/{name}": value.item() for name, value in means.items()}


def denominator_of(groups: list[dict], args: Args) -> float:
    """What the summed losses are divided by: pairs, or for sft response tokens."""
    if args.loss == "sft":
        return sum(len(response) for group in groups for _, response in group["sequences"])
    return sum(len(group["pairs"]) for group in groups)


def set_weights(groups: list[dict], args: Args, mean_gap: float | None) -> float:
    """Puts w_i beside the pairs of every group; returns the mean gap: that given, or that of `groups`."""
    gaps = [gap for group in groups for *_, gap in group["pairs"]]
    mean_gap = sum(gaps) / max(1, len(gaps)) if mean_gap is None else mean_gap
    weights = pair_weights(gaps, args.alpha, mean_gap) if args.loss == "spa" else torch.ones(len(gaps))
    stream = iter(weights.tolist())
    for group in groups:
        group["weights"] = [next(stream) for _ in group["pairs"]]
    return mean_gap


def weight_statistics(groups: list[dict]) -> dict[str, float]:
    """How unequal the pairs' weights are: (Σ w)² / Σ w² as a share of the pairs, and the share of zeros."""
    weights = torch.tensor([w for group in groups for w in group["weights"]])
    effective = weights.sum() ** 2 / (weights**2).sum().clamp(min=1e-30) / len(weights)
    return {
        "weights/effective_sample_size": effective.item(),
        "weights/zero_fraction": (weights == 0).float().mean().item(),
    }


def split_prompts(groups: list[dict], args: Args) -> tuple[list[dict], list[dict]]:
    """(prompts to train on, prompts held out by --eval_fraction); which ones depends on the seed alone."""
    count = math.ceil(args.eval_fraction * len(groups))
    check(count < len(groups), f"--eval_fraction leaves none of {len(groups)} prompts to train on; lower it")
    order = list(range(len(groups)))
    random.Random(common.derive_seed(args.seed, "eval")).shuffle(order)
    held_out = set(order[:count])
    return [g for i, g in enumerate(groups) if i not in held_out], [groups[i] for i in sorted(held_out)]


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
# Saving: the model, and the checkpoints to resume from.

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

Data: `{data}`

Versions: {versions}

```bibtex
@article{{spa2025,
  title = {{SPA: Achieving Consensus in LLM Alignment via Self-Priority Optimization}},
  journal = {{arXiv:2511.06222}},
  year = {{2025}}
}}
```
"""


@contextlib.contextmanager
def replace_folder(accelerator, folder: Path):
    """Yields a folder beside `folder` for all processes to write in; whole and on disk, it takes its place.

    UserError if it can't be written; what was there before is kept.
    """
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        yield partial
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has a face for every writer
        shutil.rmtree(partial, ignore_errors=True)
        after = "the last one is kept; make room and run the same command again"
        failure = UserError(f"{folder} can't be written: {common.first_line(error)}; {after}")
        failure.of_all_processes = False
        raise failure from None
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in partial.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def save_model(accelerator, model, tokenizer, folder: Path, card: str) -> None:
    """Writes the checkpoint that others load. All processes take part: sharded weights are gathered."""
    state = {}
    for name, value in (accelerator.get_state_dict(model) or {}).items():  # None on some processes of ZeRO-3
        value = value.full_tensor() if hasattr(value, "full_tensor") else value  # gathered by all together
        if accelerator.is_main_process:
            state[name] = value.detach().to("cpu", copy=True)
    with replace_folder(accelerator, folder) as partial:
        if accelerator.is_main_process:
            accelerator.unwrap_model(model).save_pretrained(partial, state_dict=state)
            tokenizer.save_pretrained(partial)
            (partial / "README.md").write_text(card, encoding="utf-8")


def save_checkpoint(accelerator, folder: Path, progress: dict) -> None:
    """Writes weights, optimizer and `progress` into folder/STEP; the one before goes after it is whole."""
    target = folder / f"{progress['step']:06d}"
    with replace_folder(accelerator, target) as partial:
        accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            (partial / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
    if accelerator.is_main_process:
        for other in folder.iterdir():
            if other != target:
                shutil.rmtree(other)


def find_checkpoint(accelerator, folder: Path) -> tuple[Path | None, dict]:
    """(the newest whole checkpoint, its progress), or (None, {}). UserError if it can't be resumed here."""
    path = max(folder.glob("[0-9]*"), default=None)
    if path is None:
        return None, {}
    progress = common.parse_json((path / "progress.json").read_text(encoding="utf-8"), str(path))
    was, now = progress["launch"], launch_of(accelerator)
    check(was == now, f"{path} was written by {was}, this is {now}: launch as before, or remove {folder}")
    return path, progress


def launch_of(accelerator) -> str:
    """What must not change between a checkpoint and its resumption."""
    return f"{accelerator.num_processes} processes ({accelerator.distributed_type.value})"


def check_room(folder: Path, parameters: int, checkpoints: int) -> None:
    """UserError unless the disk has room for the model and for so many checkpoints."""
    size = parameters * (4 + 12 * checkpoints)
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    why = f"{folder} and {checkpoints} checkpoints to resume from" if checkpoints else str(folder)
    check(
        free > size,
        f"{why} take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: make room"
        + (", or --save_steps 0" if checkpoints else ""),
    )


def check_args(args: Args) -> None:
    positive = ("alpha", "beta", "learning_rate", "epochs", "batch_size", "max_length", "tokens_per_batch")
    for name in (*positive, "max_grad_norm"):  # a norm clipped to 0 would train nothing, silently
        check(getattr(args, name) > 0, f"--{name} {getattr(args, name)}: more than 0 is wanted")
    common.check_at_least(
        args, 0, "gamma_beta_ratio", "weight_decay", "sft_weight", "save_steps", "eval_steps"
    )
    for name, end in (("warmup_ratio", 1), ("eval_fraction", 1), ("label_smoothing", 0.5)):
        value = getattr(args, name)
        check(0 <= value < end, f"--{name} {value}: from 0 to below {end} is wanted")
    extra = args.label_smoothing or args.sft_weight
    check(args.loss != "sft" or not extra, "--label_smoothing and --sft_weight are not for --loss sft")
    missing = args.tracker and importlib.util.find_spec(args.tracker) is None
    check(not missing, f"--tracker {args.tracker}: it is not installed; python -m pip install {args.tracker}")
    if args.gamma_beta_ratio > 1.6:
        common.warn(f"--gamma_beta_ratio {args.gamma_beta_ratio:g} is above 1.6; it is γ/β, not γ")


def configure_deepspeed(accelerator, args: Args) -> None:
    """Before the model is loaded, for that already shards it: float32 weights, and our clipping."""
    plugin = accelerator.state.deepspeed_plugin
    plugin.deepspeed_config |= {
        "bf16": {"enabled": False},  # would keep the weights in bfloat16; `prepare` autocasts instead
        "gradient_clipping": args.max_grad_norm,
        "train_micro_batch_size_per_gpu": 1,  # asked for, unused
    }
    plugin.set_deepspeed_weakref()


def prepare(accelerator, model, args: Args, precision: str):
    """(model, optimizer) under accelerate: float32 weights, whatever precision computes; no dropout."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # such a config loads, but refuses to be saved after hours of training
        model.generation_config.do_sample = True
    if args.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # the newer name in transformers
        enable() if enable else model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():  # what is recomputed must be in training mode; dropout stays off
            module.training = getattr(module, "gradient_checkpointing", False)
    model.forward = functools.partial(response_logps, model)  # so that wrappers around the model see one call
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED and precision == "bf16":
        model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)
    if kind == DistributedType.FSDP and precision == "bf16":
        # accelerate's own policy would round our sums and the reduced gradients to bfloat16
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    options = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "fused": True,
    }  # one pass over memory
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    model, optimizer = accelerator.prepare(model, optimizer)
    check(
        all(p.dtype == torch.float32 for p in model.parameters()),
        "the weights are not in float32 after accelerator.prepare; launch with a file of configs/",
    )
    return model, optimizer


def sharing_works(accelerator, model, groups: list[dict]) -> bool:
    """If a shared prompt gives the log-probabilities of separate rows: not every model takes such masks."""
    shared = [group for group in groups if len(group["rows"]) < len(group["sequences"])]
    if not shared:
        return True
    group = min(shared, key=lambda group: max(map(width_of, rows_of(group))))
    separate = [(prompt, [response]) for prompt, response in group["sequences"]]
    with torch.no_grad():
        try:
            ours = model(**to_batch(rows_of(group), accelerator.device))
        except (ValueError, TypeError, RuntimeError, NotImplementedError):
            return False
        plain = model(**to_batch(separate, accelerator.device))
    reshard(model)
    lengths = torch.tensor([len(response) for _, response in group["sequences"]], device=plain.device)
    return bool(((ours - plain).abs() / lengths).max() < 0.05)  # bfloat16 rounds; a wrong mask is far off


def train_step(accelerator, model, optimizer, batch: list[dict], args: Args, rate: float) -> dict[str, float]:
    """One optimizer step on the prompts of `batch`; returns its metrics. UserError if it is not finite."""
    if args.gap_mean == "batch":
        set_weights(batch, args, None)
    for group in optimizer.param_groups:
        group["lr"] = rate
    denominator = denominator_of(batch, args)
    sums = backward_step(accelerator, model, batch, args, denominator)
    norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    ids = ", ".join(str(group["id"]) for group in batch)
    finite = math.isfinite(sums["loss"]) and math.isfinite(norm)
    check(finite, f"the loss is not finite; the prompts of this step: {ids}; lower --learning_rate?")
    optimizer.step()
    optimizer.zero_grad()
    count = sum(len(group["sequences"]) for group in batch) if args.loss == "sft" else denominator
    metrics = {name: value / count for name, value in sums.items()} | {"loss": sums["loss"] / denominator}
    statistics = weight_statistics(batch) if args.loss == "spa" else {}
    return metrics | statistics | {"grad_norm": norm, "learning_rate": rate}


def main(args: Args) -> None:
    run_dir = Path(args.run_dir)
    source, folder = run_dir / "05_pairs.jsonl", Path(args.output_dir or run_dir / "06_model")
    stem = folder.name.removesuffix("_model")
    metrics_file, record_file, checkpoints = (
        folder.with_name(f"{stem}_{name}") for name in ("metrics.jsonl", "args.json", "checkpoints")
    )
    args.output_dir = str(folder)
    args.beta = args.beta if args.beta is not None else 0.01 if args.loss == "dpo" else 2.0
    check_args(args)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), log_with=args.tracker, project_dir=str(folder.parent)
    )
    kind, first_process = accelerator.distributed_type, accelerator.is_main_process
    precision = accelerator.mixed_precision
    supported = kind in LAUNCHES and precision in ("no", "bf16")
    check(supported, f"{kind.value} with mixed precision {precision} is not supported; see configs/")
    if kind == DistributedType.DEEPSPEED:
        configure_deepspeed(accelerator, args)
    pairs = read_pairs(source, needs_gap=args.loss == "spa")
    facts = common.read_facts(args.run_dir, "05_pairs")
    args.model = args.model or facts.get("model", common.DEFAULT_MODEL)
    args.chat_template = args.chat_template or facts.get("chat_template")
    record = common.check_run(
        args, "06_train", [folder, metrics_file], {source.name: source}, record_file, MAY_CHANGE
    )
    if record["complete"]:
        accelerator.print(f"{folder} is complete already; --overwrite trains again")
        return

    # The pairs, the weights and the order of the steps: the same on every process.
    tokenizer = common.load_tokenizer(args.model, args.chat_template)
    model = common.load_model(args.model, "float32", accelerator.device, args.attn_implementation)
    common.check_vocabulary(tokenizer, model, args.model)
    args.max_length = min(args.max_length, common.context_length(model.config))
    everything, dropped = group_pairs(tokenizer, pairs, common.end_token_ids(tokenizer, model), args)
    check(bool(everything), f"no response fits into --max_length {args.max_length} with its prompt")
    check_logits(model, [token for ids in everything[0]["sequences"][0] for token in ids])
    share = args.share_prompts and model.config._attn_implementation == "sdpa"
    config = model.config.get_text_config()
    widest = min(args.tokens_per_batch, common.branching_length(model.config))
    for group in everything:
        group["rows"] = share_prompts(group, config.hidden_size, widest if share else 0)
    groups, held_out = split_prompts(everything, args)
    steps = plan_steps(len(groups), args)
    mean_gap = set_weights(groups, args, None)
    for step in steps if args.loss == "spa" and args.gap_mean == "batch" else []:
        gaps = [gap for g in step for *_, gap in groups[g]["pairs"]]
        check(sum(gaps) > 0, "a batch has only gaps of 0: use a larger --batch_size or --gap_mean dataset")

    # The model, and where an interrupted run goes on.
    gamma = args.beta * args.gamma_beta_ratio
    accelerator.print(f"loss {args.loss}: β {args.beta:g}, γ {gamma:g}, γ/β {args.gamma_beta_ratio:g}")
    accelerator.print(f"processes: {accelerator.num_processes}, mixed precision: {precision}")
    threads, cores = torch.get_num_threads() * accelerator.num_processes, os.cpu_count()
    if accelerator.device.type == "cpu" and threads < cores:  # accelerate launch allows one unless asked
        hint = "accelerate launch --num_cpu_threads_per_process N, or OMP_NUM_THREADS"
        common.warn(f"{threads} threads on {cores} cores; for more: {hint}")
    if args.overwrite and first_process:
        shutil.rmtree(checkpoints, ignore_errors=True)
    accelerator.wait_for_everyone()
    checkpoint_path, progress = find_checkpoint(accelerator, checkpoints)
    done = progress.get("step", 0)
    wanted = 2 if args.save_steps and len(steps) > args.save_steps else 0
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())  # ds_numel: sharded
    check_room(folder, parameters, max(0, wanted - bool(progress)))
    if first_process:
        record["facts"] = facts | {"base_model": args.model, "model": str(folder), "loss": args.loss}
        common.write_record(record)
    model, optimizer = prepare(accelerator, model, args, precision)
    if args.tracker:
        config = {name: value if value is not None else "default" for name, value in asdict(args).items()}
        options = {"tensorboard": {"purge_step": done + 1}} if done else {}
        accelerator.init_trackers(stem, config, options)

    if share and not sharing_works(accelerator, model, everything):
        common.warn("this model can't read a prompt once for several responses; each gets its own row")
        for group in everything:
            group["rows"] = share_prompts(group, 0, 0)

    # Before training: dpo's frozen reference, and the metrics of the prompts that are measured.
    prefix, measured = (
        ("eval", held_out) if held_out else ("train", groups[:: math.ceil(len(groups) / MEASURED_PROMPTS)])
    )

    def measure() -> dict[str, float]:
        set_weights(measured, args, mean_gap)
        logps = all_logps(accelerator, model, measured, args.tokens_per_batch)
        return total_metrics(measured, logps, args, prefix)

    if checkpoint_path:
        accelerator.print(f"going on from step {done} of {len(steps)} ({checkpoint_path})")
        accelerator.load_state(str(checkpoint_path))
        for group, reference in zip(everything, progress["reference"], strict=True):
            group["reference"] = reference
    else:
        if args.loss == "dpo":
            logps = all_logps(accelerator, model, everything, args.tokens_per_batch)
            for group, values in zip(everything, logps, strict=True):
                group["reference"] = values.tolist()
        progress = {"step": 0, "launch": launch_of(accelerator), "num_tokens": 0, "log_bytes": 0}
        progress |= {"before": measure(), "reference": [group.get("reference") for group in everything]}

    started, tokens, trained = time.time(), 0, 0
    with (
        open(metrics_file if first_process else os.devnull, "a", encoding="utf-8") as log,
        tqdm(total=len(steps), initial=done, desc="06 train", unit="step", disable=not first_process) as bar,
    ):

        def write(row: dict) -> None:
            log.write(common.dump_row(row))
            log.flush()
            accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

        if first_process:
            log.truncate(min(progress["log_bytes"], metrics_file.stat().st_size))  # later rows come again
        if not done:
            write({"step": 0, **progress["before"]})
        for number, step in enumerate(steps[done:], done + 1):
            batch = [groups[g] for g in step]
            rate = args.learning_rate * learning_rate_factor(number - 1, len(steps), args.warmup_ratio)
            metrics = train_step(accelerator, model, optimizer, batch, args, rate)
            count = sum(width_of(row) for group in batch for row in rows_of(group))
            tokens, progress["num_tokens"] = tokens + count, progress["num_tokens"] + count
            trained += sum(len(group["pairs"]) or len(group["sequences"]) for group in batch)
            epoch = number * args.epochs / len(steps)
            write({"step": number, "epoch": epoch, **metrics, "num_tokens": progress["num_tokens"]})
            seconds = time.time() - started
            shown = {"loss": f"{metrics['loss']:.4f}", "tokens/s": f"{tokens / seconds:.0f}"}
            if args.loss != "sft":
                margin, accuracy = metrics["rewards/margins"], metrics["rewards/accuracies"]
                shown |= {"margin": f"{margin:.3f}", "acc": f"{accuracy:.2f}"}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if (
                held_out
                and number % (args.eval_steps or len(steps) // args.epochs) == 0
                and number < len(steps)
            ):
                write({"step": number, "epoch": epoch, **measure()})
            if args.save_steps and number % args.save_steps == 0 and number < len(steps):
                progress |= {"step": number, "log_bytes": log.tell()}
                save_checkpoint(accelerator, checkpoints, progress)
        speed = {"seconds": time.time() - started, "pairs": trained, "tokens": tokens}
        set_weights(groups, args, mean_gap)
        after = measure()
        write({"step": len(steps), "epoch": args.epochs, **after})

    card = MODEL_CARD.format(
        base=args.model,
        name=folder.name,
        loss=args.loss,
        pairs=len(pairs) - dropped,
        prompts=len(everything),
        arguments=json.dumps(asdict(args)),
        data=json.dumps(record["inputs"]),
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    )
    save_model(accelerator, model, tokenizer, folder, card)
    if first_process:
        record["facts"]["speed"] = speed
        common.write_record(record | {"complete": True})
        shutil.rmtree(checkpoints, ignore_errors=True)
        report(args, everything, groups, measured, progress["before"], after, len(pairs), dropped, speed)
    show_sample(accelerator, model, tokenizer, pairs[0]["prompt"])
    if first_process:
        print(f"wrote {folder} and {metrics_file.name}")
        print(f"next: python 01_sample.py --model {folder} --split test --run_dir {run_dir}/test")
    accelerator.end_training()


def report(
    args, everything, groups, measured, before: dict, after: dict, pairs: int, dropped: int, speed: dict
):
    """Prints what was used, how fast, and the metrics over the measured prompts before and after training."""
    common.show_funnel("06 train", ("pairs in", pairs), {"longer than --max_length": dropped}, "pairs used")
    responses = sum(len(group["sequences"]) for group in everything)
    held_out = len(everything) - len(groups)
    print(f"  prompts: {len(everything)} ({held_out} held out), distinct responses: {responses}")
    if args.loss == "spa":
        statistics = weight_statistics(groups)
        effective, zero = statistics.values()
        print(f"  weights: effective sample size {effective:.0%} of the pairs, zero {zero:.0%}")
    if speed["pairs"]:
        what, seconds = "responses" if args.loss == "sft" else "pairs", speed["seconds"]
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
        rates = f"{speed['pairs'] / seconds:.2f} {what}/s, {speed['tokens'] / seconds:.0f} tokens/s"
        print(f"  trained on {speed['pairs']} {what} in {seconds:.0f} s: {rates}{memory}")
    title = f"over {len(measured)} {'held-out' if held_out else 'training'} prompts"
    print(f"  {title:<26}{'before':>10}{'after':>10}")
    for name, value in after.items():
        print(f"  {name.partition('/')[2]:<26}{before[name]:>10.4f}{value:>10.4f}")
    print("  (a falling rewards/chosen is usual: only its difference to rewards/rejected is trained)")


def show_sample(accelerator, model, tokenizer, prompt: list[dict]) -> None:
    """Prints the trained model's greedy answer to one prompt: gibberish would be seen at once.

    All processes take part, for sharded weights are gathered by all of them together.
    """
    plain = accelerator.unwrap_model(model)
    vars(plain).pop("forward", None)  # the class's own forward again
    ids = common.encode_pieces(tokenizer, common.render_chat(tokenizer, prompt, True))
    options = {"temperature": 0.0, "max_new_tokens": 64}
    with accelerator.autocast():
        ((sample,),) = common.generate(plain.eval(), tokenizer, [ids], [1], [0], **options)
    accelerator.print(f"  asked: {prompt[-1]['content'][:100]!r}\n  the trained model: {sample.text[:200]!r}")


if __name__ == "__main__":
    common.run_stage(main, Args)
