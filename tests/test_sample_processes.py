"""Stages 1 to 3 on several processes, killed at every file event, on a full disk: the same bytes in the end."""

import json
import random
import shutil
import time

import pytest
from conftest import PROBES, count_rows, read_rows, wait, write_rows
from forked import Launch

import common

# several batches of several lengths
OPTIONS = {
    "01_sample": ("--n", "3", "--max_new_tokens", "16", "--batch_size", "6", "--system_prob", "0.4"),
    "02_score": ("--score_mode", "expected", "--batch_size", "6", "--judge_probes", PROBES),
    "03_refine": ("--attempts", "2", "--max_new_tokens", "12", "--batch_size", "4"),
}
FILES = {"01_sample": "01_samples.jsonl", "02_score": "02_scores.jsonl", "03_refine": "03_refined.jsonl"}


def begin(stage, run_dir, tiny, processes=1, options=(), **limits):
    prompts = ["--prompts", run_dir / "prompts.jsonl", "--model", tiny()] if stage == "01_sample" else []
    arguments = ("--run_dir", run_dir, *OPTIONS[stage], *prompts, *options)
    return Launch(f"{stage}.py", *arguments, processes=processes, **limits)


def run(*arguments, **options):
    code, out, err = begin(*arguments, **options).finish()
    assert code == 0, err[-3000:]
    return out


def make_prompts(run_dir, count=6):
    rng, words = random.Random(0), ["why", "is", "this", "not", "safe", "to", "do", "at", "home"]
    prompts = [" ".join(rng.choices(words, k=rng.randint(2, 30))) for _ in range(count)]
    write_rows(run_dir / "prompts.jsonl", [{"id": f"{i}é", "prompt": p} for i, p in enumerate(prompts)])
    return run_dir


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """The run directory that one process makes, left alone."""
    run_dir = make_prompts(tmp_path_factory.mktemp("alone"))
    for stage in FILES:
        run(stage, run_dir, tiny)
    return run_dir


def before(alone, folder, stage):
    """A copy of the run up to before `stage`."""
    shutil.copytree(alone, folder)
    for later in list(FILES)[list(FILES).index(stage) :]:
        (folder / FILES[later]).unlink()
        (folder / f"{later[:2]}_args.json").unlink()
        if later == "02_score":
            (folder / "02_judge_check.jsonl").unlink()
    return folder


def test_two_and_three_processes_write_the_same_files(tiny, alone, tmp_path):
    for processes in (2, 3):
        run_dir = make_prompts(tmp_path / str(processes))
        for stage, file in FILES.items():
            out = run(stage, run_dir, tiny, processes)
            assert out.count("wrote ") == 1 and out.count(f"{stage.replace('_', ' ')}: ") == 1, "one of them reports"
            assert (run_dir / file).read_bytes() == (alone / file).read_bytes()
        if processes == 2:
            assert run("01_sample", run_dir, tiny, processes).count("is complete already") >= 1
        assert {path.suffix for path in run_dir.glob(".*")} <= {".lock"}, "nothing else is left beside the files"


@pytest.mark.parametrize("stage", FILES)
def test_killed_at_every_file_event(tiny, alone, tmp_path, stage):
    """FAULTS 32: then the same command gives the same bytes; whatever is there meanwhile is not taken for whole."""
    whole, kills, event = (alone / FILES[stage]).read_bytes(), 0, 1
    while True:
        events = (event, event + 1)  # two cores
        folders = [before(alone, tmp_path / str(e), stage) for e in events]
        launches = [begin(stage, f, tiny, kill=(e, str(f))) for e, f in zip(events, folders, strict=True)]
        killed = [launch.finish()[0] != 0 for launch in launches]
        usable = []
        for folder in folders:
            try:
                usable.append(bool(common.made_by(folder / FILES[stage])))
            except common.UserError:
                usable.append(False)
            assert not usable[-1] or (folder / FILES[stage]).read_bytes() == whole
        again = [begin(stage, folder, tiny) for folder, was in zip(folders, killed, strict=True) if was]
        assert [launch.finish()[0] for launch in again] == [0] * len(again), [launch.read("err") for launch in again]
        for folder in folders:
            assert (folder / FILES[stage]).read_bytes() == whole
            assert common.made_by(folder / FILES[stage])
            assert {path.suffix for path in folder.glob(".*")} <= {".lock"}, "no partial files stay behind"
            shutil.rmtree(folder)
        kills, event = kills + sum(killed), event + 2
        if not all(killed):
            break
    assert kills > 15, "it has looked at something"


@pytest.mark.parametrize("stage", FILES)
def test_overwrite_killed_leaves_nothing_that_looks_whole(tiny, alone, tmp_path, stage):
    """FAULTS 33: what is kept is the old run or the new one; between them the next stage refuses the file."""
    refused, old = 0, (alone / FILES[stage]).read_bytes()
    for event in range(1, 9):
        folder = shutil.copytree(alone, tmp_path / str(event))
        begin(stage, folder, tiny, options=("--overwrite", "--seed", "7"), kill=(event, str(folder))).finish()
        output = folder / FILES[stage]
        record = json.loads((folder / f"{stage[:2]}_args.json").read_text())
        if record["complete"]:
            assert record["args"]["seed"] == 0 and output.read_bytes() == old
            continue
        refused += 1
        assert record["args"]["seed"] == 7
        with pytest.raises(common.UserError, match="has not finished"):
            common.made_by(output)
    assert refused >= 3


def test_killed_at_any_moment_on_two_processes(tiny, alone, tmp_path):
    for stage, file in FILES.items():
        run_dir = before(alone, tmp_path / stage, stage)
        rng, kept, kills = random.Random(stage), 0, 0
        for _ in range(3):
            launch = begin(stage, run_dir, tiny, 2)
            kills += launch.kill_when(lambda old=kept, path=run_dir / file: count_rows(path) > old, rng.random() * 0.02)
            rows = count_rows(run_dir / file)
            assert rows >= kept, "a row is lost"
            kept = rows
        assert kills, "no run was killed: this test would show nothing"
        run(stage, run_dir, tiny, 2)
        assert (run_dir / file).read_bytes() == (alone / file).read_bytes()


def test_a_dead_process_stops_all_and_its_rows_stay(tiny, alone, tmp_path):
    for turn in range(30):  # until the second process is killed before it has ended
        run_dir = make_prompts(tmp_path / str(turn))
        output = run_dir / "01_samples.jsonl"
        launch = begin("01_sample", run_dir, tiny, 2)
        wait(lambda output=output: count_rows(output))
        launch.running[1].kill()
        if launch.finish()[0] != 0:
            break
    else:
        pytest.fail("the second process was always done first: this test would show nothing")
    assert count_rows(output)
    run("01_sample", run_dir, tiny, 2)
    assert output.read_bytes() == (alone / "01_samples.jsonl").read_bytes() and len(read_rows(output)) == 6


def test_a_second_run_in_the_same_directory_is_refused(tiny, alone, tmp_path):
    """FAULTS 36; the lock of a dead process holds nobody."""
    run_dir = make_prompts(tmp_path)
    first = begin("01_sample", run_dir, tiny, options=("--max_new_tokens", "900"))
    while not count_rows(run_dir / "01_args.json"):
        time.sleep(0.001)
    code, _, err = begin("01_sample", run_dir, tiny, options=("--max_new_tokens", "900")).finish()
    assert code == 2 and "another process is at work on" in err and len(err.strip().splitlines()) == 1, err
    first.kill()
    assert "wrote" in run("01_sample", run_dir, tiny, options=("--overwrite",))
    assert (run_dir / "01_samples.jsonl").read_bytes() == (alone / "01_samples.jsonl").read_bytes()


def test_a_full_disk_is_one_line_and_loses_nothing(tiny, alone, tmp_path):
    """FAULTS 34: what it says is true."""
    run_dir = make_prompts(tmp_path)
    size = (alone / "01_samples.jsonl").stat().st_size
    code, _, err = begin("01_sample", run_dir, tiny, limit=size // 2).finish()
    assert code == 2 and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("01_sample.py: error: ") and "run the same command again" in err
    assert count_rows(run_dir / "01_samples.jsonl") >= 2
    run("01_sample", run_dir, tiny)
    assert (run_dir / "01_samples.jsonl").read_bytes() == (alone / "01_samples.jsonl").read_bytes()
