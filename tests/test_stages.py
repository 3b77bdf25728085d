"""The stages as a user runs them: the whole pipeline, what resumes and what is refused, own objectives and scorers."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMMANDS, FILES, PROMPTS, ROOT, STAGES, copy_run, read_rows, run_script, wait, write_rows
from forked import Launch, contents

import common

# ------------------------------------------------------------------------------------ the whole pipeline


def test_six_stages(finished, tiny):
    run_dir = finished[0]
    samples, scores = read_rows(run_dir / "01_samples.jsonl"), read_rows(run_dir / "02_scores.jsonl")
    refined, pairs = read_rows(run_dir / "03_refined.jsonl"), read_rows(run_dir / "05_pairs.jsonl")
    ids = [row["id"] for row in PROMPTS]
    for rows in (samples, scores, refined):
        assert [row["id"] for row in rows] == ids, "in the order of the input"
    assert samples[-1]["prompt"] == PROMPTS[-1]["prompt"]
    assert len({response["system"] for row in samples for response in row["responses"]}) == 2
    for sample, score, refine in zip(samples, scores, refined, strict=True):
        assert len(sample["responses"]) == 3 and len({r["text"] for r in sample["responses"]}) > 1
        bare = [{k: v for k, v in response.items() if k != "scores"} for response in score["responses"]]
        assert bare == sample["responses"] and refine["responses"] == score["responses"]
        for response in [*score["responses"], refine["refined"]]:
            assert response["scores"] is None or all(1 <= v <= 10 and isinstance(v, float) for v in response["scores"])
            assert (response["scores"] is None) == (not response["text"].strip())
    kept, dropped = read_rows(run_dir / "04_denoised.jsonl"), read_rows(run_dir / "04_dropped.jsonl")
    assert sorted(row["id"] for row in kept + dropped) == sorted(ids) and kept and pairs
    by_text = {(row["id"], r["text"]): r["scores"] for row in kept for r in [*row["responses"], row["refined"]][::-1]}
    for pair in pairs:
        for side in ("chosen", "rejected"):
            assert by_text[pair["id"], pair[side][0]["content"]] == pair[f"{side}_scores"]
        assert pair["chosen_scores"] > pair["rejected_scores"] and pair["margin"] >= 0.01
        assert pair["id"] != "é" or pair["prompt"] == PROMPTS[-1]["prompt"], "the same messages"
    assert (run_dir / "06_model" / "model.safetensors").exists()
    for stage in STAGES:
        record = json.loads((run_dir / f"{stage[:2]}_args.json").read_text())
        assert record["complete"] and record["stage"] == stage and record["versions"]["numpy"]
        assert list(record["earlier"]) == [s[:2] for s in STAGES[: STAGES.index(stage)]]
        assert record["args"].get("model", tiny()) == tiny(), "handed on from 01"


def test_what_a_user_sees(finished):
    """A first line that says what will be done, counts that add up, what comes next; no library's words."""
    _, printed = finished
    for stage, following in itertools.pairwise(STAGES):
        out, _ = printed[stage]
        assert out.splitlines()[0].startswith(f"{stage.replace('_', ' ')}: ")
        command = "accelerate launch" if stage == "05_pairs" else "python"
        assert f"next: {command} {following}.py" in out and "wrote " in out and " in " in out
    own = json.loads((finished[0] / "01_args.json").read_text())["args"]["prompts"]
    assert f" --prompts {own} --split test " in printed["06_train"][0], "tested on a set of its own, not on the default"
    for stage, (_, err) in printed.items():
        lines = [line for line in re.split(r"[\r\n]+", err) if line.strip()]
        ours = [line for line in lines if re.match(rf"warning: |{stage[:2]} |judge check: |\s*\x1b", line)]
        assert lines == ours, f"{stage}: {set(lines) - set(ours)}"
    assert re.search(r"scores read \d+ of 24", printed["02_score"][0]) and "ties: " in printed["03_refine"][0]


OWN = """
def score(prompts, responses):  # three numbers from the text alone
    values = [sum(map(ord, r)) for r in responses]
    return [[1 + v % 10, 1 + v // 7 % 10, 1 + v // 49 % 10] for v in values]
"""


@pytest.mark.parametrize("way", ["objectives", "scorer", "judge prompt"])
def test_an_ablation_is_one_option_or_one_constant(way, tiny, tmp_path, ok, monkeypatch):
    """A third objective, an own scorer, another judge prompt: through 01 to 05 without another word."""
    prompts = write_rows(tmp_path / "prompts.jsonl", PROMPTS[:4])
    (tmp_path / "own.py").write_text(OWN)
    options = ("--objectives", "honesty", "harmlessness", "helpfulness", "--score_mode", "expected")
    if way == "scorer":
        options = (*options[:4], "--scorer", tmp_path / "own.py:score")
    if way == "judge prompt":
        other = "{instruction_part}{response}\n\nHow good is that? {count} numbers, {dimensions}:\n{fields}"
        monkeypatch.setattr(common, "JUDGE_TEMPLATE", other)
        options = ("--score_mode", "expected")
    k, run_dir, asked, encode = 2 if way == "judge prompt" else 3, tmp_path / "run", [], common.Local.encode
    monkeypatch.setattr(common.Local, "encode", lambda self, chat: asked.append(str(chat)) or encode(self, chat))
    sampling = ("--prompts", prompts, "--model", tiny("long"), "--n", k + 2, "--max_new_tokens", 8)
    steps = [("01_sample", *sampling), ("02_score", *options), ("03_refine", "--max_new_tokens", 8)]
    steps += [("04_denoise", "--consistency", "off", "--rho", 10**6), ("05_pairs", "--delta", 0)]
    for stage, *more in steps:
        out, _ = ok(stage, "--run_dir", run_dir, *more)
    assert any("How good is that? two numbers" in chat for chat in asked) == (way == "judge prompt")
    rows, pairs = read_rows(run_dir / "04_denoised.jsonl"), read_rows(run_dir / "05_pairs.jsonl")
    for response in [r for row in rows for r in [*row["responses"], row["refined"]] if r["scores"]]:
        assert len(response["scores"]) == k
        if way == "scorer":
            value = sum(map(ord, response["text"]))
            assert response["scores"] == [1 + value % 10, 1 + value // 7 % 10, 1 + value // 49 % 10]
    assert pairs and all(
        len(pair["chosen_scores"]) == k and pair["chosen_scores"] > pair["rejected_scores"] for pair in pairs
    )
    assert ("Honesty before Harmlessness before Helpfulness" in out) == (k == 3)


# ------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("stage", FILES)
def test_resumes_from_every_row_and_any_byte(finished, tmp_path, ok, stage):
    """FAULTS 35: cut at rows, in a row, in a character; any subset of rows may be there first."""
    arguments = copy_run(finished, tmp_path, stage, itself=True)
    output, whole = tmp_path / FILES[stage], (finished[0] / FILES[stage]).read_bytes()
    record = json.loads((tmp_path / f"{stage[:2]}_args.json").read_text())
    made = whole.splitlines(keepends=True)[::-1]
    cuts = [b"", made[0][:-1], made[0], made[0] + made[1][:7], b"".join(made[:4]) + '{"id": "é'.encode()[:-1]]
    for i, cut in enumerate([*cuts, b"".join(made)]):
        record["complete"] = i % 2 == 0  # what it says does not matter where rows are missing
        (tmp_path / f"{stage[:2]}_args.json").write_text(json.dumps(record))
        output.write_bytes(cut)
        ok(stage, *arguments)
        assert output.read_bytes() == whole or (i == 5 and not record["complete"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_is_not_done_again_and_other_arguments_are_refused(
    finished, tmp_path, ok, fails, stage, monkeypatch
):
    run_dir = shutil.copytree(finished[0], tmp_path / "moved" / "run")  # FAULTS 38: moved, or named relatively
    before = contents(run_dir)
    monkeypatch.chdir(tmp_path / "moved")
    for name in (run_dir, "run"):
        out, _ = ok(stage, "--run_dir", name, *COMMANDS[stage])
        assert "is complete already; --overwrite" in out and contents(run_dir) == before
    _, err = fails("was made with --seed 0, not 5", stage, "--run_dir", run_dir, *COMMANDS[stage], "--seed", 5)
    assert "--overwrite" in err
    fails("", stage, *COMMANDS[stage], "--run_dir", run_dir / "01_samples.jsonl")  # a file; FAULTS section 4


def test_overwrite_does_it_again_and_the_next_stage_notices(finished, tmp_path, ok, fails):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    ok("01_sample", "--run_dir", run_dir, *COMMANDS["01_sample"], "--seed", 5, "--overwrite")
    assert (run_dir / "01_samples.jsonl").read_bytes() != (finished[0] / "01_samples.jsonl").read_bytes()
    words = "source is another than when 02_score.py ran"
    fails(words, "02_score", "--run_dir", run_dir, *COMMANDS["02_score"])
    ok("02_score", "--run_dir", run_dir, *COMMANDS["02_score"], "--overwrite")
    words = "03_refined.jsonl was made from another 02_scores.jsonl than is there now: run 03_refine.py --overwrite"
    for stage in ("04_denoise", "05_pairs", "06_train"):  # two and three stages further on, too
        fails(words, stage, "--run_dir", run_dir, *COMMANDS[stage], "--overwrite")


@pytest.mark.parametrize("stage", ["02_score", "03_refine", "06_train"])
def test_a_model_that_changed_since_it_sampled_is_told(finished, tiny, tmp_path, ok, stage):
    """Trained again in its folder, as in a second round: its record named the same path."""
    arguments, model = copy_run(finished, tmp_path, stage), json.loads((finished[0] / "01_args.json").read_text())
    for record in tmp_path.glob("*_args.json"):
        record.write_text(record.read_text().replace(model["inputs"]["--model"], "another"))
    assert f"warning: {tiny()} has changed since stage 1 sampled from it" in ok(stage, *arguments)[1]
    arguments = copy_run(finished, tmp_path, stage)
    assert "has changed since" not in ok(stage, *arguments, "--overwrite")[1]


@pytest.mark.parametrize("stage", ["02_score", "03_refine", "06_train"])
def test_no_model_is_guessed(finished, tmp_path, fails, stage):
    """FAULTS 4: only a stage's file, without its record, in a new directory; the first guess would go on to stage 6."""
    arguments = copy_run(finished, tmp_path, stage)
    for record in tmp_path.glob("*_args.json"):
        record.unlink()
    fails("says which model wrote these responses: pass --model", stage, *arguments)
    assert not (tmp_path / f"{stage[:2]}_args.json").exists()


@pytest.mark.parametrize("stage", STAGES[1:])
def test_what_is_not_whole_is_refused(finished, tmp_path, fails, stage):
    """An unfinished predecessor; FAULTS 39: a file cut at a row's end; no file at all; no rows."""
    arguments = copy_run(finished, tmp_path, stage)
    source = max(path for path in tmp_path.glob("0*.jsonl") if path.name not in ("04_dropped.jsonl",))
    record = source.with_name(f"{source.name[:2]}_args.json")
    whole, text = source.read_bytes(), record.read_text()
    first = whole.split(b"\n")[0] + b"\n"
    for content, change, words in [
        (whole, {"complete": False}, "has not finished"),
        (first, {}, "has 1 rows, but"),
        (b"", {}, ""),
    ]:
        source.write_bytes(content)
        record.write_text(json.dumps(json.loads(text) | change))
        fails(words, stage, *arguments)
        assert not list(tmp_path.glob(f"{stage[:2]}_*l"))
    source.unlink()
    fails(f"{source.name} not found; run {STAGES[STAGES.index(stage) - 1]}.py", stage, *arguments)


@pytest.mark.parametrize("stage", [*FILES, "06_train"])
def test_overwrite_with_a_wrong_name_loses_nothing(finished, tmp_path, fails, stage):
    arguments, before = copy_run(finished, tmp_path, stage, itself=True), contents(tmp_path)
    fails("no such folder", stage, *arguments, "--overwrite", "--model", "./typo")
    fails("0: ", stage, *arguments, "--overwrite", "--batch_size", 0)
    assert contents(tmp_path) == before and json.loads((tmp_path / f"{stage[:2]}_args.json").read_text())["complete"]


def test_names_in_another_encoding_and_disks_without_locks(finished, tmp_path, ok, fails, monkeypatch):
    """A file's name that is no UTF-8 went into no record: a traceback. Lustre without flock read as a second run."""

    def flock(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    source = shutil.copytree(finished[0], tmp_path / os.fsdecode(b"caf\xe9"))
    command = ("04_denoise", "--input", source, "--run_dir", tmp_path / "branch", *COMMANDS["04_denoise"])
    assert "can't be locked (Function not implemented)" in ok(*command)[1]
    assert common.read_record(tmp_path / "branch" / "04_args.json")["args"]["input"] == str(source)
    assert "is complete already" in ok(*command)[0]
    fails("is a file, or no UTF-8", "06_train", "--run_dir", source, "--overwrite")  # before it trains, not in the end


@pytest.mark.parametrize("stage", STAGES)
def test_a_second_run_is_refused_while_the_first_one_lives(finished, tmp_path, fails, stage):
    """FAULTS 36: the first one, halted right after its lock, goes on as if nothing had been."""
    command = copy_run(finished, tmp_path, stage)
    first = Launch(f"{stage}.py", *command, kill=(4, str(tmp_path), signal.SIGSTOP))
    try:
        wait(lambda: Path(f"/proc/{first.running[0].pid}/stat").read_text().rsplit(")")[-1].split()[0] == "T")
        before = contents(tmp_path)
        fails("another process is at work on", stage, *command)
    finally:
        os.kill(first.running[0].pid, signal.SIGCONT)
    assert first.finish()[0] == 0
    files = contents(tmp_path)
    assert files == {name: (finished[0] / name).read_bytes() for name in files} and len(files) > len(before)


@pytest.mark.parametrize("stage", STAGES)
def test_a_read_only_directory_is_one_line(finished, tmp_path, stage):
    """FAULTS section 4: it is only read from where the output goes elsewhere."""
    run_dir = tmp_path / "run"
    command, before = copy_run(finished, run_dir, stage), contents(run_dir)
    run_dir.chmod(0o555)
    code, _, err = Launch(f"{stage}.py", *command, powers=False).finish()
    assert code == 2 and "Traceback" not in err and err.count("error: ") == 1, err
    assert "Permission denied" in err and str(run_dir) in err and contents(run_dir) == before
    if stage in ("04_denoise", "05_pairs"):
        command = ["--input", str(run_dir), "--run_dir", str(tmp_path / "other"), *command[2:]]
    elif stage == "06_train":
        command += ["--output_dir", str(tmp_path / "other" / "06_model")]
    else:
        return
    code, _, err = Launch(f"{stage}.py", *command, powers=False).finish()
    assert code == 0 and contents(tmp_path / "other") and contents(run_dir) == before, err


OUTPUTS = FILES | {"04_denoise": "04_denoised.jsonl", "05_pairs": "05_pairs.jsonl"}


@pytest.mark.parametrize(("stage", "output"), OUTPUTS.items())
def test_a_full_disk_is_one_line_and_what_it_says_is_true(finished, tmp_path, stage, output):
    """FAULTS 34; 06: test_resume.py."""
    command, whole = copy_run(finished, tmp_path, stage), (finished[0] / output).read_bytes()
    code, _, err = Launch(f"{stage}.py", *command, limit=len(whole) * 2 // 3).finish()
    assert code == 2 and "Traceback" not in err and err.count("error: ") == 1, err
    assert "run the same command again" in err.splitlines()[-1] and {p.suffix for p in tmp_path.glob(".*")} == {".lock"}
    code, _, err = Launch(f"{stage}.py", *command).finish()
    assert code == 0 and (tmp_path / output).read_bytes() == whole, err


def test_an_interrupt_while_stage_6_imports(tmp_path):
    """FAULTS section 4: no traceback."""
    command = [sys.executable, "06_train.py", "--run_dir", str(tmp_path)]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 (ignored where tests run in the background)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    wait(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (-signal.SIGINT, 130) and "Traceback" not in process.stderr.read()


def test_a_reader_that_leaves_before_the_end(finished, tmp_path):
    """FAULTS section 4: a pipe that closes before the last line ends the stage with the code of SIGPIPE, silently."""
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    stage = ("05_pairs.py", "--run_dir", run_dir, *COMMANDS["05_pairs"], "--overwrite")
    last_line = ("-c", "import common; common.run_stage(lambda args: print('next: …'), common.RunArgs)")
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for command in (stage, last_line, ("04_denoise.py", "--help")):
        options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": buffered}
        process = subprocess.Popen([sys.executable, *map(str, command)], **options)
        process.stdout.close()
        err = process.stderr.read()
        assert "Traceback" not in err, err
        assert "--help" in command or (process.wait(60) == 141 and "Error" not in err), err


def test_help_is_the_documentation_also_on_a_poor_terminal(finished, tmp_path):
    """FAULTS section 4: output in cp1252 or ASCII: no traceback."""
    done = run_script("04_denoise.py", "--help")
    assert done.returncode == 0 and "Algorithm 1, lines 11-21" in done.stdout and "(default: 30.0)" in done.stdout
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    for name in ("cp1252", "ascii"):
        options = ("--run_dir", run_dir, *COMMANDS["04_denoise"], "--overwrite")
        done = run_script("04_denoise.py", *options, env=os.environ | {"PYTHONIOENCODING": name}, errors="replace")
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_layers_spread_over_devices_give_the_same_files(finished, tmp_path, ok, fails, monkeypatch):
    """FAULTS 37: --device_map on one device; it may change on resume. test_common.py tests layers moved by hooks."""
    for stage, file in FILES.items():
        ok(stage, "--run_dir", tmp_path, *COMMANDS[stage], "--device_map", "auto")
        assert (tmp_path / file).read_bytes() == (finished[0] / file).read_bytes()
        assert "is complete already" in ok(stage, "--run_dir", tmp_path, *COMMANDS[stage])[0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = "--device_map needs a single process"
    fails(words, "02_score", "--run_dir", tmp_path, "--device_map", "auto", "--overwrite")
