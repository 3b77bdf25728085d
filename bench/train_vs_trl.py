"""Stage 6 against TRL: the same pairs, model, precision, token limit and optimizer, in one run.

First both compute loss and gradient of the same pairs (TRL's CPOTrainer with loss simpo, cpo_alpha 0 and
equal β and γ; stage 6 with --loss simpo): they must agree, or the race is off. Then they train in
alternation, each in a process of its own, TRL at the fastest of --trl_batches (those that divide a step).
Loading, tokenizing and saving are not timed; peak memory is the whole process's.

    writes  nothing but what it prints: a table with medians and ratios
    run     python bench/train_vs_trl.py

Responses are random words of the prompts' own: speed does not depend on the words. Their lengths are drawn between the
two numbers of --tokens; "150 300" is what a model writes, "13 70" what padding and prompts weigh most in. With
--prompts 8 there are two optimizer steps, so that the optimizer's state counts in the peak memory of both.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from common import arg, check  # noqa: E402

BETA, GAMMA_BETA_RATIO, MAX_LENGTH, RATE = 2.0, 0.25, 1024, 1e-6


@dataclass
class Args:
    model: str = arg(common.DEFAULT_MODEL, "model to train")
    prompts: int = arg(4, "prompts in the data, each trained on once")
    batch_size: int = arg(4, "prompts per optimizer step, for both")
    tokens: list[int] = arg(None, "fewest and most tokens of a response; several pairs of numbers: one race each")
    responses: list[int] = arg(None, "responses a prompt (default: 4 6, which is n = 3 and n = 5)")
    repeats: int = arg(3, "runs of each; the medians count")
    trl_batches: str = arg("1,3,6", "TRL's per_device_train_batch_size: each is tried once, the fastest races")
    tokens_per_batch: int | None = arg(None, "stage 6's")
    device_threads: int = arg(2, "threads of torch on a CPU")
    seed: int = arg(0, "seed of the responses")
    worker: str | None = arg(None, "used by the script itself", ("compare", "spa", "trl"))
    folder: str | None = arg(None, "used by the script itself")


def make_pairs(responses: int, least: int, most: int, args: Args) -> list[dict]:
    """Rows of 05_pairs.jsonl: all pairs of `responses` answers to each prompt, the earlier one preferred.

    An answer has `least` to `most` tokens of the model's tokenizer, to within a word.
    """
    rng, tokenizer = random.Random(args.seed), common.load_tokenizer(args.model)
    prompts = [json.loads(line)["prompt"] for _, line in common.read_lines(ROOT / "data" / "high_stakes.jsonl")]
    words = re.findall(r"\w+", " ".join(prompts))

    def answer() -> str:
        length, text = rng.randint(least, most), rng.choice(words)
        while len(tokenizer(text).input_ids) < length:
            text += " " + rng.choice(words)
        return text

    pairs = []
    for number, prompt in enumerate(rng.sample(prompts, args.prompts)):
        for chosen, rejected in itertools.combinations([answer() for _ in range(responses)], 2):
            row = {"id": f"p{number}", "prompt": common.as_messages(prompt), "gap": 1}
            sides = (("chosen", chosen), ("rejected", rejected))
            pairs.append(row | {side: [{"role": "assistant", "content": text}] for side, text in sides})
    return pairs


def peak_memory() -> float:
    """GiB: of the GPU's memory if there is one, else the peak resident size of this process (Linux)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def make_trainer(pairs: list[dict], batch: int, args: Args):
    """TRL's trainer on these pairs; every optimizer step has as many pairs as one of stage 6."""
    import torch
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    tokenizer = common.load_tokenizer(args.model)
    model = common.load_model(args.model, "float32")
    rows = []  # as rendered text: given messages, TRL would end a response twice (template and end token)
    for pair in pairs:
        pieces = common.render_chat(tokenizer, pair["prompt"], add_generation_prompt=True)
        row = {side: pair[side][0]["content"] for side in ("chosen", "rejected")}
        rows.append(row | {"prompt": "".join(text for text, _ in pieces)})
    step = args.batch_size * len(pairs) // args.prompts
    config = CPOConfig(
        output_dir=args.folder,
        loss_type="simpo",
        beta=BETA,
        simpo_gamma=BETA * GAMMA_BETA_RATIO,
        cpo_alpha=0.0,
        max_length=MAX_LENGTH,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=step // batch,
        num_train_epochs=1,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        seed=args.seed,
    )
    return CPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def work_trl(pairs: list[dict], batch: int, args: Args) -> dict:
    from transformers import TrainerCallback

    times = {}

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            times["begin"] = time.time()

        def on_train_end(self, *_, **__):
            times["end"] = time.time()

    trainer = make_trainer(pairs, batch, args)
    trainer.add_callback(Clock())
    trainer.train()
    return {"seconds": times["end"] - times["begin"], "memory": peak_memory()}


def work_spa(pairs: list[dict], args: Args) -> dict:
    """The stage itself, as a user runs it."""
    train = importlib.import_module("06_train")
    options = {"run_dir": args.folder, "model": args.model, "loss": "simpo", "beta": BETA, "seed": args.seed}
    options |= {"gamma_beta_ratio": GAMMA_BETA_RATIO, "max_length": MAX_LENGTH, "learning_rate": RATE}
    options |= {"batch_size": args.batch_size, "tokens_per_batch": args.tokens_per_batch, "save_steps": 0}
    train.main(train.Args(**options, overwrite=True))
    record = json.loads((Path(args.folder) / "06_args.json").read_text())
    return {"seconds": record["speed"]["seconds"], "memory": peak_memory()}


def work_compare(pairs: list[dict], args: Args) -> dict:
    """Loss and gradient of the same pairs by both; TRL takes them in parts, for it keeps all logits."""
    from accelerate import Accelerator

    train = importlib.import_module("06_train")
    batches = args.prompts * 3  # of equal size, so the mean over all pairs is the mean of their means
    trainer = make_trainer(pairs, len(pairs) // batches, args)
    theirs, loss = trainer.model.eval(), 0.0
    for batch in trainer.get_train_dataloader():
        part = trainer.compute_loss(theirs, batch) / batches
        part.backward()
        loss += part.item()
    gradient = {name: p.grad.clone() for name, p in theirs.named_parameters()}

    accelerator, model = Accelerator(cpu=True), common.load_model(args.model, "float32", "cpu")
    tokenizer = common.load_tokenizer(args.model)
    options = {"loss": "simpo", "beta": BETA, "gamma_beta_ratio": GAMMA_BETA_RATIO, "run_dir": args.folder}
    options = train.Args(**options, tokens_per_batch=args.tokens_per_batch or 1536)
    rows = train.read_pairs(Path(args.folder) / "05_pairs.jsonl", False)
    groups, _ = train.group_pairs(tokenizer, rows, common.end_token_ids(tokenizer, model), options)
    train.set_weights(groups, options, None)
    train.prepare(accelerator, model, options)
    sums = train.backward_step(accelerator, model, groups, options, len(pairs))
    ours = dict(model.named_parameters())
    check(ours.keys() == gradient.keys(), "the models differ")
    square = sum((ours[name].grad - gradient[name]).double().square().sum() for name in gradient)
    total = sum(value.double().square().sum() for value in gradient.values())
    return {"spa": sums["loss"] / len(pairs), "trl": loss, "gradient": (square / total).sqrt().item()}


def run_worker(kind: str, folder: Path, args: Args, batch: int = 1) -> dict:
    """Runs this script as a worker in a process of its own; returns what it measured."""
    command = [sys.executable, __file__, "--worker", kind, "--folder", str(folder), "--trl_batches", str(batch)]
    for name in ("model", "prompts", "batch_size", "tokens_per_batch", "device_threads", "seed"):
        value = getattr(args, name)
        command += [f"--{name}", str(value)] if value is not None else []
    environment = os.environ | {"OMP_NUM_THREADS": str(args.device_threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    check(done.returncode == 0, f"the worker '{kind}' failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def race(responses: int, least: int, most: int, args: Args) -> None:
    """Compares, races and prints for one number of responses a prompt."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = make_pairs(responses, least, most, args)
        (folder / "05_pairs.jsonl").write_text("".join(map(common.dump_row, pairs)), encoding="utf-8")
        per_prompt = len(pairs) // args.prompts
        title = f"{responses} responses of {least} to {most} tokens, {per_prompt} pairs a prompt"
        print(f"\n{title}, {args.prompts} prompts, {args.model}", flush=True)
        same = run_worker("compare", folder, args)
        off = abs(same["spa"] / same["trl"] - 1)
        print(f"  loss: stage 6 {same['spa']:.7f}, TRL {same['trl']:.7f}, relative difference {off:.1e}")
        print(f"  gradient: relative difference {same['gradient']:.1e}")
        check(off < 1e-5 and same["gradient"] < 1e-4, "loss or gradient differ: no race")
        step = args.batch_size * per_prompt
        batches = [int(batch) for batch in args.trl_batches.split(",") if step % int(batch) == 0]
        check(bool(batches), f"none of --trl_batches {args.trl_batches} divides the {step} pairs of a step")
        tries = {batch: run_worker("trl", folder, args, batch) for batch in batches}
        for batch, result in tries.items():
            rate = len(pairs) / result["seconds"]
            print(f"  TRL at batch {batch}: {rate:.2f} pairs/s, peak {result['memory']:.2f} GiB", flush=True)
        best = min(batches, key=lambda batch: tries[batch]["seconds"])
        results = {"spa": [], "trl": []}
        for _ in range(args.repeats):
            for kind, runs in results.items():
                runs.append(run_worker(kind, folder, args, best))
        print(f"  {'':<10}{'pairs/s, each run':<32}{'median':>8}{'peak GiB':>10}")
        rate, memory = {}, {}
        for kind, runs in results.items():
            rates = [len(pairs) / run["seconds"] for run in runs]
            rate[kind], memory[kind] = statistics.median(rates), max(run["memory"] for run in runs)
            name = "stage 6" if kind == "spa" else f"TRL ({best})"
            each = ", ".join(f"{value:.2f}" for value in rates)
            print(f"  {name:<10}{each:<32}{rate[kind]:>8.2f}{memory[kind]:>10.2f}")
        print(f"  ratio of the medians: {rate['spa'] / rate['trl']:.2f}", flush=True)


def main(args: Args) -> None:
    if args.worker:
        pairs = [json.loads(line) for _, line in common.read_lines(Path(args.folder) / "05_pairs.jsonl")]
        if args.worker == "trl":
            result = work_trl(pairs, int(args.trl_batches), args)
        else:
            result = {"spa": work_spa, "compare": work_compare}[args.worker](pairs, args)
        print(json.dumps(result))
        return
    check(importlib.util.find_spec("trl") is not None, "trl is not installed: python -m pip install trl==1.16.0")
    tokens = args.tokens or [13, 70, 150, 300]
    check(len(tokens) % 2 == 0, f"--tokens {tokens}: pairs of numbers are wanted")
    for least, most in zip(tokens[::2], tokens[1::2], strict=True):
        for responses in args.responses or [4, 6]:
            race(responses, least, most, args)


if __name__ == "__main__":
    common.run_stage(main, Args)
