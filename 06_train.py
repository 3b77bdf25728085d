"""Stage 6, priority alignment (SPA section 3.4, equation 3; Algorithm 1, lines 25-30).

Trains the model on the pairs with the uncertainty-weighted SimPO loss

    w_i = (gap_i / mean gap)^α
    loss_i = −w_i · log σ(β/|y| · log π(y|x) − β/|y⁻| · log π(y⁻|x) − γ)

or with one of the paper's comparisons: simpo (w = 1), dpo (a frozen reference), sft (the preferred responses alone).
Each distinct response goes through the model once, however many pairs it is in.

    reads   RUN_DIR/05_pairs.jsonl
    writes  RUN_DIR/06_model/ (--output_dir), a Hugging Face checkpoint, and beside it
            06_metrics.jsonl, one row per step: {"step": 1, "loss": …, "rewards/margins": …, …}
            06_checkpoints/ while it runs: the same command goes on from the last one
    run     python 06_train.py --run_dir runs/default
            accelerate launch --config_file configs/ddp.yaml 06_train.py …    8 GPUs (larger models: configs/fsdp.yaml)
    next    python 01_sample.py --model RUN_DIR/06_model --split test --n 1 --temperature 0 --run_dir RUN_DIR/test_model

Hardware (calculated, without activations): weights trained in float32 with gradient and AdamW take 16 bytes a
parameter: 2.2 GB for 135M, 16 GB for 1B, 128 GB for 8B (8 × 80 GB with FSDP). With --lora_rank 16 --base_dtype bfloat16
an 8B model takes 16.1 GB and its adapter 0.7 GB, and logits over 128k tokens 0.5 MB a response token: it fits one 80 GB
card, 1B one of 24 GB (--gradient_checkpointing if not). A CPU keeps fewer activations, at a few percent of the time.

The metrics, means over the pairs of a step (over a set of prompts before and after training: eval/…, held out by
--eval_fraction, or else train/…, over up to 64 prompts of the pairs themselves):

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

import signal

if __name__ == "__main__":  # Ctrl-C during the imports below leaves no traceback
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)

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
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from safetensors import SafetensorError
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from tqdm import tqdm

import common
from common import UserError, arg, check

# tokens of one call of the model: enough to keep the device busy, and few, so that rows in it are of like length
CALL_TOKENS = {"cpu": 512, "cuda": 2048}
MEASURED_PROMPTS = 64  # measured before and after training where none are held out
LORA_ALPHA = 2  # the adapter's product counts alpha / rank = 2 times (ours)
LORA_TARGETS = "all-linear"  # every linear layer but the output head (ours)
BLANK, LONG, SAME = "a blank response", "longer than --max_length", "chosen and rejected are the same tokens"
WEIGHTED = ("spa",)  # losses whose pairs are weighed by their gap; in all others each counts 1
TINY = 10_000_000  # parameters: a model below has no memory to save
OUT_OF_MEMORY = "out of memory: try --gradient_checkpointing, a smaller --max_length, or --lora_rank 16"
SFT_METRICS = ["logps/chosen"]
REWARDS = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
PAIR_METRICS = [*REWARDS, "logps/chosen", "logps/rejected"]


@dataclass
class Args(common.RunArgs):
    loss: str = arg("spa", "spa: equation 3; simpo: weights 1 (paper, Table 1)", ("spa", "simpo", "dpo", "sft"))
    alpha: float = arg(1.0, "exponent of the weights (paper, Table 5: 1, 2, 3 or 4; the choice is ours)")
    beta: float | None = arg(None, "reward scale; default: 2.0 (SimPO's), for dpo 0.01 (ours)")
    gamma_beta_ratio: float = arg(0.25, "γ/β, the target margin (SimPO's default; its recipes: 0.1 to 1.6)")
    gap_mean: str = arg("dataset", "over the data set (Algorithm 1) or the step (section 3.4)", ("dataset", "batch"))
    learning_rate: float = arg(1e-6, "peak (paper, Table 5: 5e-7 to 1e-5; the choice is ours; LoRA wants 1e-5 or more)")
    warmup_ratio: float = arg(0.1, "share of the steps with rising learning rate; then a cosine (SimPO's)")
    epochs: int = arg(1, "passes over the pairs (paper silent)")
    max_steps: int | None = arg(None, "optimizer steps in the place of --epochs: equal steps for unequal data (ours)")
    batch_size: int = arg(16, "prompts per optimizer step over all processes (paper silent)")
    max_grad_norm: float = arg(1.0, "gradient clipping (SimPO's)")
    weight_decay: float = arg(0.0, "of AdamW (SimPO's)")
    max_length: int = arg(4096, "prompt and response in tokens; longer prompts lose their left (ours)")
    lora_rank: int = arg(0, "train an adapter of this rank instead of all weights; merged at the end (ours); 0: none")
    base_dtype: str = arg("float32", "the frozen weights under an adapter", ("float32", "bfloat16"))
    tokens_per_batch: int | None = arg(None, "whose activations are kept; default: 8192, CPU 1536 (ours)", free=True)
    gradient_checkpointing: bool = arg(False, "recompute activations: less memory, a third more time", free=True)
    attn_implementation: str | None = arg(None, "sdpa, flash_attention_2, …; default: transformers' own", free=True)
    eval_fraction: float = arg(0.0, "share of the prompts held out of training, for eval/… metrics (ours)")
    eval_steps: int = arg(0, "steps between two evaluations; 0: at the end of every epoch")
    save_steps: int = arg(25, "steps between two checkpoints, 12 bytes a parameter; 0: none", free=True)
    save_dtype: str = arg("float32", "of the saved model; bfloat16 loses small updates", ("float32", "bfloat16"))
    accept_unfit_judge: bool = arg(False, "train although stage 2 found that its judge can't judge", free=True)
    tracker: str | None = arg(None, "also log to this one", ("tensorboard", "wandb", "trackio"), free=True)
    output_dir: str | None = arg(None, "folder of the trained model; default: 06_model in the run directory", free=True)
    model: str | None = arg(None, "model to train; default: the one that sampled the responses", free=True)
    chat_template: str | None = arg(None, "file with a Jinja chat template; default: that of stage 1")


# --------------------------- The losses, and the log-probabilities that they take. A row is (prompt ids, response ids).


def pair_weights(gaps, alpha: float, mean_gap: float | None = None) -> torch.Tensor:
    """w_i = (gap_i / mean gap)^α (section 3.4) of P gaps >= 0, float32 of shape (P,); mean_gap None: of these gaps."""
    gaps = torch.as_tensor(gaps, dtype=torch.float64)
    mean = gaps.mean().item() if mean_gap is None else float(mean_gap)
    check(mean > 0, "the mean gap is 0: no pair's totals differ, so no weight is defined; use --loss simpo")
    return ((gaps / mean) ** alpha).float()  # w_i, section 3.4


def spa_loss(chosen_logps, rejected_logps, weights, beta: float, gamma: float) -> torch.Tensor:
    """Equation 3, before the mean over pairs; all tensors have shape (P,), so has the result.

    chosen_logps, rejected_logps: log π(y|x) / |y|, the average log-probability per response token, end token included.
    weights: w_i; all 1 gives SimPO. γ is absolute: gamma_beta_ratio · β.
    """
    return -weights * F.logsigmoid(beta * chosen_logps - beta * rejected_logps - gamma)  # equation 3


def dpo_loss(chosen_logps, rejected_logps, chosen_reference, rejected_reference, beta: float) -> torch.Tensor:
    """DPO (arXiv 2305.18290, equation 7), before the mean; sums of log-probabilities, each of shape (P,)."""
    return -F.logsigmoid(beta * ((chosen_logps - chosen_reference) - (rejected_logps - rejected_reference)))


def response_logps(model, rows: list[tuple], calls: int, kept_tokens: float) -> torch.Tensor:
    """Σ_t log π(y_t | x, y_<t) of every row, float32 of shape (rows,)."""
    # Rows of like length share a call of the model. Processes that share sharded weights must all make `calls` calls,
    # so the last bins of some only repeat a row.
    bins, tokens, found = pack([[width_of(row)] for row in rows], CALL_TOKENS[model.device.type]), 0, []
    for members in bins + [bins[-1][:1]] * (calls - len(bins)):
        ids, mask, labels = to_batch([rows[i] for i in members], model.device)  # (B, T), (B, T), (B, K)
        tokens += ids.numel()
        model.exceeds = tokens > kept_tokens  # on a CPU `prepare` has such layers computed again
        # The class's forward, for the instance's is this function. Logits (B, K, V): none for the prompts.
        options = {"use_cache": False, "logits_to_keep": labels.shape[1] + 1}
        logits = type(model).forward(model, input_ids=ids, attention_mask=mask, **options).logits[:, :-1]
        logps = -F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")  # 0 at -100
        found.append(logps.view_as(labels).sum(-1))
    # Back into the order of the rows; the repeated ones count 0 times, but are in the graph.
    logps, order = torch.cat(found), torch.tensor([i for members in bins for i in members])
    return logps[: len(rows)][order.argsort().to(logps.device)] + 0.0 * logps[len(rows) :].sum()


def to_batch(rows: list[tuple], device) -> list[torch.Tensor]:
    """input_ids and attention mask (B, T), right-padded; labels (B, K): response tokens, and -100 beside them."""
    # All go by position, not by id: the padding token may be the end token.
    ids = pad_sequence([torch.tensor(prompt + response) for prompt, response in rows], batch_first=True)
    mask = pad_sequence([torch.ones(width_of(row)).long() for row in rows], batch_first=True)
    labels = [torch.tensor([-100] * len(prompt) + response) for prompt, response in rows]
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    labels = labels[:, min(len(prompt) for prompt, _ in rows) :]  # the columns behind the shortest prompt
    return [tensor.to(device) for tensor in (ids, mask, labels)]


def width_of(row: tuple) -> int:
    """Tokens of a row."""
    return len(row[0]) + len(row[1])


def rows_of(groups: list[dict]) -> list[tuple]:
    """All distinct rows of these prompts."""
    return [row for group in groups for row in group["sequences"]]


def pack(widths: list[list[int]], budget: int) -> list[list[int]]:
    """Indices of items in bins with rows × widest row <= budget; item i is rows of these widths, a larger one alone."""
    bins, width, rows = [], 0, 0
    for i in sorted(range(len(widths)), key=lambda i: (-max(widths[i]), i)):  # widest first: rows of like length meet
        if not bins or (rows + len(widths[i])) * width > budget:
            bins.append([])
            width, rows = max(widths[i]), 0
        bins[-1].append(i)
        rows += len(widths[i])
    return bins


# ------------------------------------------------ Data: pairs grouped by prompt, each distinct response tokenized once.


def read_pairs(path: Path, needs_gap: bool) -> list[dict]:
    """The rows of 05_pairs.jsonl with `prompt` a list of messages, `chosen` and `rejected` one message each."""
    check(path.is_file(), f"{path} not found; run 05_pairs.py with this --run_dir first")
    pairs, needed = [], ["chosen", "rejected", "gap"][: 2 + needs_gap]
    for number, line in common.read_lines(path):
        where = f"{path}, line {number}"
        row = common.parse_json(line, where)
        # Both sides are lists that end with the assistant's message; only the loss spa needs the gap of their totals.
        for name in needed:
            check(isinstance(row, dict) and row.get(name) is not None, f"{where}: no '{name}' in the row; add it")
        gap, sides = 0 if row.get("gap") is None else row["gap"], (row["chosen"], row["rejected"])
        check(type(gap) in (int, float) and 0 <= gap <= 1e9, f"{where}: 'gap' must be a number from 0 to 1e9")
        wanted = f"{where}: 'chosen' and 'rejected' must be lists of one assistant message, after the prompt's turns"
        for side in sides:
            check(isinstance(side, list) and side and all(isinstance(message, dict) for message in side), wanted)
            check(side[-1].get("role") == "assistant" and isinstance(side[-1].get("content"), str), wanted)
        # Other makers repeat the prompt's turns in both sides, or write them there alone. What both sides begin with
        # is the prompt then, and must end with what the row says it is.
        shared = sides[0][:-1]
        prompts = [prompt for prompt in (row.get("prompt"), shared) if prompt]
        check(prompts, f"{where}: no 'prompt' in the row; add it")
        for prompt in prompts:
            common.check_prompt(prompt, where)
        turns = [[(m["role"], m["content"].strip()) for m in common.as_messages(prompt)] for prompt in prompts]
        check(sides[1][:-1] == shared and turns[-1][: len(turns[0])] == turns[0], wanted)
        prompt = common.as_messages(prompts[-1])
        pairs.append({**row, "prompt": prompt, "chosen": sides[0][-1], "rejected": sides[1][-1], "gap": gap})
    check(pairs, f"{path} has no pairs; see what 04_denoise.py and 05_pairs.py printed")
    rows = common.read_record(common.record_file_of(path)).get("rows")
    check(rows in (None, len(pairs)), f"{path} has {len(pairs)} rows, but 05_pairs.py wrote {rows}: run it again")
    return pairs


def cut(pieces: list[tuple[str, bool]], start: int, stop: int) -> list[tuple[str, bool]]:
    """What pieces (text, is_plain) hold of their joined text[start:stop]."""
    parts, begin = [], 0
    for text, is_plain in pieces:
        parts.append((text[max(0, start - begin) : max(0, stop - begin)], is_plain))
        begin += len(text)
    return [part for part in parts if part[0]]


def encode_response(tokenizer, prompt: list[dict], response: dict, truncated: bool, ends: list[int]):
    """(prompt ids, response ids), with the one end token with which the model would have closed the response."""
    # The whole conversation is rendered, as the template wants it; what follows the rendered prompt is the response.
    before = common.render_chat(tokenizer, prompt, add_generation_prompt=True)
    whole = common.render_chat(tokenizer, [*prompt, response], add_generation_prompt=False)
    before_text, whole_text = ("".join(text for text, _ in pieces) for pieces in (before, whole))
    start, stop, text = len(before_text), len(whole_text), response["content"].strip()
    place, hint = whole_text.find(text, start), "pass a plain one with --chat_template FILE"
    same = whole_text.startswith(before_text) and place >= 0
    check(same, f"the chat template writes a prompt differently once it is answered (a thinking model?); {hint}")
    # Plain text that a template puts before an answer, as an empty thought: the model has neither seen nor written it.
    between, tokens = whole_text[start:place], tokenizer.added_tokens_decoder.values()
    added = between.strip() and not any(token.special and token.content in between for token in tokens)
    # A truncated response is its text alone: the model never ended it, so neither end nor closing is taught.
    if truncated:
        stop = place + len(text)
    # Where tokens merge over the border between prompt and response, the text is cut there instead.
    prompt_ids, whole_ids = (common.encode_pieces(tokenizer, pieces) for pieces in (before, cut(whole, 0, stop)))
    ids = whole_ids[len(prompt_ids) :]
    if added or whole_ids[: len(prompt_ids)] != prompt_ids:
        ids = common.encode_pieces(tokenizer, cut(whole, place if added else start, stop))
    if truncated:
        return prompt_ids, ids
    # What a template writes after the end token is never generated; a template without one gets the tokenizer's.
    closing, own = common.encode_pieces(tokenizer, cut(whole, place + len(text), stop)), tokenizer.eos_token_id
    ended = [i for i, token in enumerate(closing, 1) if token in ends]
    return prompt_ids, ids[: len(ids) - len(closing) + ended[0]] if ended else ids + [own] * (own is not None)


def group_pairs(tokenizer, pairs: list[dict], ends: list[int], args: Args) -> tuple[list[dict], dict[str, int]]:
    """(groups, how many pairs were dropped, by reason); one group a prompt, with each distinct response once:

    {"id", "sequences": rows (prompt ids, response ids), "pairs": [(chosen, rejected, gap), …] by their place among the
    sequences, "truncated": how many, "shortened": how many}. With --loss sft only the preferred responses are kept.
    """
    groups, encoded, dropped = {}, {}, {BLANK: 0, LONG: 0, SAME: 0}
    is_sft = args.loss == "sft"
    for pair in pairs:
        key, sides, indices = json.dumps([pair.get("id"), pair["prompt"]]), ["chosen", "rejected"][: 2 - is_sft], []
        id = pair["prompt"][-1]["content"] if pair.get("id") is None else pair["id"]
        group = groups.setdefault(key, {"id": id, "sequences": [], "pairs": [], "truncated": 0, "shortened": 0})
        if not all(pair[side]["content"].strip() for side in sides):  # would teach the model to say nothing
            dropped[BLANK] += 1
            continue
        # The two sides' places among the group's distinct rows; None where a response leaves no room for a prompt.
        for side in sides:
            truncated = bool(pair.get(f"{side}_truncated"))
            response = key, pair[side]["content"], truncated
            if response not in encoded:
                encoded[response] = encode_response(tokenizer, pair["prompt"], pair[side], truncated, ends)
            prompt, ids = encoded[response]
            room = args.max_length - len(ids)  # for the prompt, which loses its left
            row = prompt[-room:], ids
            if room > 0 and row not in group["sequences"]:  # where a template trims, two texts are the same tokens
                group["sequences"].append(row)
                group["truncated"] += truncated
                group["shortened"] += len(prompt) > room
            indices.append(group["sequences"].index(row) if room > 0 else None)
        # What is left is a pair, or with sft just the preferred response.
        if None in indices:
            dropped[LONG] += 1
        elif not is_sft and indices[0] == indices[1]:
            dropped[SAME] += 1
        elif not is_sft:
            group["pairs"].append((*indices, pair["gap"]))
    return [group for group in groups.values() if group["sequences" if is_sft else "pairs"]], dropped


def set_weights(groups: list[dict], args: Args, mean_gap: float | None) -> float:
    """Puts w_i beside the pairs of every group; returns the mean gap: that given, or that of `groups`."""
    gaps = [gap for group in groups for *_, gap in group["pairs"]]
    mean_gap = sum(gaps) / max(1, len(gaps)) if mean_gap is None else mean_gap
    weighted = args.loss in WEIGHTED
    for group in groups:
        own = [gap for *_, gap in group["pairs"]]
        group["weights"] = pair_weights(own, args.alpha, mean_gap).tolist() if weighted else [1.0] * len(own)
    return mean_gap


def weight_statistics(groups: list[dict]) -> dict[str, float]:
    """How unequal the pairs' weights are: (Σ w)² / Σ w² as a share of the pairs, and the share of zeros."""
    weights = torch.tensor([w for group in groups for w in group["weights"]])
    effective = weights.sum() ** 2 / (weights**2).sum().clamp(min=1e-30) / len(weights)
    zeros = (weights == 0).float().mean()
    return {"weights/effective_sample_size": effective.item(), "weights/zero_fraction": zeros.item()}


def split_prompts(groups: list[dict], args: Args) -> tuple[list[dict], list[dict]]:
    """(prompts to train on, prompts held out by --eval_fraction)."""
    # Seed and id alone decide: another δ or filter holds out the same ids, and prompts of one id stay together.
    draws = [common.derive_seed(args.seed, "eval", group["id"]) / 2**63 for group in groups]
    limit = max(args.eval_fraction, min(draws) + 1e-15) if args.eval_fraction else 0.0  # at least one
    kept, held_out = ([g for g, d in zip(groups, draws, strict=True) if (d < limit) is out] for out in (False, True))
    check(kept, f"--eval_fraction leaves none of {len(groups)} prompts to train on; lower it")
    return kept, held_out


def plan_steps(count: int, args: Args) -> list[list[int]]:
    """The prompts of every optimizer step of every epoch; the order depends on seed and epoch alone."""
    steps, per_epoch = [], -(-count // args.batch_size)
    for epoch in range(-(-args.max_steps // per_epoch) if args.max_steps else args.epochs):
        order = list(range(count))
        random.Random(common.derive_seed(args.seed, "epoch", epoch)).shuffle(order)
        steps += [order[i : i + args.batch_size] for i in range(0, count, args.batch_size)]
    return steps[: args.max_steps]


def learning_rate_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Linear warm-up (the first step already moves), then a cosine to 0; step counts from 0."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# -------------------------------------------------------------------------- One optimizer step's loss and its gradient.


def group_losses(groups: list[dict], logps: torch.Tensor, args: Args) -> tuple[torch.Tensor, dict]:
    """(the losses of these prompts: per pair (P,), or for sft per response; metrics per pair).

    logps: (S,) summed log-probabilities of all sequences of `groups`, in order; what the losses need beside them is in
    a group's "weights", one a pair, and "reference", one a sequence.
    """
    device = logps.device
    lengths = torch.tensor([len(response) for _, response in rows_of(groups)], device=device, dtype=logps.dtype)
    average = logps / lengths  # log π(y|x) / |y|, (S,)
    if args.loss == "sft":
        return -logps, {"logps/chosen": average.detach()}
    # Where each pair's two responses are among all sequences: two index vectors (P,).
    offsets = itertools.accumulate((len(group["sequences"]) for group in groups), initial=0)
    index = [(at + c, at + r) for at, group in zip(offsets, groups, strict=False) for c, r, _ in group["pairs"]]
    chosen, rejected = torch.tensor(index, device=device).T
    if args.loss == "dpo":
        reference = torch.tensor([value for group in groups for value in group["reference"]], device=device)
        losses = dpo_loss(logps[chosen], logps[rejected], reference[chosen], reference[rejected], args.beta)
        rewards = args.beta * (logps - reference)
    else:
        check(args.loss in ("spa", "simpo"), f"--loss {args.loss} has no branch in group_losses")
        weights = torch.tensor([w for group in groups for w in group["weights"]], device=device)
        losses = spa_loss(average[chosen], average[rejected], weights, args.beta, args.beta * args.gamma_beta_ratio)
        rewards = args.beta * average
    rewards, average = rewards.detach(), average.detach()
    margins = rewards[chosen] - rewards[rejected]
    values = rewards[chosen], rewards[rejected], margins, (margins > 0).float(), average[chosen], average[rejected]
    return losses, dict(zip(PAIR_METRICS, values, strict=True))


def denominator_of(groups: list[dict], args: Args) -> int:
    """What the summed losses are divided by: pairs, or for sft response tokens."""
    if args.loss == "sft":
        return sum(len(response) for _, response in rows_of(groups))
    return sum(len(group["pairs"]) for group in groups)


def backward_step(accelerator, model, groups: list[dict], args: Args, denominator: float) -> dict[str, float]:
    """The gradient of Σ losses / denominator over the prompts of one step; returns the metrics' sums."""
    # Every process takes its share of the prompts. A pass holds whole prompts, for the loss couples all responses of
    # one: at most --tokens_per_batch, or a single larger prompt.
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    names = SFT_METRICS if args.loss == "sft" else PAIR_METRICS
    plans, sums = [], torch.zeros(1 + len(names), device=device)
    for share in (groups[r::world] for r in range(world)):
        bins = pack([[width_of(row) for row in group["sequences"]] for group in share], args.tokens_per_batch)
        plans.append([[share[i] for i in members] for members in bins])
    # DDP sums the gradients in the last pass; FSDP in every pass, for whole gradients would not fit.
    delay, last = accelerator.distributed_type.value in ("MULTI_GPU", "MULTI_CPU"), max(map(len, plans)) - 1
    for number in range(last + 1):
        # All processes make equally many passes and calls, since they gather sharded weights together. One that has
        # no prompts left reads some row, which counts 0.
        own = plans[rank][number] if number < len(plans[rank]) else []
        widths = [[[width_of(row)] for row in rows_of(plan[number])] for plan in plans if number < len(plan)]
        calls = max(len(pack(rows, CALL_TOKENS[device.type])) for rows in widths)
        with accelerator.no_sync(model) if delay and number < last else contextlib.nullcontext():
            logps = model(rows_of(own) or groups[0]["sequences"][:1], calls)
            loss = 0.0 * logps.sum()
            if own:
                losses, metrics = group_losses(own, logps, args)
                loss = losses.sum() / denominator  # equation 3's mean over the pairs of the whole step
                sums += torch.stack([losses.detach().sum(), *(metrics[name].sum() for name in names)])
            accelerator.backward(loss * world)  # the processes' gradients are averaged, ours are summed
    return dict(zip(["loss", *names], accelerator.reduce(sums, "sum").tolist(), strict=True))


def all_logps(accelerator, model, groups: list[dict]) -> list[torch.Tensor]:
    """Summed log-probabilities of every group's sequences, without gradient, on every process; float32, CPU."""
    # The processes share the bins in turn; where they don't come out even, some repeat the last bin for nothing.
    rows, rank, world = rows_of(groups), accelerator.process_index, accelerator.num_processes
    bins = pack([[width_of(row)] for row in rows], CALL_TOKENS[accelerator.device.type])
    result, rounds = torch.zeros(len(rows), device=accelerator.device), range(0, len(bins), world)
    with torch.no_grad():
        shown = {"unit": "batch", "leave": False, "disable": rank > 0, "mininterval": common.bar_interval()}
        for start in tqdm(rounds, desc="06 log-probabilities", **shown):
            members = bins[min(start + rank, len(bins) - 1)]
            values = model([rows[i] for i in members], 1)
            if start + rank < len(bins):
                result[members] = values
    for module in model.modules():  # FSDP2 keeps the last weights gathered; a checkpoint wants all in shards
        if hasattr(module, "reshard"):
            module.reshard()
    return list(accelerator.reduce(result, "sum").cpu().split([len(group["sequences"]) for group in groups]))


def total_metrics(groups: list[dict], logps: list[torch.Tensor], args: Args, prefix: str) -> dict[str, float]:
    """Loss and metrics over whole prompts, from log-probabilities that were computed without gradient."""
    losses, metrics = group_losses(groups, torch.cat(logps), args)
    means = {"loss": losses.sum() / denominator_of(groups, args)} | {k: v.mean() for k, v in metrics.items()}
    return {f"{prefix}/{name}": value.item() for name, value in means.items()}


def train_step(accelerator, model, optimizer, batch, args: Args, rate: float, computed_in: str) -> dict[str, float]:
    """One optimizer step on the prompts of `batch`, in the type that is named; its metrics. UserError if not finite."""
    if args.gap_mean == "batch":
        set_weights(batch, args, None)
    denominator = denominator_of(batch, args)
    sums = backward_step(accelerator, model, batch, args, denominator)
    # Before anything moves: is it finite? A sharded gradient's norm comes in parts.
    norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    ids, finite = ", ".join(str(group["id"]) for group in batch), math.isfinite(sums["loss"]) and math.isfinite(norm)
    check(finite, f"the loss is not finite in {computed_in}; the prompts of this step: {ids}; lower --learning_rate?")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    # The metrics are means over pairs or responses; the loss of sft is one over tokens.
    count = len(rows_of(batch)) if args.loss == "sft" else denominator
    metrics = {name: value / count for name, value in sums.items()} | {"loss": sums["loss"] / denominator}
    statistics = weight_statistics(batch) if args.loss in WEIGHTED else {}
    return metrics | statistics | {"grad_norm": norm, "learning_rate": rate}


# ------------------------------------------------- The model: prepared for training, asked, saved; and its checkpoints.


def prepare(accelerator, model, args: Args):
    """(model, optimizer) under accelerate: trained weights in float32, whatever precision computes; no dropout."""
    if args.lora_rank:
        check(importlib.util.find_spec("peft"), "--lora_rank needs peft: python -m pip install peft")
        import peft

        # An adapter beside every linear layer, all else frozen. It begins as 0; of its two factors the first is
        # random, so it is drawn alike on every process. Trained weights are float32, also under a bfloat16 base.
        torch.manual_seed(args.seed % (1 << 63))
        rank, alpha = args.lora_rank, LORA_ALPHA * args.lora_rank
        peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_TARGETS), model)
        for weight in model.parameters():
            weight.data = weight.data.float() if weight.requires_grad else weight.data

    def keep(context, operation, *args, **options) -> CheckpointPolicy:
        dear = any(word in str(operation) for word in ("mm.", "dot_product"))  # matrix products and attention
        return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE

    def layer_contexts():  # of the forward pass and of what is computed again in the backward pass
        if args.gradient_checkpointing or model.exceeds:
            return contextlib.nullcontext(), contextlib.nullcontext()  # everything
        return create_selective_checkpoint_contexts(keep)

    # On a CPU the cheap parts of each layer are computed again too: a few percent more time, for a tiny model twice it.
    can = model.supports_gradient_checkpointing
    check(can or not args.gradient_checkpointing, f"{type(model).__name__} does not know --gradient_checkpointing")
    if args.gradient_checkpointing or (can and accelerator.device.type == "cpu" and model.num_parameters() >= TINY):
        newer = getattr(model, "activation_checkpointing_enable", None)  # its name in later transformers
        (newer or model.gradient_checkpointing_enable)({"use_reentrant": False, "context_fn": layer_contexts})
        # What is recomputed must be in training mode; dropout stays off, also where such a layer has its own (OPT).
        for part in (model.config, *model.modules()):
            part.training = getattr(part, "gradient_checkpointing", False)
            for name in [name for name, value in vars(part).items() if "drop" in name and type(value) is float]:
                setattr(part, name, 0.0)
    if model.config.get_text_config() is not model.config:  # what only sees or hears gets no gradient: DDP would wait
        text = {*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()}
        for weight in set(model.parameters()) - text:
            weight.requires_grad = False
    # Wrappers around the model see one call for all batches of a pass.
    model.forward = functools.partial(response_logps, model, kept_tokens=args.tokens_per_batch)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    exact = all(weight.dtype == torch.float32 for weight in wrapped.parameters() if weight.requires_grad)
    check(exact, "the weights are not in float32 after accelerator.prepare; launch with a file of configs/")
    return wrapped, optimizer


def answer(accelerator, model, tokenizer, prompt: list[dict]) -> str:
    """The model's greedy answer to one prompt; all processes take part, for they gather sharded weights together."""
    ids = common.encode_chat(tokenizer, prompt)[-max(1, common.context_length(model.config) - 64) :]
    with accelerator.autocast():
        (sample,) = common.generate(model.eval(), tokenizer, [ids], [0], temperature=0.0, max_new_tokens=64)
    return sample.text[:200]


def write_card(args: Args, record: dict, pairs: int, prompts: int, held_out: int) -> str:
    """The model card: what was trained on what, with names in the place of this machine's paths."""
    given = Path(args.model), Path(args.output_dir)
    base, name = (path.name if path.is_absolute() or path.exists() else str(path) for path in given)
    made, shown = record["earlier"], record["args"] | {"model": base, "output_dir": name}
    verdict, judge = common.judge_verdict(made, common.names_of(made))[1], made.get("02", {})
    checked = [*common.check_lines(made), *([f"Warning: {verdict}."] if verdict else [])]
    judge = judge.get("scorer") or judge.get("judge_model")
    origin = "sampled, scored and refined itself" if not judge else f"sampled and refined itself; scored by {judge}"
    origin = f" that the model {origin}. No human labels" if "02" in made else ", of a file without a record"
    return f"""---
base_model: {base}
library_name: transformers
tags: [alignment, preference-optimization, spa]
---
# {name}
{base}, trained with Self-Priority Alignment (SPA, arXiv 2511.06222), loss `{args.loss}`, on {pairs} preference
pairs of {prompts} prompts ({held_out} held out){origin}.
It has not been evaluated for any use; what it was trained on decides what it does.

{"  ".join(line + chr(10) for line in checked)}
Arguments: `{shown}`; data: `{record["inputs"]}`; versions: `{record["versions"]}`
"""


@contextlib.contextmanager
def told_in_one_line(errors, message: str, *words: str):
    """Errors of libraries, those with one of `words` if any are given, become one line; … in it is what they say."""
    try:
        yield
    except errors as error:
        if words and not any(word in str(error) for word in words):
            raise
        failure = UserError(message.replace("…", common.first_line(error)))
        failure.of_all_processes = False  # one of several may meet it alone: whoever meets it says so
        raise failure from None


@contextlib.contextmanager
def replace_folder(accelerator, folder: Path):
    """Yields a folder beside `folder` for all processes to write in; whole and on disk, it takes its place."""
    partial, is_main = folder.with_name(f".{folder.name}.partial"), accelerator.is_main_process
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    line = f"{folder} can't be written: …; the last one is kept; make room and run the same command again"
    with told_in_one_line((OSError, RuntimeError, SafetensorError), line):
        try:
            yield partial
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    accelerator.wait_for_everyone()
    # On disk first, then in place. After a kill between the two lines that do it, the last checkpoint makes it again.
    for path in filter(Path.is_file, partial.rglob("*")) if is_main else []:  # further chat templates have a folder
        path.chmod(0o644)  # safetensors writes for its owner alone
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if is_main:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    accelerator.wait_for_everyone()


def speak_older(folder: Path) -> None:
    """Adds the names by which transformers 4.5x, in older servers, finds the same values in the two configs."""
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        rope = dict(values.get("rope_parameters") or {})
        if "rope_theta" in rope:
            values["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            values["rope_scaling"] = rope
        if "dtype" in values:
            values["torch_dtype"] = values["dtype"]
        if values.get("tokenizer_class") == "TokenizersBackend":
            values["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(values.get("extra_special_tokens"), list):
            values["additional_special_tokens"] = values.pop("extra_special_tokens")
        path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def save_model(accelerator, model, tokenizer, folder: Path, card: str, args: Args) -> tuple[float, float]:
    """Writes the model; returns (share of the weights that training changed, share of those that bfloat16 keeps)."""
    gathered, changed, survived, total = accelerator.get_state_dict(model), 0, 0, 1  # by all processes together
    with replace_folder(accelerator, folder) as partial:
        if accelerator.is_main_process:
            # What is saved is an untouched model in float32 with the trained weights put in; what an adapter has learnt
            # is added to it, in float32 too, whatever type the base had in training.
            plain = common.load_model(args.model, "float32", "cpu")
            weights = plain.state_dict()
            state = dict(weights) if args.lora_rank else {name: value.cpu() for name, value in gathered.items()}
            if args.lora_rank:
                for name, layer in accelerator.unwrap_model(model).named_modules():
                    if hasattr(layer, "get_delta_weight"):
                        delta = layer.get_delta_weight("default").detach().float().cpu()
                        state[f"{name}.weight"] = weights[f"{name}.weight"] + delta
            odd = sorted(state.keys() ^ weights.keys())[:2]
            check(not odd, f"the trained weights are not those of {type(plain).__name__}: {', '.join(odd)}")
            for name, old in plain.named_parameters():
                total, changed = total + old.numel(), changed + (state[name] != old).sum().item()
                survived += (state[name].bfloat16() != old.bfloat16()).sum().item()
            plain.load_state_dict(state)
            try:
                plain.generation_config.validate(strict=True)
            except ValueError:  # such a config loads, but refuses to be saved
                plain.generation_config.do_sample = True
            plain.to(getattr(torch, args.save_dtype)).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            (partial / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
            speak_older(partial)
    return changed / total, survived / max(1, changed)


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints, the newest last; whatever else lies there is left alone."""
    return sorted(path for path in folder.glob("*") if path.is_dir() and path.name.isdigit())


def remove_checkpoints(folder: Path) -> None:
    """Removes the stage's own folders in `folder`, and `folder` unless others have put something there."""
    for path in [*checkpoints_in(folder), *folder.glob(".*.partial")]:
        shutil.rmtree(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def save_checkpoint(accelerator, folder: Path, progress: dict) -> None:
    """Writes weights, optimizer and `progress` into folder/STEP; the one before goes after it is whole."""
    with replace_folder(accelerator, folder / f"{progress['step']:06d}") as partial:
        accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            (partial / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
    for other in checkpoints_in(folder)[:-1] if accelerator.is_main_process else []:
        shutil.rmtree(other)


def find_checkpoint(folder: Path, call: int, launch: str) -> tuple[Path | None, dict]:
    """(the newest checkpoint, its progress), or (None, {}). UserError if it can't be resumed here."""
    path = max(checkpoints_in(folder), default=None)
    if path is None:
        return None, {}
    broken, file = f"{path} is no whole checkpoint: remove that folder to go on without it", path / "progress.json"
    progress = common.parse_json(file.read_text(errors="replace") if file.is_file() else "", broken)
    check(isinstance(progress, dict) and {"call", "launch", "step", "log_bytes"} <= progress.keys(), broken)
    was = progress["launch"]
    check(was == launch, f"{path} was written by {was}, this is {launch}: launch as before, or remove {folder}")
    return (path, progress) if progress["call"] == call else (None, {})  # else of a run that --overwrite has ended


# ----------------------------------------------------------------------------------------------------------- The stage.


def check_args(args: Args) -> None:
    """What can be seen before anything is read."""
    positive = {"alpha", "beta", "learning_rate", "epochs", "max_steps", "batch_size", "max_length", "tokens_per_batch"}
    positive.add("max_grad_norm")  # a norm clipped to 0 would train nothing, silently
    for name, value in asdict(args).items():
        check(name not in positive or value is None or value > 0, f"--{name} {value}: more than 0 is wanted")
        share = name not in ("warmup_ratio", "eval_fraction") or 0 <= value < 1
        check(share, f"--{name} {value}: from 0 to below 1 is wanted")
    common.check_at_least(args, 0, "gamma_beta_ratio", "weight_decay", "save_steps", "eval_steps", "lora_rank")
    check(args.lora_rank or args.base_dtype == "float32", "--base_dtype bfloat16 is for --lora_rank: full training is")
    there = not args.tracker or importlib.util.find_spec(args.tracker)
    check(there, f"--tracker {args.tracker}: it is not installed; python -m pip install {args.tracker}")
    if args.eval_steps and not args.eval_fraction:
        common.warn("--eval_steps is not used without --eval_fraction")
    if args.alpha != 1 and args.loss not in WEIGHTED:
        common.warn(f"--alpha is not used by --loss {args.loss}")
    if args.gamma_beta_ratio > 1.6:
        common.warn(f"--gamma_beta_ratio {args.gamma_beta_ratio:g} is above 1.6; it is γ/β, not γ")


def make_accelerator(args: Args, folder: Path) -> Accelerator:
    """What `accelerate launch` asked for, as far as the stage supports it."""
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "").upper() or "NO"
    check(dynamo == "NO", f"dynamo ({dynamo}) is not supported: launch with a file of configs/")
    parts = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or "1"  # the loss would be divided by it
    check(parts == "1", f"gradient accumulation ({parts}) is not supported: --tokens_per_batch splits a step")
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # by version 2 alone; its checkpoints are whole files
    way = os.environ.get("FSDP_VERSION", "1"), os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    check(not sharded or way == ("2", "FULL_STATE_DICT"), f"FSDP {' '.join(way)} is not supported; see configs/")
    options = {"cpu": not torch.cuda.is_available(), "log_with": args.tracker, "project_dir": str(folder.parent)}
    options["kwargs_handlers"] = [InitProcessGroupKwargs(timeout=timedelta(days=1))]  # all wait while one writes
    # With FSDP and bf16, accelerate's own policy would round our sums and the reduced gradients to bfloat16.
    if sharded and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(mixed_precision_policy=policy)
    accelerator = Accelerator(**options)
    kind, precision = accelerator.distributed_type.value, accelerator.mixed_precision
    kinds = ("NO", "MULTI_GPU", "MULTI_CPU") if args.lora_rank else ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP")
    what = f"{kind} with mixed precision {precision}" + (" and --lora_rank" if args.lora_rank else "")
    check(kind in kinds and precision in ("no", "bf16"), f"{what} is not supported; see configs/")
    threads, cores = torch.get_num_threads() * accelerator.num_processes, os.cpu_count()
    if accelerator.device.type == "cpu" and threads < cores:  # accelerate launch allows one unless asked
        common.warn(f"{threads} threads on {cores} cores; for more: --num_cpu_threads_per_process, or OMP_NUM_THREADS")
    return accelerator


@told_in_one_line(RuntimeError, OUT_OF_MEMORY, "out of memory", "allocate memory")
def main(args: Args) -> None:
    # Where things are. A link is followed now, so that the folder behind it can be replaced as a whole.
    run_dir, args.output_dir = Path(args.run_dir), args.output_dir or str(Path(args.run_dir) / "06_model")
    source, named = run_dir / "05_pairs.jsonl", Path(args.output_dir)
    stem, folder = named.name.removesuffix("_model"), named.resolve()
    fits = str(folder).encode(errors="replace").decode() == str(folder)  # else the tokenizer would not be saved
    check(fits and not folder.is_file(), f"--output_dir {named} is a file, or no UTF-8; a folder is wanted")
    # It is replaced as a whole: never a run's folder; nor may its record be that of another stage.
    other = folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()
    own = named.name and named.name[:3] not in ("01_", "02_", "03_", "04_", "05_")
    check(own and not other, f"--output_dir {named} is no model's folder and would be replaced: choose another")
    names = ("metrics.jsonl", "args.json", "checkpoints")
    metrics_file, record_file, checkpoints = (named.with_name(f"{stem}_{name}") for name in names)
    args.beta = args.beta if args.beta is not None else 0.01 if args.loss == "dpo" else 2.0
    check_args(args)
    accelerator = make_accelerator(args, named)
    first_process, device = accelerator.is_main_process, accelerator.device
    computed_in = accelerator.mixed_precision.replace("no", args.base_dtype)  # autocast's type, or else the weights'
    args.tokens_per_batch = args.tokens_per_batch or (1536 if device.type == "cpu" else 8192)

    # What to train on what. A model is never guessed: pairs teach the one that wrote the responses.
    pairs = read_pairs(source, needs_gap=args.loss in WEIGHTED)
    common.read_files(args)
    made = common.made_by(source)
    common.inherit(args, made, "01", "model", "chat_template")
    check(args.model, f"nothing beside {source} says which model wrote these responses: pass --model")
    # A judge that prefers the worse answers makes a worse model, while the loss falls and the margins rise.
    fit, verdict = common.judge_verdict(made, common.names_of(made))
    check(fit or args.accept_unfit_judge, f"{verdict}; see the judge check of 02_score.py, or --accept_unfit_judge")
    if verdict:
        common.warn(verdict)
    tokenizer = common.load_tokenizer(args.model, args.chat_template)  # a wrong name ends before --overwrite has begun
    record = common.begin(args, "06_train", [metrics_file, named], made, record_file, **{source.name: source})
    if (args.overwrite or record["complete"]) and first_process:  # a kill may have come before they went
        remove_checkpoints(checkpoints)
    if record["complete"]:
        accelerator.print(f"{named} is complete already; --overwrite trains again")
        return

    # Where to go on. A checkpoint is taken only by the call that wrote it, on as many processes of the same kind.
    compared = {field.name: record["args"].get(field.name) for field in fields(args) if not field.metadata["free"]}
    call = common.derive_seed(compared, record["inputs"])
    launch = f"{accelerator.num_processes} processes ({accelerator.distributed_type.value})"
    accelerator.wait_for_everyone()
    checkpoint, progress = find_checkpoint(checkpoints, call, launch)
    done = progress.get("step", 0)

    # The pairs, the weights and the order of the steps: the same on every process.
    model = common.load_model(args.model, args.base_dtype, device, args.attn_implementation)
    common.check_vocabulary(tokenizer, model, args.model)
    args.max_length = min(args.max_length, common.context_length(model.config))
    everything, dropped = group_pairs(tokenizer, pairs, common.end_token_ids(tokenizer, model), args)
    check(everything, f"no pair is left: {', '.join(f'{n} {why}' for why, n in dropped.items() if n)}")
    groups, held_out = split_prompts(everything, args)
    steps = [[groups[g] for g in step] for step in plan_steps(len(groups), args)]
    per_epoch = -(-len(groups) // args.batch_size)
    mean_gap = set_weights(groups, args, None)
    for step in steps if args.loss in WEIGHTED and args.gap_mean == "batch" else []:
        differ = any(gap for group in step for *_, gap in group["pairs"])
        check(differ, "a batch has only gaps of 0: use a larger --batch_size or --gap_mean dataset")

    # The first lines say what will be done, and what of the responses will not be taught.
    used, responses = len(pairs) - sum(dropped.values()), len(rows_of(everything))
    common.announce(
        "06 train", f"loss {args.loss}", f"model {args.model}", f"{used} pairs", f"{len(everything)} prompts",
        f"{len(steps)} steps", f"learning rate {args.learning_rate:g}", f"β {args.beta:g}" * (args.loss != "sft"),
        f"γ {args.beta * args.gamma_beta_ratio:g}, γ/β {args.gamma_beta_ratio:g}" * (args.loss in ("spa", "simpo")),
        f"LoRA rank {args.lora_rank} on {args.base_dtype}" if args.lora_rank else "",
    )  # fmt: skip
    accelerator.print(f"processes: {accelerator.num_processes}, mixed precision: {accelerator.mixed_precision}")
    truncated, shortened = (sum(group[name] for group in everything) for name in ("truncated", "shortened"))
    if truncated:
        share = f"{truncated} of {responses} responses ({truncated / responses:.0%})"
        common.warn(f"{share} were cut at the length limit: they are taught without an end token")
    if shortened:
        common.warn(f"{shortened} responses leave too little of --max_length for their prompts, which lose their left")

    # The model under training. Its answer before is kept, to be read beside the one after.
    asked = pairs[0]["prompt"]
    before_answer = progress.get("answer") or answer(accelerator, model, tokenizer, asked)
    model, optimizer = prepare(accelerator, model, args)
    if args.tracker:
        config = {name: value if value is not None else "default" for name, value in asdict(args).items()}
        accelerator.init_trackers(stem, config, {"tensorboard": {"purge_step": done + 1}} if done else {})
    measured = held_out or groups[:: math.ceil(len(groups) / MEASURED_PROMPTS)]

    def measure() -> dict[str, float]:
        set_weights(measured, args, mean_gap)
        logps = all_logps(accelerator, model, measured)
        finite = torch.cat(logps).isfinite().all()
        check(finite, f"the model's numbers are not finite in {computed_in}: lower --learning_rate?")
        return total_metrics(measured, logps, args, "eval" if held_out else "train")

    # Before training: dpo's frozen reference, and the metrics of the prompts that are measured; or all that as it was.
    if checkpoint:
        accelerator.print(f"going on from step {done} of {len(steps)} ({checkpoint})")
        with told_in_one_line(Exception, f"{checkpoint} can't be read (…): remove that folder to go on without it"):
            accelerator.load_state(str(checkpoint))  # of cut files every reader has errors of its own
        for group, reference in zip(everything, progress["reference"], strict=True):
            group["reference"] = reference
    else:
        if args.loss == "dpo":  # an adapter still adds 0, so this is the base's with it too
            for group, values in zip(everything, all_logps(accelerator, model, everything), strict=True):
                group["reference"] = values.tolist()
        progress = {"launch": launch, "call": call, "num_tokens": 0, "log_bytes": 0, "answer": before_answer}
        progress |= {"before": measure(), "reference": [group.get("reference") for group in everything]}

    # Training: one row of metrics a step. Rows behind the checkpoint are written again.
    started, tokens_before = time.monotonic(), progress["num_tokens"]
    shown = {"unit": "step", "disable": not first_process, "mininterval": common.bar_interval()}
    bar = tqdm(total=len(steps), initial=done, desc="06 train", **shown)
    with open(metrics_file if first_process else os.devnull, "a", encoding="utf-8") as log, bar:

        def write(step: int, row: dict) -> None:
            log.write(common.dump_row({"step": step} | row))
            log.flush()
            accelerator.log(row, step=step)

        if first_process:
            log.truncate(min(progress["log_bytes"], metrics_file.stat().st_size))
        if not done:
            write(0, progress["before"])
        for number, batch in enumerate(steps[done:], done + 1):
            rate = args.learning_rate * learning_rate_factor(number - 1, len(steps), args.warmup_ratio)
            metrics = train_step(accelerator, model, optimizer, batch, args, rate, computed_in)
            progress["num_tokens"] += sum(map(width_of, rows_of(batch)))
            epoch = {"epoch": number / per_epoch}
            write(number, epoch | metrics | {"num_tokens": progress["num_tokens"]})
            shown = {name.split("/")[-1]: f"{metrics[name]:.4f}" for name in ("loss", *REWARDS[2:]) if name in metrics}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            # After the last step comes the whole model in the place of a checkpoint, and the last evaluation anyhow.
            if number == len(steps):
                break
            if held_out and number % (args.eval_steps or per_epoch) == 0:
                write(number, epoch | measure())
            if args.save_steps and number % args.save_steps == 0:
                progress |= {"step": number, "log_bytes": log.tell()}
                save_checkpoint(accelerator, checkpoints, progress)
        seconds = max(1e-9, time.monotonic() - started)
        after = measure()
        write(len(steps), {"epoch": len(steps) / per_epoch} | after)

    # The model, then its record, then what a person wants to know.
    optimizer = accelerator.free_memory(optimizer)
    card = write_card(args, record, used, len(everything), len(held_out))
    shares = save_model(accelerator, model, tokenizer, folder, card, args)
    plain = accelerator.unwrap_model(model)
    del plain.forward  # the class's own again
    if first_process:
        trained = [group for step in steps[done:] for group in step]
        count = len(rows_of(trained)) if args.loss == "sft" else sum(len(group["pairs"]) for group in trained)
        speed = {"seconds": seconds, "pairs": count, "tokens": progress["num_tokens"] - tokens_before}
        common.finish(record, common.count_lines(metrics_file), speed=speed)
        remove_checkpoints(checkpoints)
        common.show_funnel("06 train", ("pairs in", len(pairs)), {k: n for k, n in dropped.items() if n}, "pairs used")
        print(f"  prompts: {len(everything)} ({len(held_out)} held out), distinct responses: {responses}")
        set_weights(groups, args, mean_gap)
        title = f"over {len(measured)} {'held-out' if held_out else 'training'} prompts"
        report(args, groups, title, progress["before"], after, speed, shares)
    after_answer = answer(accelerator, plain, tokenizer, asked)
    accelerator.print(f"  asked: {asked[-1]['content'][:100]!r}\n  before training: {before_answer!r}")
    accelerator.print(f"  the trained model: {after_answer!r}\nwrote {named} and {metrics_file.name}")
    prompts = made.get("01", {}).get("prompts", "data/high_stakes.jsonl")
    test = f"--split test --n 1 --temperature 0 --run_dir {run_dir}/test_{named.name.removeprefix('06_')}"
    accelerator.print(f"next: python 01_sample.py --model {named} --prompts {prompts} {test}")
    accelerator.end_training()


def report(args: Args, groups, title: str, before: dict, after: dict, speed: dict, shares: tuple) -> None:
    """Prints how fast it was, the metrics over the measured prompts before and after, and what bfloat16 would keep."""
    if args.loss in WEIGHTED:
        effective, zero = weight_statistics(groups).values()
        print(f"  weights: effective sample size {effective:.0%} of the pairs, zero {zero:.0%}")
    what, seconds = "responses" if args.loss == "sft" else "pairs", speed["seconds"]
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
    rates = f"{speed['pairs'] / seconds:.2f} {what}/s, {speed['tokens'] / seconds:.0f} tokens/s"
    print(f"  trained on {speed['pairs']} {what} in {seconds:.0f} s: {rates}{memory}")
    print(f"  {title:<26}{'before':>10}{'after':>10}")
    for name, value in after.items():
        print(f"  {name.partition('/')[2]:<26}{before[name]:>10.4f}{value:>10.4f}")
    # A reader in bfloat16 sees only those of the changes that are large enough for it.
    changed, survived = shares
    print(f"  training changed {changed:.0%} of the weights; {survived:.0%} of them differ in bfloat16 too")
    if changed and survived < 0.5:
        keep = "" if args.save_dtype == "float32" else "save with --save_dtype float32, "
        more = f"{keep}answer with --dtype float32, or train longer or at a higher --learning_rate"
        common.warn(f"read in bfloat16, the trained model is nearly the one before: {more}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_interrupt)
    common.run_stage(main, Args)
