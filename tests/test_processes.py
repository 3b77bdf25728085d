"""Stage 6 on two processes: the weights of one, plainly (DDP) and sharded (FSDP2)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, read_rows, write_rows
from forked import Launch
from safetensors.torch import load_file
from test_06_train import make_pairs
from transformers import AutoModelForCausalLM

OPTIONS = ("--learning_rate", "1e-3", "--batch_size", "3", "--epochs", "2", "--tokens_per_batch", "120")


def launch_command(config: str, folder: Path, precision: str = "no") -> list[str]:
    """accelerate launch with a file of configs/, on two processes of this CPU."""
    text = (ROOT / "configs" / config).read_text()
    text = re.sub(r"(?m)^num_processes: \d+", "num_processes: 2", text)
    text = re.sub(r"(?m)^mixed_precision: .*", f'mixed_precision: "{precision}"', text)
    (folder / config).write_text(text)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / config)]
    return launch + ([str(ROOT / "tests" / "sharded_on_cpu.py")] if config.startswith("fsdp") else [])


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """run(name, launch file, script options) -> (weights, metrics); 7 prompts, so batches are ragged."""
    run_dir = tmp_path_factory.mktemp("processes")
    write_rows(run_dir / "05_pairs.jsonl", make_pairs(7))

    def run(name: str, config: str | None, *options: str, precision: str = "no", processes: int = 1):
        folder = run_dir / name
        arguments = ["--run_dir", run_dir, "--model", tiny(), "--output_dir", folder, *OPTIONS, *options]
        if config:
            launch = [*launch_command(config, run_dir, precision), "06_train.py"]
            settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            pipes = {"capture_output": True, "text": True, "timeout": 300}
            done = subprocess.run([*launch, *map(str, arguments)], cwd=ROOT, env=os.environ | settings, **pipes)
            code, out, err = done.returncode, done.stdout, done.stderr
        else:
            code, out, err = Launch("06_train.py", *arguments, processes=processes).finish()
        assert code == 0, err[-3000:]
        assert f"processes: {2 if config else processes}, mixed precision: {precision}" in out
        assert out.count("wrote ") == out.count("the trained model:") == 1
        AutoModelForCausalLM.from_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        assert {str(value.dtype) for value in weights.values()} == {"torch.float32"}
        return weights, read_rows(run_dir / f"{name}_metrics.jsonl")

    return run


def distance(a: dict, b: dict) -> float:
    assert set(a) == set(b) and len(a) > 10
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize(
    "options", [(), ("--gap_mean", "batch", "--alpha", "2"), ("--loss", "sft"), ("--lora_rank", "4")], ids=str
)
def test_two_processes_equal_one(runs, options):
    name = "_".join(option.strip("-") for option in options) or "spa"
    one, metrics = runs(f"one_{name}", None, *options)
    how = (None, *options) if options else ("cpu2.yaml",)  # one as a user launches it, the others faster
    two, metrics_of_two = runs(f"two_{name}", *how, processes=2)
    assert distance(one, two) < 1e-6
    for a, b in zip(metrics, metrics_of_two, strict=True):
        assert a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6) for key in a)


def test_sharded_weights_equal_whole_ones(runs):
    one, _ = runs("one_fsdp", None)
    sharded, _ = runs("fsdp", "fsdp.yaml", "--gradient_checkpointing")
    assert distance(one, sharded) < 1e-6
    half, metrics = runs("fsdp_bf16", "fsdp.yaml", precision="bf16")
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"], "bfloat16 compute, float32 weights"
    assert 0 < distance(one, half) < 0.1, "computed in bfloat16"
