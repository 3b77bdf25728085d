"""eval/: the before-and-after table."""

import before_after
from conftest import run_script, scored_row, write_rows


def test_means_are_over_prompts_not_responses():
    groups = [[[2, 4], [4, 4], None], [[9, 1]], [None]]
    assert before_after.prompt_means(groups) == [(3, 4), (9, 1)]
    assert before_after.mean_and_error([3, 9]) == "6.00 ± 3.00"
    assert before_after.mean_and_error([3]) == "3.00" and before_after.mean_and_error([]) == "–"


def test_table_of_two_runs(tmp_path):
    base = [scored_row(f"p{i}", [[2 + i, 5], [4 + i, 5]], [9, 6]) for i in range(3)]
    trained = [scored_row(f"p{i}", [[7, 7], [8, 8]], None) for i in range(1, 4)]
    write_rows(tmp_path / "base" / "03_refined.jsonl", base)
    write_rows(tmp_path / "trained" / "02_scores.jsonl", trained)
    options = ("--base_run", tmp_path / "base", "--trained_run", tmp_path / "trained")
    done = run_script("eval/before_after.py", *options)
    assert done.returncode == 0, done.stderr
    lines = {line[:18].strip(): line[18:].split() for line in done.stdout.splitlines()}
    assert "over 2 held-out prompts" in done.stdout, "the prompts that both runs have"
    assert lines["base, sampled"] == ["4.50", "±", "0.50", "5.00", "±", "0.00", "4"]
    assert lines["base, refined"] == ["9.00", "±", "0.00", "6.00", "±", "0.00", "2"]
    assert lines["trained, sampled"] == ["7.50", "±", "0.00", "7.50", "±", "0.00", "4"]
    assert "question p1" in done.stdout and "p2 answer 0" in done.stdout
    write_rows(tmp_path / "trained" / "02_scores.jsonl", trained[-1:])
    done = run_script("eval/before_after.py", *options)
    assert done.returncode == 2 and "no prompt in common" in done.stderr


def test_nothing_read_is_said_plainly(tmp_path):
    write_rows(tmp_path / "03_refined.jsonl", [scored_row("p", [None], None)])
    write_rows(tmp_path / "02_scores.jsonl", [scored_row("p", [None], None)])
    done = run_script("eval/before_after.py", "--base_run", tmp_path, "--trained_run", tmp_path)
    assert done.returncode == 0 and "–" in done.stdout, done.stderr
