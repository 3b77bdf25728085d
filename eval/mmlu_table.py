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
import pandas as pd
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


def read_samples(folder: Path, metric: str) -> pd.DataFrame:
    """The newest file of each task: a row a question (task, doc_id), its metric as "value", "digests" of its prompt."""
    newest, found = {}, {}
    for path in sorted(folder.rglob("samples_*.jsonl"), key=lambda path: path.name):  # the names end with their date
        named = re.fullmatch(r"samples_(.+)_(\d{4}-\d\d-\d\dT[\d.:-]+)\.jsonl", path.name)
        check(named, f"{path}: lm_eval names its files samples_TASK_DATE.jsonl")
        newest[named[1]] = path
    check(newest, f"{folder} has no samples_*.jsonl; run lm_eval with --log_samples --output_path {folder}")
    fields = {"doc_id", "prompt_hash", "target_hash"}
    for task, path in newest.items():
        for where, row in shared.read_jsonl(path, fields, "not a row of lm_eval's --log_samples"):
            value = row.get(metric)
            check(type(value) in (int, float), f"{where}: no number '{metric}'; choose another --metric")
            # a task may read its answers in several ways ("filter"): the first one counts
            found.setdefault((task, row["doc_id"]), (float(value), f"{row['prompt_hash']} {row['target_hash']}"))
    keys = pd.MultiIndex.from_tuples(found, names=["task", "doc_id"])
    return pd.DataFrame(found.values(), index=keys, columns=["value", "digests"]).sort_index()


def summarize(name: str, right: pd.Series, first: pd.Series | None, seed: int) -> list[dict]:
    """A row per task, then one over all questions and one over the tasks, of one model.

    right: 0 or 1 for each (task, doc_id); first: the first model's, None for itself. For the mean of tasks a question
    counts N / (tasks · questions of its task), and the standard error is √(Σ se²) / tasks.
    """
    tasks = right.groupby("task")
    weights = len(right) / (tasks.ngroups * tasks.transform("size"))
    parts = [(task, own, 1.0) for task, own in tasks] + [(MICRO, right, 1.0), (MACRO, right, weights)]
    lines = []
    for task, own, weight in parts:
        change = [] if first is None else weight * (own - first.loc[own.index])
        line = {"model": name, "task": task, "n": len(own), "accuracy": float((weight * own).mean())}
        line["standard_error"] = float(own.std(ddof=0)) / math.sqrt(len(own))
        lines.append(line | shared.estimate(change, "difference", seed))
    errors = np.array([line["standard_error"] for line in lines[:-2]])
    lines[-1]["standard_error"] = math.sqrt((errors**2).sum()) / len(errors)
    return lines


def main(args: Args) -> None:
    named = shared.read_named(args.runs, "--runs", "NAME=DIR")
    samples = {name: read_samples(Path(folder), args.metric) for name, folder in named.items()}
    (name, first), *others = samples.items()
    tables = {name: summarize(name, first["value"], None, args.seed)}
    for other, found in others:
        same = found["digests"].equals(first["digests"])
        check(same, f"{other} and {name} were asked other questions or in other prompts; run lm_eval alike for both")
        tables[other] = summarize(other, found["value"], first["value"], args.seed)
    text = shared.render_page("mmlu.md", tables=tables, micro=MICRO, macro=MACRO)
    path = shared.write_table(args.output_dir, "mmlu", text, [row for rows in tables.values() for row in rows])
    print(f"{text}\n\nwrote {path} and .csv")


if __name__ == "__main__":
    common.run_stage(main, Args)
