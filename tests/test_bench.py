"""The benchmarks run, on a tiny model; what they measure there means nothing."""

import re

import pytest
from conftest import run_script


def test_generate(tiny):
    options = ("--prompts", 3, "--n", 2, "--max_new_tokens", 5, "--repeats", 1)
    done = run_script("bench/generate.py", "--model", tiny(), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    rates = re.findall(r"(stage 1|batches|one by one) +([\d.]+) useful tokens/s \(median of 1\)", done.stdout)
    assert [name for name, _ in rates] == ["stage 1", "batches", "one by one"]
    assert all(float(rate) > 0 for _, rate in rates)


def test_generate_with_random_weights():
    options = ("--prompts", 3, "--n", 2, "--max_new_tokens", 20, "--repeats", 1, "--slow_repeats", 0)
    for mean_length in (4, 0):
        shape = ("--shape", "tiny", "--mean_length", mean_length)
        done = run_script("bench/generate.py", *shape, *options)
        assert done.returncode == 0, done.stderr[-2000:]
        named = re.findall(r"^  (\S.*?) +[\d.]+ useful tokens/s \(", done.stdout, re.M)
        assert named == ["stage 1", "batches"]
        assert "tiny, 3 prompts × 2, up to 20 tokens" in done.stdout


def test_train_against_trl(tiny):
    """Also a test of stage 6: its loss and gradient are those of TRL's whole trainer, tokens and all."""
    pytest.importorskip("trl")
    options = ("--prompts", 2, "--batch_size", 2, "--repeats", 1, "--trl_batches", 3)
    done = run_script("bench/train_vs_trl.py", "--model", tiny("bos"), *options)  # TRL adds one
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.count("ratio of the medians") == 2
    losses = [float(x) for x in re.findall(r"relative difference ([\d.e+-]+)\n", done.stdout)]
    assert len(losses) == 4 and max(losses) < 1e-4


def test_score(tiny):
    options = ("--responses", 10, "--words", 12, "--repeats", 1, "--teach", 1)
    done = run_script("bench/score.py", "--model", tiny(), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "read: stage 2 10, json 0 of 10" in done.stdout
    total = int(re.search(r"judge prompts of (\d+) tokens", done.stdout).group(1))
    shared = re.search(r"distinct tokens: (\d+) in the prompts, (\d+) with the JSON", done.stdout)
    distinct, whole = map(int, shared.groups())
    assert 0 < distinct < whole < total / 2
