"""Stage 6 on two processes: the weights of one, plainly (DDP) and sharded (FSDP2), saved and reloaded."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, read_rows, write_rows
from safetensors.torch import load_file
from test_train import make_pairs
from transformers import AutoModelForCausalLM

OPTIONS = ("--learning_rate", "1e-3", "--batch_size", "3", "--epochs", "2", "--tokens_per_batch", "120")


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """run(name, launch options, script options) -> (weights, metrics); 7 prompts, so batches are ragged."""
    run_dir = tmp_path_factory.mktemp("processes")
    write_rows(run_dir / "05_pairs.jsonl", make_pairs(7))
    fsdp = (ROOT / "configs" / "fsdp.yaml").read_text()
    for precision in ("no", "bf16"):
        text = fsdp.replace("num_processes: 8", "num_processes: 2").replace("bf16", f'"{precision}"')
        (run_dir / f"fsdp_{precision}.yaml").write_text(text)

    def run(name: str, config: str | None, *options: str):
        launch = [sys.executable]
        if config:
            path = run_dir / config if (run_dir / config).exists() else ROOT / "configs" / config
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
            launch += [str(ROOT / "tests" / "sharded_on_cpu.py")] if "fsdp" in config else []
        folder = run_dir / name
        command = [*launch, "06_train.py", "--run_dir", run_dir, "--model", tiny(), "--output_dir", folder]
        command = [*map(str, command), *OPTIONS, *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"processes: {2 if config else 1}" in done.stdout and done.stdout.count("wrote ") == 1
        AutoModelForCausalLM.from_pretrained(folder)
        return load_file(folder / "model.safetensors"), read_rows(run_dir / f"{name}_metrics.jsonl")

    return run


def distance(a: dict, b: dict) -> float:
    assert set(a) == set(b) and len(a) > 10
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("options", [(), ("--gap_mean", "batch", "--alpha", "2"), ("--loss", "sft")], ids=str)
def test_two_processes_equal_one(runs, options):
    name = "_".join(option.strip("-") for option in options) or "spa"
    one, metrics = runs(f"one_{name}", None, *options)
    two, metrics_of_two = runs(f"two_{name}", "cpu2.yaml", *options)
    assert distance(one, two) < 1e-5
    for a, b in zip(metrics, metrics_of_two, strict=True):
        assert a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6) for key in a)


def test_sharded_weights_equal_whole_ones(runs):
    one, _ = runs("one_whole", None)
    sharded, _ = runs("sharded", "fsdp_no.yaml")
    assert distance(one, sharded) < 1e-5
    _, metrics = runs("sharded_bf16", "fsdp_bf16.yaml")
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"], "bfloat16 compute, float32 weights"
