"""eval/mmlu_table.py: lm_eval's samples, paired differences, and what is refused."""

import json

import mmlu_table
import pytest
from conftest import write_rows
from eval_helpers import csv_rows, refuse, succeed


def samples(folder, right: dict, date="2026-11-25T23-54-14.597320", prompt="p"):
    """A folder as lm_eval 0.4.13 leaves it: right[task] has 1 or 0 for each question."""
    for task, values in right.items():
        rows = [
            {"doc_id": i, "doc": {"question": f"{i}?"}, "target": "0", "filter": "none", "metrics": ["acc"]}
            | {"prompt_hash": f"{prompt}{i}", "target_hash": "t", "acc": float(value)}
            for i, value in enumerate(values)
        ]
        write_rows(folder / "org__name" / f"samples_{task}_{date}.jsonl", rows)
    return folder


def test_accuracies_and_paired_differences_by_hand(call, tmp_path):
    base = samples(tmp_path / "base", {"mmlu_anatomy": [1, 0, 0, 1], "mmlu_virology": [0, 0]})
    spa = samples(tmp_path / "spa", {"mmlu_anatomy": [1, 1, 0, 1], "mmlu_virology": [1, 0]})
    samples(tmp_path / "spa", {"mmlu_virology": [0, 0]}, date="2026-11-24T00-00-00.000001")  # an older run
    out = succeed(call, "mmlu_table", "--runs", f"V={base}", f"S={spa}", "--output_dir", tmp_path / "out")
    rows = csv_rows(tmp_path / "out" / "mmlu.csv", "model", "task")
    value = lambda model, task, name="accuracy": float(rows[model, task][name])  # noqa: E731
    assert value("V", "mmlu_anatomy") == 0.5 and value("S", "mmlu_virology") == 0.5
    assert value("V", mmlu_table.MICRO) == pytest.approx(2 / 6) and value("V", mmlu_table.MACRO) == 0.25
    assert value("S", mmlu_table.MICRO) == pytest.approx(4 / 6) and value("S", mmlu_table.MACRO) == 0.625
    assert value("S", mmlu_table.MICRO, "difference") == pytest.approx(2 / 6)
    assert value("S", mmlu_table.MACRO, "difference") == pytest.approx(0.375)
    low, high = (value("S", mmlu_table.MICRO, f"difference_{end}") for end in ("low", "high"))
    assert 0 <= low < 2 / 6 < high < 1
    # √(p (1 − p) / n), and over the tasks √(Σ se²) / 2
    assert value("V", "mmlu_anatomy", "standard_error") == pytest.approx((0.25 / 4) ** 0.5)
    errors = (0.75 * 0.25 / 4 + 0.25 / 2) ** 0.5 / 2
    assert value("S", mmlu_table.MACRO, "standard_error") == pytest.approx(errors)
    assert "| V " in out and "33.3 ± 19.2" in out and "+33.3 [" in out and "minus V" in out
    out = succeed(call, "mmlu_table", "--runs", base, "--output_dir", tmp_path / "out")
    assert "minus" not in out, "one model has no difference"


def test_what_is_refused_is_one_line(call, tmp_path):
    right = {"mmlu_anatomy": [1] * 4, "mmlu_virology": [1] * 2}
    base = samples(tmp_path / "base", right)
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "samples_x.jsonl").write_text("{}")
    bad = samples(tmp_path / "bad", {"mmlu_anatomy": [1]})
    file = next(bad.rglob("*.jsonl"))
    cases = [
        ([], "at least one is wanted"),
        ([base, f"base={base}"], "'base' twice"),
        ([tmp_path / "empty"], "run lm_eval with --log_samples"),
        ([tmp_path / "odd"], "samples_TASK_DATE.jsonl"),
        ([base, samples(tmp_path / "less", {"mmlu_anatomy": [1] * 4})], "other questions or in other prompts"),
        ([base, samples(tmp_path / "shots", right, prompt="q")], "other questions or in other prompts"),
        ([base, "--metric", "exact_match"], "no number 'exact_match'"),
    ]
    for runs, said in cases:
        refuse(call, "mmlu_table", said, *(["--runs", *runs] if runs else []), "--output_dir", tmp_path)
    for text, said in (("{", "line 1: broken JSON"), (json.dumps({"acc": 1}), "line 1: not a row of lm_eval's")):
        file.write_text(text)
        refuse(call, "mmlu_table", said, "--runs", bad, "--output_dir", tmp_path)
