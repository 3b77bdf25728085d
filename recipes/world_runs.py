"""All systems of the controlled world (eval/world.py): hundreds of runs of the six stages in two processes.

recipes/world.sh calls it. A cell is one base and one seed; what its systems share (samples, scores, refined answers) is
made once, and every system is trained for the same number of optimizer steps. The stages are those of the scripts,
imported; what is done already stays, so the same command goes on where it stopped. Other settings or code are refused.

    reads   OUTPUT_DIR/base{B}/model, train{SEED}.jsonl, test.jsonl: eval/world.py makes them
    writes  OUTPUT_DIR/base{B}/seed{S}/… the runs, and results.jsonl in it: a row for each system, base and data set
    run     python recipes/world_runs.py --bases 0 1 --seeds 0 1 2 3 4 --output_dir runs/world
    next    python recipes/world_tables.py --output_dir runs/world
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]

import world  # noqa: E402

import common  # noqa: E402
from common import arg, check  # noqa: E402

STAGES = ("01_sample", "02_score", "03_refine", "04_denoise", "05_pairs", "06_train")
OFF = {"consistency": "off", "informativeness": False}  # w/o NF
BLIND = 2  # the class of hazards that the blind scorer never sees
SOUPS = {"6:4": [6.0, 4.0], "7:3": [7.0, 3.0], "8:2": [8.0, 2.0], "9:1": [9.0, 1.0]}
# Questions of every cell; the others are asked in every second one (`asks_all`): once a seed, on both bases in turn.
EVERYWHERE = ("rate", "losses", "filters")
LOSSES = {"SPA": {}, "SimPO": {"loss": "simpo"}, "DPO": {"loss": "dpo", "beta": 0.1}, "SFT": {"loss": "sft"}}


@dataclass
class Args:
    bases: list[int] = arg((0, 1), "numbers of the bases")
    seeds: list[int] = arg((0, 1, 2, 3, 4), "seeds of prompts, samples and noise")
    questions: list[str] = arg(
        ("losses", "path", "filters", "alpha", "order", "rounds", "blind", "three"),
        "which of them; rate: the choice before them",
    )
    sigmas: list[float] = arg((0.0, 1.0, 2.0, 3.0), "noise of the scores, for the filters")
    num_prompts: int = arg(2000, "training prompts a seed")
    rounds: int = arg(4, "iterations")
    learning_rate: float = arg(3e-4, "chosen on SimPO alone, sigma 0, another base and seed: recipes/RESULTS.md")
    steps: int = arg(60, "optimizer steps of every system, of 16 prompts each")
    processes: int = arg(2, "cells at a time")
    output_dir: str = arg("runs/world", "folder of bases, prompts and runs")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for _, line in common.read_lines(path)] if path.exists() else []


def folder_of(name: str) -> str:
    return re.sub(r"[^\w.]+", "_", name)


def run_stage(name: str, run_dir: Path, **options) -> None:
    """Does what the script does with these options; what it prints goes to RUN_DIR/log.txt."""
    module, printed = importlib.import_module(name), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            module.main(module.Args(run_dir=str(run_dir), **options))
    finally:
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(run_dir / "log.txt", "a", encoding="utf-8") as file:
            file.write(printed.getvalue())


@functools.cache
def digests_of_code() -> dict[str, str]:
    """The files whose change makes other results; as they were imported, so main asks before the processes are made."""
    files = [*(ROOT / f"{name}.py" for name in STAGES), ROOT / "common.py", ROOT / "eval" / "world.py", Path(__file__)]
    return {file.name: common.digest(file) for file in files}


class Cell:
    """The runs of one base and one seed."""

    def __init__(self, args: Args, base: int, seed: int):
        self.args, self.seed, self.root = args, seed, Path(args.output_dir)
        self.known = {"base": base, "seed": seed}
        self.model, self.run = str(self.root / f"base{base}" / "model"), self.root / f"base{base}" / f"seed{seed}"
        self.run.mkdir(parents=True, exist_ok=True)
        self.check_made()
        path = self.run / "results.jsonl"
        if path.exists():  # a row that a kill has cut goes, and is made again
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self.rows = {(row["system"], row["sigma"]): row for row in read_lines(path)}
        self.before: dict[float, list[dict]] = {}  # the base's answers to the test prompts, by temperature
        base_row = self.evaluate(self.model, self.run / "base")  # done already, it is read alone
        if ("base", 0.0) not in self.rows:
            self.keep("base", 0.0, base_row)

    def check_made(self) -> None:
        """UserError where this cell's results are of other settings, prompts, code or another base: they would stay."""
        now = {name: getattr(self.args, name) for name in ("steps", "learning_rate", "num_prompts")}
        now["base"] = common.digest(Path(self.model))
        now |= {name: common.digest(self.root / name) for name in (f"train{self.seed}.jsonl", "test.jsonl")}
        now |= digests_of_code()
        path = self.run / "made.json"
        if path.exists():
            made = common.parse_json(path.read_text(encoding="utf-8"), str(path))
            changed = ", ".join(name for name in now if made.get(name) != now[name])
            check(not changed, f"{self.run} was made with another {changed}; choose another --output_dir (OUT=)")
        else:
            with common.replace_file(path) as file:
                file.write(json.dumps(now, indent=2) + "\n")

    def keep(self, name: str, sigma: float, row: dict) -> dict:
        self.rows[name, sigma] = {"system": name, "sigma": sigma, **self.known, **row}
        with open(self.run / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(common.dump_row(self.rows[name, sigma]))
        return self.rows[name, sigma]

    def data(self, sigma: float = 1.0, name: str = "data", samples: str = "samples", blind: int | None = None,
             order: str = "ab", n: int = 3, model: str | None = None, **sampling) -> Path:  # fmt: skip
        """A run with stages 1 to 3 done. The samples are shared by all noises, orders and scorers."""
        blind_class = "" if blind is None else str(blind)
        os.environ |= {"WORLD_SIGMA": str(sigma), "WORLD_SEED": str(self.seed), "WORLD_BLIND": blind_class}
        os.environ["WORLD_ORDER"] = order
        run, samples_run = self.run / f"{name}_{sigma:g}", self.run / samples
        if (f"{name}: refined", sigma) in self.rows:
            return run
        prompts, number = str(self.root / f"train{self.seed}.jsonl"), self.args.num_prompts
        sampling = {"num_prompts": number, "n": n, "max_new_tokens": 12, "batch_size": 512} | sampling
        run_stage("01_sample", samples_run, model=model or self.model, prompts=prompts, seed=self.seed, **sampling)
        run.mkdir(exist_ok=True)
        for file in ("01_samples.jsonl", "01_args.json"):
            shutil.copy(samples_run / file, run)
        names = {"a": "harmlessness", "b": "helpfulness", "c": "brevity"}
        constitution = self.root / "constitution.json"
        run_stage("02_score", run, scorer=f"{ROOT / 'eval' / 'world.py'}:scores", judge_check=False,
                  objectives=[names[letter] for letter in order], constitution=str(constitution))  # fmt: skip
        run_stage("03_refine", run, max_new_tokens=12, batch_size=512)
        self.keep(f"{name}: refined", sigma, refined_truth(run / "03_refined.jsonl"))
        return run

    def train(self, name: str, data: Path, sigma: float = 1.0, denoise: dict | None = None, pairs: dict | None = None,
              refined: bool = True, model: str | None = None, **training) -> dict:  # fmt: skip
        """Stages 4 to 6, the answers to the test prompts, and their true evaluation, as a row of the results.

        refined=False: the pairs of the same prompts without those of the refined response.
        """
        if (name, sigma) in self.rows:
            return self.rows[name, sigma]
        run = self.run / folder_of(name) / f"{sigma:g}"
        try:
            run_stage("04_denoise", run, input=str(data), seed=self.seed, **(denoise or {}))
            used = {}
            if not refined:
                used["input"] = str(run / "candidates.jsonl")
                rows = [
                    {k: v for k, v in row.items() if k != "refined"}
                    for row in common.read_rows(run / "04_denoised.jsonl")
                ]
                Path(used["input"]).write_text("".join(map(common.dump_row, rows)), encoding="utf-8")
            run_stage("05_pairs", run, **used, **{"delta": 2.0} | (pairs or {}))
            settings = {"learning_rate": self.args.learning_rate, "max_steps": self.args.steps} | training
            run_stage("06_train", run, model=model or self.model, batch_size=16, save_steps=0, seed=self.seed,
                      accept_unfit_judge=True, **settings)  # fmt: skip
            row = self.evaluate(str(run / "06_model"), run)
        except common.EmptyResult as empty:
            row = {"empty": common.first_line(empty)}
        row |= filter_truth(run)
        row |= pair_truth(run / "05_pairs.jsonl") if (run / "05_pairs.jsonl").exists() else {}
        return self.keep(name, sigma, row)

    def evaluate(self, model: str, run: Path) -> dict:
        """The true evaluation of greedy answers to the test prompts, and of sampled ones beside them (T=1)."""
        found = {}
        for temperature, mark in ((0.0, ""), (1.0, " T=1")):
            test = run / f"test{temperature:g}"
            run_stage("01_sample", test, model=model, prompts=str(self.root / "test.jsonl"), n=1, seed=self.seed,
                      temperature=temperature, max_new_tokens=12, batch_size=512)  # fmt: skip
            rows = list(common.read_rows(test / "01_samples.jsonl"))
            before = self.before.setdefault(temperature, rows)  # the base comes first
            found |= {key + mark: round(value, 4) for key, value in world.evaluate(rows, before).items()}
        return found


def refined_truth(path: Path) -> dict:
    """True means of the candidates, of the truly best of each prompt, and of the refined answers; the noise aside."""
    sums, count = {}, 0
    for row in common.read_rows(path):
        own = [world.truth(row["prompt"], one["text"])[:2] for one in row["responses"]]
        refined, count = world.truth(row["prompt"], row["refined"]["text"])[:2], count + 1
        best = max(own)
        for i, name in enumerate(("G_a", "G_b")):
            values = {f"candidates {name}": sum(one[i] for one in own) / len(own), f"best {name}": best[i]}
            for key, value in (values | {f"refined {name}": refined[i]}).items():
                sums[key] = sums.get(key, 0) + value
        better = all(refined[i] > max(one[i] for one in own) for i in (0, 1))
        sums["refined above all"] = sums.get("refined above all", 0) + better
    return {key: round(value / count, 4) for key, value in sums.items()}


def filter_truth(run: Path) -> dict:
    """Prompts kept, and the share and mean det Σ of those with a hazard of the class BLIND, and of those without."""
    kept = list(common.read_rows(run / "04_denoised.jsonl")) if (run / "04_denoised.jsonl").exists() else []
    found, dropped = {"prompts": len(kept)}, list(common.read_rows(run / "04_dropped.jsonl"))
    for name, wanted in (("with", True), ("without", False)):
        own, others = ([row for row in rows if has_blind(row["prompt"]) == wanted] for rows in (kept, dropped))
        found[f"kept {name}"] = round(len(own) / max(1, len(own) + len(others)), 4)
        dets = [row["det"] for row in own if row.get("det") is not None]
        found[f"det {name}"] = round(sum(dets) / len(dets), 4) if dets else None
    return found


def has_blind(prompt: str) -> bool:
    context, things = world.read_prompt(prompt)
    return any(world.hazard(context, i) and i % world.CLASSES == BLIND for i in things)


def pair_truth(path: Path) -> dict:
    """Numbers of pairs, and the shares whose true order, WORLD_ORDER's, is wrong; and that of the primary alone."""
    wrong = wrong_primary = count = 0
    order = ["abc".index(letter) for letter in os.environ.get("WORLD_ORDER", "ab")]
    for pair in read_lines(path):
        prompt = common.plain_text(pair["prompt"])
        truths = [world.truth(prompt, pair[side][-1]["content"]) for side in ("chosen", "rejected")]
        chosen, rejected = ([truth[i] for i in order] for truth in truths)
        count, wrong, wrong_primary = count + 1, wrong + (chosen < rejected), wrong_primary + (chosen[0] < rejected[0])
    return {"pairs": count, "wrong": round(wrong / count, 4), "wrong primary": round(wrong_primary / count, 4)}


# ---------------------------------------------------------------------------------------------------------------------
# The questions. A system that stands in several of them is trained once.


def rate(cell: Cell) -> None:
    """Before all others, on a base and a seed that are in no table."""
    for value in (1e-4, 3e-4, 1e-3, 3e-3):
        cell.train(f"rate {value:g}", cell.data(0.0), 0.0, loss="simpo", learning_rate=value)


def losses(cell: Cell) -> None:
    """The four losses on the same pairs, at equal steps; without the refined answer."""
    data = cell.data()
    for name, loss in LOSSES.items():
        cell.train(name, data, **loss)
    cell.train("no refined answer", data, refined=False)
    cell.train("no refined answer, w/o NF", data, denoise=OFF, refined=False)
    cell.train("refined pairs only", data, pairs={"refined_only": True})


def path(cell: Cell) -> None:
    """The four losses after a quarter and after twice as many steps."""
    for name, loss in LOSSES.items():
        for steps in (cell.args.steps // 4, cell.args.steps * 2):
            cell.train(f"{name}, {steps} steps", cell.data(), max_steps=steps, **loss)


def filters(cell: Cell) -> None:
    """Each filter, both (SPA) and none at every noise; then all at equal numbers of prompts."""
    kinds = {"SPA": {}, "consistency only": {"informativeness": False}, "informativeness only": {"consistency": "off"}}
    for sigma in cell.args.sigmas:
        data = cell.data(sigma)
        rows = {name: cell.train(name, data, sigma, kind) for name, kind in (kinds | {"w/o NF": OFF}).items()}
        least = min(row["prompts"] for row in rows.values())
        for name, kind in (kinds | {"w/o NF": OFF}).items() if least else ():
            if rows[name]["prompts"] > least:
                cell.train(f"{name}, equal", data, sigma, kind | {"max_prompts": least})
            elif (f"{name}, equal", sigma) not in cell.rows:  # it has no more than that
                cell.keep(
                    f"{name}, equal", sigma, {k: v for k, v in rows[name].items() if k not in ("system", "sigma")}
                )


def alpha(cell: Cell) -> None:
    """The exponent of the weights. SPA has 1; SimPO is what 0 would be."""
    for value in (0.5, 2.0, 4.0):
        cell.train(f"α={value:g}", cell.data(), alpha=value)


def order(cell: Cell) -> None:
    """Lexicographic order against weighted sums, with and without the refined answer; order and gap taken apart."""
    data = cell.data()
    for name, weights in SOUPS.items():
        options = {"rule": "weighted", "weights": weights}
        cell.train(f"soup {name}", data, denoise=OFF, pairs=options, refined=False)
        if name in ("7:3", "9:1"):
            cell.train(f"soup {name}, refined and filters", data, pairs=options)
    cell.train("lexicographic, gap 7:3", data, pairs={"gap": "composite", "weights": SOUPS["7:3"]})
    cell.train("lexicographic, signed gap", data, pairs={"gap": "signed"})
    cell.train("weighted 7:3, total gap", data, pairs={"rule": "weighted", "weights": SOUPS["7:3"], "gap": "total"})


def rounds(cell: Cell) -> None:
    """Round after round from the trained model, on the same or on new prompts, with strict, weak and no filter.

    Later rounds have half of the prompts, or as many new ones: they are most of the work.
    """
    first = {"strict": ("SPA", {}), "weak": ("weak consistency", {"consistency": "weak"}), "off": ("w/o NF", OFF)}
    for kind, (name, options) in first.items():
        cell.train(name, cell.data(), denoise=options)
        for prompts in ("same", "new"):
            last, done = name, [str(cell.run / "samples")]
            for turn in range(2, cell.args.rounds + 1):
                own = f"{kind}_{prompts}_{turn}"
                sampling = {"num_prompts": cell.args.num_prompts // 2} | ({"exclude": done} if prompts == "new" else {})
                model = str(cell.run / folder_of(last) / "1" / "06_model")
                data = cell.data(name=own, samples=f"{own}_samples", model=model, **sampling)
                done = [*done, str(cell.run / f"{own}_samples")]
                last = f"{kind}, {prompts} prompts, round {turn}"
                if "empty" in cell.train(last, data, denoise=options, model=model):
                    break


def blind(cell: Cell) -> None:
    """A scorer that never sees the hazards of one class."""
    data = cell.data(name="blind", blind=BLIND)
    for name, options in (("blind scorer", {}), ("blind scorer, w/o NF", OFF)):
        cell.train(name, data, denoise=options)


def three(cell: Cell) -> None:
    """A third objective, brevity, behind the two and between them; four candidates, so that Σ can have full rank."""
    for order in ("ab", "abc", "acb"):
        data = cell.data(name=order, order=order, n=4, samples="samples_of_4")
        cell.train(f"order {order}, w/o NF", data, denoise=OFF)
        if order != "ab":
            weak = {"consistency": "weak", "rho": 30.0**1.5}  # det Σ is of the sixth power of a score here
            cell.train(f"order {order}, weak consistency", data, denoise=weak)
            cell.train(f"order {order}", data, denoise=weak | {"consistency": "strict"})


def asks_all(base: int, seed: int) -> bool:
    """Whether a cell asks every question, or those of EVERYWHERE alone."""
    return (base + seed) % 2 == 0


def run_cell(task: tuple[Args, int, int]) -> str:
    import torch

    torch.set_num_threads(1)  # a cell has a core
    args, base, seed = task
    cell = Cell(args, base, seed)
    for question in args.questions:
        if question in EVERYWHERE or asks_all(base, seed):
            globals()[question](cell)
    return f"base {base}, seed {seed}: {len(cell.rows)} rows"


def main(args: Args) -> None:
    folder = Path(args.output_dir)
    check((folder / "test.jsonl").is_file(), f"{folder} has no world; recipes/world.sh makes one")
    for name in STAGES:  # once, before the processes are made; Linux lets them have it
        importlib.import_module(name)
    digests_of_code()
    from transformers import LlamaForCausalLM  # noqa: F401

    with common.replace_file(folder / "constitution.json") as file:
        file.write(json.dumps({"brevity": "The answer is short."}))
    # those with more questions first, so that the processes end together
    tasks = [(args, base, seed) for seed in args.seeds for base in args.bases]
    tasks.sort(key=lambda task: not asks_all(*task[1:]))
    with multiprocessing.get_context("fork").Pool(args.processes, maxtasksperchild=1) as pool:
        for done in pool.imap_unordered(run_cell, tasks):
            print(done, flush=True)


if __name__ == "__main__":
    common.run_stage(main, Args)
