"""The benchmarks run, on a tiny model; what they measure there means nothing, but the counted calls."""

import re

import pytest
from conftest import run_script


def bench(script: str, *options) -> str:
    """What a benchmark prints."""
    done = run_script(f"bench/{script}.py", *options)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def test_generate(tiny):
    options = ("--prompts", 3, "--n", 2, "--max_new_tokens", 5, "--repeats", 1, "--threads", 1)
    said = bench("generate", "--model", tiny(), *options)
    rates = re.findall(r"^  (\S.*?) +([\d.]+) useful tokens/s \(median of", said, re.M)
    assert [name for name, _ in rates] == ["stage 1", "generate", "stage 3", "generate"]
    assert all(float(rate) > 0 for _, rate in rates) and said.count("times generate in batches of 8") == 2


def test_score(tiny):
    options = ("--responses", 10, "--words", 12, "--repeats", 1, "--threads", 1)
    read = dict(re.findall(r"^  (\w+) .*read (\d+) of 10$", bench("score", "--model", tiny(), *options), re.M))
    assert read == {"expected": "10", "constrained": "10", "json": "0"}  # random weights write no JSON


def test_load(tiny):
    sizes = ("--done", 40, "--prompts", 60, "--pairs", 80)
    said = bench("load", "--model", tiny(), *sizes, "--n", 3, "--words", 12)
    rows = re.findall(r"^\| (0\d .*?) \| (\d+) \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \| (\d+) \|", said, re.M)
    assert [(name, int(small), int(large)) for name, small, _, _, large in rows] == [
        ("01 until its first new row", 4, 40), ("01 whole", 4, 40), ("04 whole", 6, 60), ("05 whole", 6, 60),
        ("06 read_pairs", 8, 80), ("06 and group_pairs", 8, 80),
    ]  # fmt: skip
    assert all(float(memory) > 0 for *_, memory, _ in rows) and float(rows[0][2]) < float(rows[1][2]) + 5


def test_scale():
    said = bench("scale", "--sizes", 4, 8, "--n", 3, "--words", 30)
    calls = re.findall(r"^\| (0[1-3]\w+) \| (\d+) \|", said, re.M)[-3:]
    assert calls == [("01_sample", "3"), ("02_score", "3"), ("03_refine", "2")]
    # 8 operations × 8e9 weights × 4 responses of 33 words, 44 tokens, a prompt counted in, on 8 × 4e14 a second
    hours = float(re.search(r"^\| 06_train .* \| ([\d.]+) \| calculated", said, re.M)[1])
    assert hours == pytest.approx(8 * 8e9 * 4 * 44 / 4e14 / 8 / 3600 * 1e6, abs=0.6)


def test_a_prompt_passes_few_functions(tiny):
    said = bench("calls", "--model", tiny())
    functions, depth = map(int, re.findall(r"^rows: (\d+) functions of the kit, (\d+) calls", said, re.M)[0])
    assert 15 < functions <= 35 and 3 < depth <= 7
    for name in ("01_sample.py: main.sample", "common.py: map_rows", "common.py: generate", "common.py: draw_tokens"):
        assert re.search(rf"^  rows, .*: {name}$", said, re.M), name  # it looked at something


def test_train_against_trl(tiny):
    """Also a test of stage 6: its loss and gradient are those of TRL's whole trainer, tokens and all."""
    pytest.importorskip("trl")
    options = ("--prompts", 2, "--batch_size", 2, "--repeats", 1, "--trl_batches", 3, "--tokens", 13, 40)
    said = bench("train_vs_trl", "--model", tiny("bos"), *options)  # TRL adds one
    losses = [float(x) for x in re.findall(r"relative difference ([\d.e+-]+)\n", said)]
    assert len(losses) == 4 and max(losses) < 1e-4 and said.count("ratio of the medians") == 2
