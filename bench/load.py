"""Many rows: how long the stages take, what they hold, and how both grow.

    01      goes on where all prompts but four are done: until its first new row is written, and until its end
    04, 05  whole, on that many prompts
    06      read_pairs and group_pairs, all that happens to the pairs before the first step

Each part runs in a process of its own, at a tenth of its size and at the whole. Processor time is that of all threads,
imports and the model's loading counted in, and memory the process's peak. Stage 1 samples a token a response, a prompt
at a time, so that it is not sampling what is measured. The rows' texts are random words of our own prompts.

    writes  nothing but what it prints: a table with the growth of processor time from a tenth to the whole
    run     python bench/load.py
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
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

NEW = 4  # prompts that stage 1 still has to sample


@dataclass
class Args:
    model: str = arg(common.DEFAULT_MODEL, "of stage 1; its tokenizer reads the pairs of stage 6")
    done: int = arg(100_000, "rows that stage 1 has done")
    prompts: int = arg(1_000_000, "prompts of stages 4 and 5")
    pairs: int = arg(200_000, "pairs of stage 6")
    n: int = arg(5, "responses a prompt; stages 4 to 6 have three")
    words: int = arg(60, "longest response, the shortest being 5")
    parts: list[str] = arg(("01", "04", "05", "06"), "what to measure", ("01", "04", "05", "06"))
    worker: str | None = arg(None, "used by the script itself")
    folder: str | None = arg(None, "used by the script itself")


def make_rows(count: int, words: int, n: int):
    """Rows of 03_refined.jsonl, one by one; stage 4 keeps most of them, stage 5 makes five or six pairs of each."""
    rng, lines = random.Random(0), common.read_lines(ROOT / "data" / "high_stakes.jsonl")
    known = " ".join(json.loads(line)["prompt"] for _, line in lines).split()
    texts = [" ".join(rng.choices(known, k=rng.randint(5, words))) for _ in range(2000)]
    for i in range(count):
        drawn = [{"text": f"{rng.choice(texts)} {i}", "system": None, "truncated": False} for _ in range(n)]
        scored = [one | {"scores": [rng.randint(4, 8), rng.randint(4, 8)]} for one in drawn]
        refined = {"text": f"{rng.choice(texts)} {i} at last", "scores": [9, 9], "truncated": False}
        yield {"id": f"p{i}", "prompt": rng.choice(texts)[:200] + f" {i}?", "responses": scored, "refined": refined}


def make_input(part: str, size: int, folder: Path, args: Args) -> None:
    """Writes what the part reads."""
    rows = make_rows(size + NEW, args.words, args.n) if part == "01" else make_rows(size, args.words, 3)
    if part == "01":  # the prompts; a call that ends before its first row, for the record; then the rows that are done
        rows = [{"id": row["id"], "prompt": row["prompt"], "responses": row["responses"]} for row in rows]
        with open(folder / "prompts.jsonl", "w", encoding="utf-8") as file:
            file.writelines(common.dump_row({"id": row["id"], "prompt": row["prompt"]}) for row in rows)
        run_worker("01 begin", folder, args)
        for response in [response for row in rows for response in row["responses"]]:
            del response["scores"]
        rows, name = rows[:-NEW], "01_samples.jsonl"
    elif part == "06":
        stage, name = importlib.import_module("05_pairs"), "05_pairs.jsonl"
        pairs = (pair for row in rows for pair in stage.build_pairs(row, stage.Args())[0])
        rows = (pair for _, pair in zip(range(size), pairs, strict=False))
    else:
        name = {"04": "03_refined.jsonl", "05": "04_denoised.jsonl"}[part]
    with open(folder / name, "w", encoding="utf-8") as file:
        file.writelines(map(common.dump_row, rows))


def work(part: str, folder: Path, args: Args) -> dict[str, tuple]:
    """Does one part in this process: {what: (processor time, seconds) since this began}."""
    started, seconds = time.monotonic(), {}
    now = lambda: (time.process_time(), time.monotonic() - started)  # noqa: E731
    if part == "06":
        stage = importlib.import_module("06_train")
        pairs = stage.read_pairs(folder / "05_pairs.jsonl", True)
        seconds["06 read_pairs"], tokenizer = now(), common.load_tokenizer(args.model)
        groups, _ = stage.group_pairs(tokenizer, pairs, [tokenizer.eos_token_id], stage.Args())
        check(sum(len(group["pairs"]) for group in groups) == len(pairs), "pairs are lost")
        return seconds | {"06 and group_pairs": now()}
    stage = importlib.import_module({"01": "01_sample", "04": "04_denoise", "05": "05_pairs"}[part[:2]])
    options = {"run_dir": str(folder)}
    if part[:2] == "01":
        options |= {"prompts": str(folder / "prompts.jsonl"), "model": args.model}
        options |= {"n": args.n, "batch_size": args.n, "max_new_tokens": 1}
    if part == "01 begin":
        common.map_rows = lambda *_: sys.exit()
    stage.main(stage.Args(**options))
    return {f"{part} whole": now()}


def run_worker(part: str, folder: Path, args: Args) -> tuple[dict[str, tuple], float]:
    """Runs a part in a process of its own: ({what: (processor time, seconds)}, peak memory in GiB)."""
    command = [sys.executable, __file__, "--worker", part, "--folder", str(folder)]
    command += ["--model", args.model, "--n", str(args.n)]
    output, started, seconds = folder / "01_samples.jsonl", time.monotonic(), {}
    before = output.exists() and output.stat().st_size
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, text=True)
        while process.poll() is None:
            if before and not seconds and output.stat().st_size > before:
                ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
                clock = time.monotonic() - started
                seconds["01 until its first new row"] = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), clock
            time.sleep(0.01)
        text, problem = (file.seek(0) or file.read() for file in (out, err))
    check(process.returncode == 0, f"the part {part} failed: {problem[-2000:]}")
    found = {"seconds": {}, "memory": 0} if part == "01 begin" else json.loads(text.splitlines()[-1])
    return seconds | found["seconds"], found["memory"]


def main(args: Args) -> None:
    if args.worker:
        seconds = work(args.worker, Path(args.folder), args)
        peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
        print(json.dumps({"seconds": seconds, "memory": int(peak) / 2**20}))
        return
    header = "| | " + "rows | CPU s | clock s | GiB | " * 2 + "times as long |"
    print(header + "\n|" + " --- |" * 10, flush=True)
    for part in args.parts:
        whole = {"01": args.done, "06": args.pairs}.get(part, args.prompts)
        results = []
        for size in (whole // 10, whole):
            with tempfile.TemporaryDirectory() as name:
                make_input(part, size, Path(name), args)
                results.append((size, *run_worker(part, Path(name), args)))
        for what in results[0][1]:
            cells = [f"{size} | {seconds[what][0]:.1f} | {seconds[what][1]:.1f} | {memory:.2f}"
                     for size, seconds, memory in results]  # fmt: skip
            growth = results[1][1][what][0] / results[0][1][what][0]
            print(f"| {what} | {' | '.join(cells)} | {growth:.1f} |", flush=True)


if __name__ == "__main__":
    common.run_stage(main, Args)
