"""Stages 1 to 3 on several processes, and all killed at every file event: the same bytes in the end."""

import json
import random
import shutil

import pytest
from conftest import COMMANDS, FILES, copy_run, count_rows, wait
from forked import Launch, check_kills

import common


def run(stage, run_dir, processes=1):
    code, out, err = Launch(f"{stage}.py", "--run_dir", run_dir, *COMMANDS[stage], processes=processes).finish()
    assert code == 0, err[-3000:]
    return out


def test_two_and_three_processes_write_the_same_files(finished, tmp_path):
    for processes in (2, 3):
        run_dir = tmp_path / str(processes)
        for stage, file in FILES.items():
            out = run(stage, run_dir, processes)
            assert out.count("wrote ") == 1 and out.count(f"{stage.replace('_', ' ')}: ") == 1, "one of them reports"
            assert (run_dir / file).read_bytes() == (finished[0] / file).read_bytes()
        if processes == 2:
            assert run("01_sample", run_dir, processes).count("is complete already") >= 1
        assert {path.suffix for path in run_dir.glob(".*")} <= {".lock"}, "nothing else is left beside the files"


KILLS = [(stage, (), 12, 10) for stage in FILES] + [
    ("04_denoise", (), 4, 2),
    ("04_denoise", ("--ddof", "1", "--overwrite"), 4, 2),
    ("05_pairs", (), 4, 2),
    ("05_pairs", ("--refined_only", "--overwrite"), 4, 2),
    ("06_train", ("--alpha", "2", "--batch_size", "3", "--save_steps", "1", "--overwrite"), 20, 10),
]


@pytest.mark.parametrize(("stage", "other", "kills", "refusals"), KILLS)
def test_killed_at_every_file_event(finished, tmp_path, stage, other, kills, refusals):
    """FAULTS 32 and 33: the same bytes in the end, whether it begins, or is made again with other options."""
    command = copy_run(finished, tmp_path / "start", stage, itself=bool(other))
    if stage == "06_train":
        shutil.copytree(finished[0] / "06_model", tmp_path / "start" / "06_model")
    found = check_kills(stage, tmp_path / "start", (*command[2:], *other), tmp_path)
    assert found[0] > kills and found[1] > refusals, "it has looked at something"


@pytest.mark.parametrize("stage", FILES)
def test_overwrite_killed_leaves_nothing_that_looks_whole(finished, tmp_path, stage):
    """FAULTS 33: what is kept is the old run or the new one; between them the next stage refuses the file."""
    refused, old = 0, (finished[0] / FILES[stage]).read_bytes()
    for event in range(1, 11):
        run_dir = tmp_path / str(event)
        command = copy_run(finished, run_dir, stage, itself=True)
        Launch(f"{stage}.py", *command, "--overwrite", "--seed", "7", kill=(event, str(run_dir))).finish()
        record = json.loads((run_dir / f"{stage[:2]}_args.json").read_text())
        path, seed = run_dir / FILES[stage], record["args"]["seed"]
        there = path.read_bytes() if path.exists() else b""
        assert seed == 7 or there in (old, b"")
        if record["complete"]:
            assert seed == 0 and there == old
            continue
        refused += 1
        kept = seed == 7 and {*there.splitlines()} & {*old.splitlines()}
        assert not kept or stage == "02_score", "they would count as done; its scores have no seed"
        with pytest.raises(common.UserError, match="has not finished"):
            common.made_by(run_dir / FILES[stage])
    assert refused >= 3


def test_killed_at_any_moment_on_two_processes(finished, tmp_path):
    for stage, file in FILES.items():
        run_dir = tmp_path / stage
        command, rng, kept, kills = copy_run(finished, run_dir, stage), random.Random(stage), 0, 0
        for _ in range(3):
            launch = Launch(f"{stage}.py", *command, processes=2)
            kills += launch.kill_when(lambda old=kept, path=run_dir / file: count_rows(path) > old, rng.random() * 0.02)
            rows = count_rows(run_dir / file)
            assert rows >= kept, "a row is lost"
            kept = rows
        assert kills, "no run was killed: this test would show nothing"
        run(stage, run_dir, 2)
        assert (run_dir / file).read_bytes() == (finished[0] / file).read_bytes()


def test_a_dead_process_stops_all_and_its_rows_stay(finished, tmp_path):
    for turn in range(30):  # until the second process is killed before it has ended
        run_dir = tmp_path / str(turn)
        output, command = run_dir / "01_samples.jsonl", copy_run(finished, run_dir, "01_sample")
        launch = Launch("01_sample.py", *command, processes=2)
        wait(lambda output=output: count_rows(output))
        launch.running[1].kill()
        if launch.finish()[0] != 0:
            break
    else:
        pytest.fail("the second process was always done first: this test would show nothing")
    assert count_rows(output)
    run("01_sample", run_dir, 2)
    assert output.read_bytes() == (finished[0] / output.name).read_bytes()
