"""Stage 6 killed with SIGKILL goes on from its last checkpoint and ends with the same bytes."""

import importlib
import shutil

import pytest
import yaml
from conftest import ROOT, count_rows, read_rows, write_rows
from forked import Launch
from test_06_train import make_pairs

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


def kill_after(launch, metrics_file, rows, wait=0.0) -> bool:
    """SIGKILL to all processes once the metrics file has so many rows; False if the run was over before."""
    return launch.kill_when(lambda: count_rows(metrics_file) >= rows, wait)


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
    kills = 0
    for rows in (3, 6, 10, 11):
        kills += kill_after(start(killed, *options, kind=kind), killed / "06_metrics.jsonl", rows)
    assert kills >= 3, "no run was killed: this test would show nothing"
    code, out, err = start(killed, *options, kind=kind).finish()
    assert code == 0 and "going on from step" in out, err
    assert result_of(killed) == result_of(whole)
    assert not (killed / "06_checkpoints").exists(), "they go when the model is there"


def test_a_kill_at_any_moment_of_a_save_loses_nothing(tiny, tmp_path):
    whole, killed = make_run(tmp_path / "whole"), make_run(tmp_path / "killed")
    options = (tiny(), "--save_steps", "1")  # nearly all the time is spent in saving
    assert start(whole, *options).finish()[0] == 0
    reached = kills = 0
    for attempt in range(12):
        kills += kill_after(start(killed, *options), killed / "06_metrics.jsonl", reached + 3, 0.003 * attempt)
        saved = [int(p.name) for p in (killed / "06_checkpoints").glob("[0-9]*")]
        assert not saved or max(saved) >= reached, "a checkpoint is lost"
        reached = max(saved, default=reached)
    assert reached > 5 and kills > 3
    assert start(killed, *options).finish()[0] == 0
    assert result_of(killed) == result_of(whole)


def test_killed_at_every_file_event(tiny, call, tmp_path):
    """FAULTS 32 and 33: --overwrite, killed, goes on to the same bytes; between, no stage takes the model before."""
    options = (tiny(), "--save_steps", "1", "--epochs", "1")  # two checkpoints
    old, new = make_run(tmp_path / "old"), make_run(tmp_path / "new")
    for folder, some in ((old, ()), (new, ("--alpha", "2"))):
        assert start(folder, *options, *some).finish()[0] == 0
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Why?"}])
    event, kills, refusals, killed = 1, 0, 0, [True]
    while all(killed):
        folders, again = [shutil.copytree(old, tmp_path / str(e)) for e in (event, event + 1)], []  # two cores
        kill = [(e, str(folder)) for e, folder in enumerate(folders, event)]
        command = (*options, "--alpha", "2", "--overwrite")
        launches = [start(folder, *command, kill=k) for folder, k in zip(folders, kill, strict=True)]
        killed = [launch.finish()[0] != 0 for launch in launches]
        for folder in folders:
            record = common.read_record(folder / "06_args.json")
            begun = record["args"]["alpha"] == 2
            if record["complete"]:
                assert result_of(folder) == result_of(new if begun else old)
            elif (folder / "06_model").exists():
                refusals += 1
                answers = ("--model", folder / "06_model", "--prompts", prompts, "--run_dir", tmp_path / "answers")
                assert "06_train.py has not finished" in call("01_sample", *answers)[2]
            again.append(start(folder, *command[: 7 if begun else 8]))
        assert [launch.finish()[0] for launch in again] == [0, 0], [launch.read("err") for launch in again]
        for folder in folders:
            assert result_of(folder) == result_of(new) and not (folder / "06_checkpoints").exists()
            assert {path.suffix for path in folder.glob(".*")} == {".lock"}, "no partial files stay behind"
            shutil.rmtree(folder)
        kills, event = kills + sum(killed), event + 2
    assert kills > 20 and refusals > 10, "it has looked at something"


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tiny, tmp_path):
    """FAULTS 34: what it says is true in stage 6 too."""
    whole, full = make_run(tmp_path / "whole"), make_run(tmp_path / "full")
    assert start(whole, tiny()).finish()[0] == 0
    assert kill_after(start(full, tiny()), full / "06_metrics.jsonl", 7)
    (saved,) = (full / "06_checkpoints").glob("[0-9]*")
    limit = max(p.stat().st_size for p in saved.iterdir()) // 2  # writes beyond it fail, as on a full disk
    code, _, err = start(full, tiny(), limit=limit).finish()
    assert code == 2 and "Traceback" not in err
    assert "can't be written: " in err and "make room and run the same command again" in err
    assert saved.exists() and not list((full / "06_checkpoints").glob(".*"))
    assert start(full, tiny()).finish()[0] == 0
    assert result_of(full) == result_of(whole)


def interrupt(monkeypatch, step):
    """The next run in this process stops with an error in this step."""
    original, calls = train.train_step, []

    def stop(*arguments):
        calls.append(1)
        common.check(len(calls) < step, "stopped by the test")
        return original(*arguments)

    monkeypatch.setattr(train, "train_step", stop)


def test_other_arguments_do_not_resume(tiny, call, tmp_path, monkeypatch):
    """FAULTS 37: only what changes memory may."""
    run_dir = make_run(tmp_path)
    command = ("06_train", "--run_dir", run_dir, "--model", tiny(), *OPTIONS)
    with monkeypatch.context() as patch:
        interrupt(patch, 7)
        assert "stopped by the test" in call(*command)[2]
    code, _, err = call(*command, "--alpha", 2)
    assert code == 2 and "was made with --alpha 1.0, not 2.0" in err
    progress = next((run_dir / "06_checkpoints").glob("*/progress.json"))
    text = progress.read_text()
    progress.write_text(text.replace("1 processes (NO)", "8 processes (FSDP)"))
    code, _, err = call(*command)
    assert code == 2 and "was written by 8 processes (FSDP), this is 1 processes (NO)" in err
    progress.write_text(text)
    code, out, err = call(*command, "--tokens_per_batch", 5000, "--save_steps", 0)
    assert code == 0 and "going on from step 4 of 18" in out, "what does not change the result may change"


def test_overwrite_starts_over(tiny, call, tmp_path, monkeypatch):
    run_dir = make_run(tmp_path)
    command = ("06_train", "--run_dir", run_dir, "--model", tiny(), *OPTIONS)
    with monkeypatch.context() as patch:
        interrupt(patch, 7)
        call(*command)
    assert list((run_dir / "06_checkpoints").iterdir())
    code, out, _ = call(*command, "--overwrite")
    assert code == 0 and "going on" not in out
    assert [row["step"] for row in read_rows(run_dir / "06_metrics.jsonl")] == [*range(19), 18]


def stopped(tiny, call, tmp_path, monkeypatch):
    """(run directory, command) of a run that stopped in step 7, after its checkpoint of step 4."""
    run_dir = make_run(tmp_path)
    command = ("06_train", "--run_dir", run_dir, "--model", tiny(), *OPTIONS)
    with monkeypatch.context() as patch:
        interrupt(patch, 7)
        assert "stopped by the test" in call(*command)[2]
    return run_dir, command


def test_stray_files_beside_a_checkpoint_are_left_alone(tiny, call, tmp_path, monkeypatch):
    """FAULTS 40."""
    run_dir, command = stopped(tiny, call, tmp_path, monkeypatch)
    (run_dir / "06_checkpoints" / "000099").write_text("a file with the name of a step")
    (run_dir / "06_checkpoints" / "0notes").mkdir()
    (run_dir / "06_checkpoints" / ".DS_Store").write_text("")
    code, out, err = call(*command)
    assert code == 0 and "going on from step 4" in out, err
    left = {path.name for path in (run_dir / "06_checkpoints").iterdir()}
    assert left == {"000099", "0notes", ".DS_Store"}, "only the stage's own folders go"


@pytest.mark.parametrize("damage", ["no progress", "no object", "cut weights", "cut optimizer"])
def test_a_damaged_checkpoint_is_one_line_that_names_its_folder(tiny, call, tmp_path, monkeypatch, damage):
    """FAULTS 40: without progress.json, or with cut files."""
    run_dir, command = stopped(tiny, call, tmp_path, monkeypatch)
    folder = run_dir / "06_checkpoints" / "000004"
    if damage == "no progress":
        (folder / "progress.json").unlink()
    elif damage == "no object":
        (folder / "progress.json").write_text("[]")
    else:
        file = folder / ("model.safetensors" if damage == "cut weights" else "optimizer.bin")
        file.write_bytes(file.read_bytes()[:1000])
    code, _, err = call(*command)
    assert (
        code == 2 and "Traceback" not in err and f"{folder}" in err and "remove that folder to go on without it" in err
    )
    shutil.rmtree(folder)
    code, out, err = call(*command)
    assert code == 0 and "going on" not in out, err


def test_a_checkpoint_of_an_overwritten_run_is_not_taken(tiny, call, tmp_path, monkeypatch):
    """FAULTS 33: --overwrite with other arguments, killed before the old checkpoint went; then without --overwrite."""
    run_dir, command = stopped(tiny, call, tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(train, "remove_checkpoints", lambda folder: common.check(False, "killed"))
        assert "killed" in call(*command, "--alpha", 2, "--overwrite")[2]
    code, out, err = call(*command, "--alpha", 2)
    assert code == 0 and "going on" not in out, err
    assert [row["step"] for row in read_rows(run_dir / "06_metrics.jsonl")] == [*range(19), 18]
    assert not (run_dir / "06_checkpoints").exists()
