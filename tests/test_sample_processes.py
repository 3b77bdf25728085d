"""Stages 1 to 3 on several processes, and killed at any moment: the same bytes as one that is left alone."""

import contextlib
import random
import shutil
import time

import pytest
from conftest import read_rows, write_rows
from forked import Launch

# several batches of several lengths
OPTIONS = {
    "01_sample": ("--n", "3", "--max_new_tokens", "24", "--batch_size", "6", "--system_prob", "0.4"),
    "02_score": ("--score_mode", "expected", "--batch_size", "6"),
    "03_refine": ("--attempts", "2", "--max_new_tokens", "16", "--batch_size", "4"),
}
FILES = {"01_sample": "01_samples.jsonl", "02_score": "02_scores.jsonl", "03_refine": "03_refined.jsonl"}


def begin(stage, run_dir, tiny, processes=1):
    prompts = ["--prompts", run_dir / "prompts.jsonl", "--model", tiny()] if stage == "01_sample" else []
    return Launch(f"{stage}.py", "--run_dir", run_dir, *OPTIONS[stage], *prompts, processes=processes)


def make_prompts(run_dir):
    rng = random.Random(0)
    words = ["why", "is", "this", "not", "safe", "to", "do", "at", "home"]
    prompts = [" ".join(rng.choices(words, k=rng.randint(2, 30))) for _ in range(16)]
    write_rows(run_dir / "prompts.jsonl", [{"id": i, "prompt": p} for i, p in enumerate(prompts)])
    return run_dir


def run(*arguments):
    code, out, err = begin(*arguments).finish()
    assert code == 0, err[-3000:]
    return out


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """The run directory that one process makes."""
    run_dir = make_prompts(tmp_path_factory.mktemp("alone"))
    for stage in FILES:
        run(stage, run_dir, tiny)
    return run_dir


def test_two_and_three_processes_write_the_same_files(tiny, alone, tmp_path):
    for processes in (2, 3):
        run_dir = make_prompts(tmp_path / str(processes))
        for stage, file in FILES.items():
            out = run(stage, run_dir, tiny, processes)
            assert out.count("wrote ") == 1, "one of them reports"
            assert (run_dir / file).read_bytes() == (alone / file).read_bytes()
        assert "is complete already" in run("01_sample", run_dir, tiny, processes)
        assert not list(run_dir.glob(".*")), "nothing is left beside the files"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", FILES)
def test_killed_at_ten_moments(tiny, alone, tmp_path, stage, processes):
    run_dir = tmp_path / "run"
    shutil.copytree(alone, run_dir)
    for file in (FILES[stage], f"{stage[:2]}_args.json"):
        (run_dir / file).unlink()
    rng, kept, kills = random.Random(stage), set(), 0
    for _ in range(10):
        launch = begin(stage, run_dir, tiny, processes)
        # where new rows are written
        kills += launch.kill_when(lambda old=kept: not rows_in(run_dir, stage) <= old, rng.random() * 0.02)
        rows = rows_in(run_dir, stage)
        assert rows >= kept, "a row is lost"
        kept = rows
    assert kills >= 3, "no run was killed: this test would show nothing"
    run(stage, run_dir, tiny, processes)
    assert (run_dir / FILES[stage]).read_bytes() == (alone / FILES[stage]).read_bytes()


def rows_in(run_dir, stage) -> set:
    """Ids of the whole rows in the files of all processes, which may be merged and deleted meanwhile."""
    files = [run_dir / FILES[stage], *run_dir.glob(f".{FILES[stage].removesuffix('.jsonl')}.process*.jsonl")]
    found = set()
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            found |= {line.split(b",")[0] for line in file.read_bytes().split(b"\n")[:-1]}
    return found


def test_a_dead_process_stops_all_and_its_rows_stay(tiny, alone, tmp_path):
    run_dir = make_prompts(tmp_path)
    launch = begin("01_sample", run_dir, tiny, 2)
    while not rows_in(run_dir, "01_sample"):
        time.sleep(0.001)
    launch.running[1].kill()
    assert launch.finish()[0] != 0
    done = rows_in(run_dir, "01_sample")
    assert done and len(done) < 16
    run("01_sample", run_dir, tiny, 2)
    assert (run_dir / "01_samples.jsonl").read_bytes() == (alone / "01_samples.jsonl").read_bytes()
    assert len(read_rows(run_dir / "01_samples.jsonl")) == 16
