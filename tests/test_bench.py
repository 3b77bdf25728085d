"""The benchmarks run, on a tiny model; what they measure there means nothing, but the counted calls."""

import re

import pytest
from conftest import run_script


def test_generate(tiny):
    options = ("--prompts", 3, "--n", 2, "--max_new_tokens", 5, "--repeats", 1, "--threads", 1)
    done = run_script("bench/generate.py", "--model", tiny(), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    rates = re.findall(r"^  (\S.*?) +([\d.]+) useful tokens/s \(median of", done.stdout, re.M)
    assert [name for name, _ in rates] == ["stage 1", "generate", "stage 3", "generate"]
    assert all(float(rate) > 0 for _, rate in rates)
    assert done.stdout.count("times generate in batches of 8") == 2


def test_score(tiny):
    options = ("--responses", 10, "--words", 12, "--repeats", 1, "--threads", 1)
    done = run_script("bench/score.py", "--model", tiny(), *options)
    assert done.returncode == 0, done.stderr[-2000:]
    read = dict(re.findall(r"^  (\w+) .*read (\d+) of 10$", done.stdout, re.M))
    assert read == {"expected": "10", "constrained": "10", "json": "0"}  # random weights write no JSON


def test_load(tiny):
    sizes = ("--done", 40, "--prompts", 60, "--pairs", 80)
    done = run_script("bench/load.py", "--model", tiny(), *sizes, "--n", 3, "--words", 12)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = re.findall(r"^\| (0\d .*?) \| (\d+) \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \| (\d+) \|", done.stdout, re.M)
    assert [(name, int(small), int(large)) for name, small, _, _, large in rows] == [
        ("01 until its first new row", 4, 40), ("01 whole", 4, 40), ("04 whole", 6, 60), ("05 whole", 6, 60),
        ("06 read_pairs", 8, 80), ("06 and group_pairs", 8, 80),
    ]  # fmt: skip
    assert all(float(memory) > 0 for *_, memory, _ in rows) and float(rows[0][2]) < float(rows[1][2]) + 5


def test_scale():
    done = run_script("bench/scale.py", "--sizes", 4, 8, "--n", 3, "--words", 30)
    assert done.returncode == 0, done.stderr[-2000:]
    calls = re.findall(r"^\| (0[1-3]\w+) \| (\d+) \|", done.stdout, re.M)[-3:]
    assert calls == [("01_sample", "3"), ("02_score", "3"), ("03_refine", "2")]
    # 8 operations × 8e9 weights × 4 responses of 33 words, 44 tokens, a prompt counted in, on 8 × 4e14 a second
    hours = float(re.search(r"^\| 06_train .* \| ([\d.]+) \| calculated", done.stdout, re.M)[1])
    assert hours == pytest.approx(8 * 8e9 * 4 * 44 / 4e14 / 8 / 3600 * 1e6, abs=0.6)


def test_a_prompt_passes_few_functions(tiny):
    done = run_script("bench/calls.py", "--model", tiny())
    assert done.returncode == 0, done.stderr[-2000:]
    functions, depth = map(
        int, re.search(r"^rows: (\d+) functions of the kit, (\d+) calls", done.stdout, re.M).groups()
    )
    assert 15 < functions <= 35 and 3 < depth <= 7
    for name in ("01_sample.py: main.sample", "common.py: map_rows", "common.py: generate", "common.py: draw_tokens"):
        assert re.search(rf"^  rows, .*: {name}$", done.stdout, re.M), name  # it looked at something


def test_train_against_trl(tiny):
    """Also a test of stage 6: its loss and gradient are those of TRL's whole trainer, tokens and all."""
    pytest.importorskip("trl")
    options = ("--prompts", 2, "--batch_size", 2, "--repeats", 1, "--trl_batches", 3, "--tokens", 13, 40)
    done = run_script("bench/train_vs_trl.py", "--model", tiny("bos"), *options)  # TRL adds one
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.count("ratio of the medians") == 2
    losses = [float(x) for x in re.findall(r"relative difference ([\d.e+-]+)\n", done.stdout)]
    assert len(losses) == 4 and max(losses) < 1e-4
