"""MMLU of several models side by side (the paper's Table 2), from the samples that lm-evaluation-harness logs.

Accuracy with its standard error by task, over all questions (micro) and over the tasks (macro), and each model's
difference to the first one, paired by question, with its 95 % bootstrap interval over questions.

    reads   --runs: folders given to lm_eval as --output_path, which hold samples_TASK_DATE.jsonl (the newest of a task)
    writes  OUTPUT_DIR/mmlu.md and mmlu.csv
    run     python -m pip install lm_eval==0.4.13
            python -m lm_eval --model hf --model_args pretrained=runs/x/06_model --tasks mmlu --num_fewshot 5 \\
                --log_samples --output_path runs/eval/lm_eval/SPA
            python eval/mmlu_table.py --runs Vanilla=runs/eval/lm_eval/Vanilla SPA=runs/eval/lm_eval/SPA

Any other task with accuracies works too. Runs of other prompts (--num_fewshot, chat template) are refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shared

import common
from common import arg, check

MICRO, MACRO = "all questions (micro)", "mean of tasks (macro)"


@dataclass
class Args:
    runs: list[str] = arg(None, "NAME=DIR each, lm_eval's --output_path; the first is the one compared with")
    metric: str = arg("acc", "which of lm_eval's metrics of a question")
    output_dir: str = arg("runs/eval", "folder of the tables")
    seed: int = arg(0, "seed of the bootstrap")


def read_samples(folder: Path, metric: str) -> dict[tuple[str, int], tuple[float, str]]:
    """(task, number of the question) -> (its metric, digest of the whole prompt), of the newest file of each task."""
    newest, found = {}, {}
    for path in sorted(folder.rglob("samples_*.jsonl"), key=lambda path: path.name):  # the names end with their date
        named = re.fullmatch(r"samples_(.+)_(\d{4}-\d\d-\d\dT[\d.:-]+)\.jsonl", path.name)
        check(named, f"{path}: lm_eval names its files samples_TASK_DATE.jsonl")
        newest[named[1]] = path
    check(newest, f"{folder} has no samples_*.jsonl; run lm_eval with --log_samples --output_path {folder}")
    for task, path in newest.items():
        for number, line in common.read_lines(path):
            where = f"{path}, line {number}"
            row = common.parse_json(line, where)
            fits = isinstance(row, dict) and {"doc_id", "prompt_hash", "target_hash"} <= row.keys()
            check(fits, f"{where}: not a row of lm_eval's --log_samples")
            value = row.get(metric)
            check(type(value) in (int, float), f"{where}: no number '{metric}'; choose another --metric")
            # a task may read its answers in several ways ("filter"): the first one counts
            digests = f"{row['prompt_hash']} {row['target_hash']}"
            found.setdefault((task, row["doc_id"]), (float(value), digests))
    return found


def summarize(name: str, samples: dict, first: dict, seed: int) -> list[dict]:
    """A row per task, then one over all questions and one over the tasks, of one model.

    samples, first: as `read_samples`, of the same questions. For the mean of tasks a question counts N / (tasks ·
    questions of its task), and the standard error is √(Σ se²) / tasks.
    """
    keys = sorted(samples)
    tasks = np.array([task for task, _ in keys])
    right = np.array([samples[key][0] for key in keys])  # (N,)
    change = right - np.array([first[key][0] for key in keys])

    def line(task: str, chosen, weights) -> dict:
        values, n = right[chosen], int(chosen.sum())
        low, high = shared.bootstrap_interval((change * weights)[chosen], seed=seed)
        return {
            "model": name,
            "task": task,
            "n": n,
            "accuracy": float((right * weights)[chosen].mean()),
            "standard_error": float(values.std()) / math.sqrt(n),
            "difference": math.nan if samples is first else float((change * weights)[chosen].mean()),
            "difference_low": math.nan if samples is first else low,
            "difference_high": math.nan if samples is first else high,
        }

    names = list(dict.fromkeys(tasks.tolist()))
    lines = [line(task, tasks == task, np.ones(len(keys))) for task in names]
    sizes = {row["task"]: row["n"] for row in lines}
    shares = np.array([len(keys) / (len(names) * sizes[task]) for task in tasks.tolist()])
    macro_error = math.sqrt(sum(row["standard_error"] ** 2 for row in lines)) / len(names)
    every = np.full(len(keys), True)
    overall = [line(MICRO, every, np.ones(len(keys))), line(MACRO, every, shares) | {"standard_error": macro_error}]
    return lines + overall


def percent(value: float) -> str:
    return shared.round_half_up(100 * value, 1)


def cells(row: dict, compared: bool) -> list[str]:
    """Accuracy ± standard error, and the difference to the first model with its interval."""
    texts = [percent(row[f"difference{end}"]) for end in ("", "_low", "_high")]
    signed = [text if text.startswith(("-", "–")) else f"+{text}" for text in texts]
    difference = "–" if math.isnan(row["difference"]) else f"{signed[0]} [{signed[1]}, {signed[2]}]"
    return [f"{percent(row['accuracy'])} ± {percent(row['standard_error'])}", *[difference] * compared]


def show_tables(tables: dict[str, list[dict]]) -> str:
    """mmlu.md: the overall accuracies, a row a model, and those by task, a column a model."""
    first, several = next(iter(tables)), len(tables) > 1
    overall = [
        [name, str(rows[-2]["n"]), *cells(rows[-2], several), *cells(rows[-1], several)]
        for name, rows in tables.items()
    ]
    minus = [f"minus {first}"] * several
    by_task = [
        [rows[0]["task"], str(rows[0]["n"]), *(cells(row, False)[0] for row in rows)]
        for rows in zip(*(table[:-2] for table in tables.values()), strict=True)
    ]
    note = f" Difference to {first}: paired by question, 95 % bootstrap interval over questions." * several
    parts = [f"Accuracy in percent ± standard error, from lm-evaluation-harness's samples.{note}"]
    parts.append(shared.markdown_table(["model", "n", MICRO, *minus, MACRO, *minus], overall))
    return "\n\n".join([*parts, shared.markdown_table(["task", "n", *tables], by_task)])


def main(args: Args) -> None:
    check(args.runs, "--runs: at least one is wanted, NAME=DIR with lm_eval's output")
    samples = {}
    for spec in args.runs:
        name, folder = shared.split_spec(spec)
        name = name or Path(folder).name
        check(name not in samples, f"--runs: '{name}' twice; give each a NAME=DIR of its own")
        samples[name] = read_samples(Path(folder), args.metric)
    first = next(iter(samples))
    for name, found in samples.items():
        same = {key: digest for key, (_, digest) in found.items()} == {k: d for k, (_, d) in samples[first].items()}
        check(same, f"{name} and {first} were asked other questions or in other prompts; run lm_eval alike for both")
    tables = {name: summarize(name, found, samples[first], args.seed) for name, found in samples.items()}
    text, path = show_tables(tables), shared.output_path(args.output_dir, "mmlu.md")
    shared.write_text(path, text)
    shared.write_csv(path.with_suffix(".csv"), [row for rows in tables.values() for row in rows])
    print(f"{text}\n\nwrote {path} and .csv")


if __name__ == "__main__":
    common.run_stage(main, Args)
