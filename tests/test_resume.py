"""Stage 6 killed with SIGKILL goes on from its last checkpoint and ends with the same bytes."""

import importlib
import itertools
import shutil

import pytest
import yaml
from conftest import ROOT, count_rows, read_rows, write_rows
from forked import Launch
from test_06_train import ADAPTER, make_pairs

import common

train = importlib.import_module("06_train")


# 7 prompts, 3 a step, 6 epochs: 18 steps; ragged batches, several passes a step
OPTIONS = ("--learning_rate", "1e-3", "--batch_size", "3", "--epochs", "6")
OPTIONS += ("--tokens_per_batch", "200", "--save_steps", "4")


def make_run(folder):
    write_rows(folder / "05_pairs.jsonl", make_pairs(7))
    return folder


def start(run_dir, model, *options, kind="one process", **limits):
    script, environment = ["06_train.py"], {}
    if kind == "FSDP2":  # what accelerate launch makes of the file
        settings = yaml.safe_load((ROOT / "configs" / "fsdp.yaml").read_text())
        script = ["tests/sharded_on_cpu.py", "06_train.py"]
        environment = {key.upper(): str(value).lower() for key, value in settings["fsdp_config"].items()}
        environment |= {"ACCELERATE_USE_FSDP": "true"}
        for key in ("FSDP_AUTO_WRAP_POLICY", "FSDP_STATE_DICT_TYPE"):
            environment[key] = environment[key].upper()
    arguments = ["--run_dir", run_dir, "--model", model, *OPTIONS, *options]
    processes = 1 if kind == "one process" else 2
    return Launch(*script, *arguments, processes=processes, **limits, **environment)


def result_of(run_dir):
    return (run_dir / "06_model" / "model.safetensors").read_bytes(), (run_dir / "06_metrics.jsonl").read_bytes()


@pytest.mark.parametrize("kind", ["one process", "DDP", "FSDP2"])
def test_killed_runs_end_like_a_whole_one(tiny, tmp_path, kind):
    whole, killed = make_run(tmp_path / "whole"), make_run(tmp_path / "killed")
    options = (tiny(), "--eval_fraction", "0.2", "--loss", "dpo", "--beta", "0.1")
    code, out, err = start(whole, *options, kind=kind).finish()
    assert code == 0 and "going on" not in out, err
    assert len(read_rows(whole / "06_metrics.jsonl")) > 12
    # before the first checkpoint, right after one, between two, in the first step after going on
    kills, metrics = 0, killed / "06_metrics.jsonl"
    for rows in (3, 6, 10, 11):
        kills += start(killed, *options, kind=kind).kill_when(lambda rows=rows: count_rows(metrics) >= rows)
    assert kills >= 3, "no run was killed: this test would show nothing"
    code, out, err = start(killed, *options, kind=kind).finish()
    assert code == 0 and "going on from step" in out, err
    assert result_of(killed) == result_of(whole)
    assert not (killed / "06_checkpoints").exists(), "they go when the model is there"


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tiny, tmp_path):
    """FAULTS 34: what it says is true in stage 6 too."""
    whole, full = make_run(tmp_path / "whole"), make_run(tmp_path / "full")
    assert start(whole, tiny()).finish()[0] == 0
    assert start(full, tiny()).kill_when(lambda: count_rows(full / "06_metrics.jsonl") >= 7)
    (saved,) = (full / "06_checkpoints").glob("[0-9]*")
    limit = max(p.stat().st_size for p in saved.iterdir()) // 2  # writes beyond it fail, as on a full disk
    code, _, err = start(full, tiny(), limit=limit).finish()
    assert code == 2 and "Traceback" not in err
    assert "can't be written: " in err and "make room and run the same command again" in err
    assert saved.exists() and not list((full / "06_checkpoints").glob(".*"))
    assert start(full, tiny()).finish()[0] == 0
    assert result_of(full) == result_of(whole)


@pytest.fixture
def stop(call, monkeypatch):
    """stop(step, *command) runs stage 6 up to the beginning of a step, from 1."""

    def run(step: int, *command) -> None:
        original, steps = train.train_step, itertools.count(1)

        def train_step(*arguments):
            common.check(next(steps) < step, "stopped by the test")
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", train_step)
            assert "stopped by the test" in call(*command)[2]

    return run


@pytest.fixture
def stopped(tiny, stop, tmp_path):
    """(run directory, command) of a run that stopped in step 7, after its checkpoint of step 4."""
    command = ("06_train", "--run_dir", make_run(tmp_path), "--model", tiny(), *OPTIONS)
    stop(7, *command)
    assert list((tmp_path / "06_checkpoints").iterdir())
    return tmp_path, command


def test_an_adapter_goes_on_from_its_checkpoint(tiny, ok, stop, tmp_path):
    pytest.importorskip("peft")
    command = ("06_train", "--run_dir", make_run(tmp_path), "--model", tiny(), *ADAPTER, "--save_steps", 2)
    ok(*command, "--output_dir", tmp_path / "whole" / "06_model")
    stop(4, *command)
    assert "going on from step 2" in ok(*command)[0]
    a, b = ((folder / "06_model" / "model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "whole"))
    assert a == b


def test_other_arguments_do_not_resume(stopped, ok, fails):
    """FAULTS 37: only what changes memory may."""
    run_dir, command = stopped
    fails("was made with --alpha 1.0, not 2.0", *command, "--alpha", 2)
    progress = next((run_dir / "06_checkpoints").glob("*/progress.json"))
    text = progress.read_text()
    progress.write_text(text.replace("1 processes (NO)", "8 processes (FSDP)"))
    fails("was written by 8 processes (FSDP), this is 1 processes (NO)", *command)
    progress.write_text(text)
    out, _ = ok(*command, "--tokens_per_batch", 5000, "--save_steps", 0)
    assert "going on from step 4 of 18" in out, "what does not change the result may change"


def test_stray_files_beside_a_checkpoint_are_left_alone(stopped, ok):
    """FAULTS 40."""
    folder = stopped[0] / "06_checkpoints"
    (folder / "000099").write_text("a file with the name of a step")
    (folder / "0notes").mkdir()
    (folder / ".DS_Store").write_text("")
    assert "going on from step 4" in ok(*stopped[1])[0]
    left = {path.name for path in folder.iterdir()}
    assert left == {"000099", "0notes", ".DS_Store"}, "only the stage's own folders go"


@pytest.mark.parametrize(
    ("file", "content"),  # None: as it was, cut
    [("progress.json", ""), ("progress.json", "[]"), ("model.safetensors", None), ("optimizer.bin", None)],
)
def test_a_damaged_checkpoint_is_one_line_that_names_its_folder(stopped, ok, fails, file, content):
    """FAULTS 40: without progress.json, or with cut files."""
    run_dir, command = stopped
    folder = run_dir / "06_checkpoints" / "000004"
    (folder / file).write_bytes((folder / file).read_bytes()[:1000] if content is None else content.encode())
    if content == "":
        (folder / file).unlink()
    assert str(folder) in fails("remove that folder to go on without it", *command)[1]
    shutil.rmtree(folder)
    assert "going on" not in ok(*command)[0]


def test_a_checkpoint_of_an_overwritten_run_is_not_taken(stopped, ok, fails, monkeypatch):
    """FAULTS 33: --overwrite with other arguments, killed before the old checkpoint went; then without --overwrite."""
    run_dir, command = stopped
    with monkeypatch.context() as patch:
        patch.setattr(train, "remove_checkpoints", lambda folder: common.check(False, "killed"))
        fails("killed", *command, "--alpha", 2, "--overwrite")
    assert "going on" not in ok(*command, "--alpha", 2)[0]
    assert [row["step"] for row in read_rows(run_dir / "06_metrics.jsonl")] == [*range(19), 18]
    assert not (run_dir / "06_checkpoints").exists()
