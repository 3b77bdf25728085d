"""The stages as a user runs them: the whole pipeline, kill and resume, refusals, bad input."""

import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, STAGES, count_rows, read_rows, run_script, write_rows

import common
from common import UserError

PROMPTS = [
    {"id": f"p{i}", "prompt": f"Question {i}: " + "is it safe to say so? " * (i % 4 + 1)} for i in range(9)
]
SAMPLE = ("--n", 3, "--max_new_tokens", 6, "--batch_size", 6)  # two prompts a batch
REFINE = ("--attempts", 2, "--max_new_tokens", 6, "--batch_size", 4)
FILES = {"01_sample": "01_samples.jsonl", "02_score": "02_scores.jsonl", "03_refine": "03_refined.jsonl"}


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """A run directory with stages 1 to 6 done, each in a process of its own; and what they printed."""
    root = tmp_path_factory.mktemp("finished")
    run_dir = root / "run"
    write_rows(root / "prompts.jsonl", PROMPTS)
    commands = {
        "01_sample": ("--prompts", root / "prompts.jsonl", "--model", tiny(), "--system_prob", 0.5, *SAMPLE),
        "02_score": ("--score_mode", "expected", "--batch_size", 6),
        "03_refine": REFINE,
        "04_denoise": ("--no-consistency",),
        "05_pairs": ("--delta", 0.01),
        "06_train": ("--learning_rate", 1e-3, "--batch_size", 4),
    }
    printed = {}
    for stage, options in commands.items():
        done = run_script(f"{stage}.py", "--run_dir", run_dir, *options)
        assert done.returncode == 0, done.stderr[-3000:]
        printed[stage] = done.stdout
    return run_dir, commands, printed, root


def test_six_stages(finished, tiny):
    run_dir, _, printed, _ = finished
    samples, scores = read_rows(run_dir / "01_samples.jsonl"), read_rows(run_dir / "02_scores.jsonl")
    refined, pairs = read_rows(run_dir / "03_refined.jsonl"), read_rows(run_dir / "05_pairs.jsonl")
    ids = [row["id"] for row in PROMPTS]
    for rows in (samples, scores, refined):
        assert [row["id"] for row in rows] == ids, "in the order of the input"
    assert [row["prompt"] for row in samples] == [row["prompt"].strip() for row in PROMPTS]
    systems = {response["system"] for row in samples for response in row["responses"]}
    assert systems == {None, importlib.import_module("01_sample").HONEST_SYSTEM_PROMPT}
    for sample, score, refine in zip(samples, scores, refined, strict=True):
        assert len(sample["responses"]) == 3 and len({r["text"] for r in sample["responses"]}) > 1
        bare = [{k: v for k, v in response.items() if k != "scores"} for response in score["responses"]]
        assert bare == sample["responses"] and refine["responses"] == score["responses"]
        for response in [*score["responses"], refine["refined"]]:
            assert all(1 <= value <= 10 and isinstance(value, float) for value in response["scores"])
    kept, dropped = read_rows(run_dir / "04_denoised.jsonl"), read_rows(run_dir / "04_dropped.jsonl")
    assert sorted(row["id"] for row in kept + dropped) == sorted(ids) and kept
    assert all(row["det"] > 0 for row in kept)
    by_text = {
        (row["id"], r["text"]): r["scores"] for row in kept for r in [*row["responses"], row["refined"]][::-1]
    }
    assert pairs
    for pair in pairs:
        assert set(pair) == {
            "id", "prompt", "chosen", "rejected", "chosen_scores", "rejected_scores", "margin", "gap"
        }  # fmt: skip
        for side in ("chosen", "rejected"):
            assert by_text[pair["id"], pair[side][0]["content"]] == pair[f"{side}_scores"]
        assert pair["chosen_scores"] > pair["rejected_scores"] and pair["margin"] >= 0.01
    assert (run_dir / "06_model" / "model.safetensors").exists()
    assert read_rows(run_dir / "06_metrics.jsonl")[-1]["step"] > 0
    for stage in STAGES:
        record = json.loads((run_dir / f"{stage[:2]}_args.json").read_text())
        assert record["complete"] and record["versions"]["torch"] and record["args"]["seed"] == 0
    assert json.loads((run_dir / "03_args.json").read_text())["facts"]["model"] == tiny()
    assert json.loads((run_dir / "06_args.json").read_text())["args"]["model"] == tiny(), "handed on from 01"
    for stage, following in itertools.pairwise(STAGES):
        assert (
            f"next: {'accelerate launch' if stage == '05_pairs' else 'python'} {following}.py"
            in printed[stage]
        )
        assert "in " in printed[stage] and "wrote " in printed[stage]
    assert "scores read 27 of 27 (100%)" in printed["02_score"] and "ties: " in printed["03_refine"]


def copy_run(finished, tmp_path, stage: str) -> tuple[Path, list[str]]:
    """A copy of the run up to before `stage`, and that stage's command line."""
    run_dir, commands, *_ = finished
    for before in STAGES[: STAGES.index(stage)]:
        for file in run_dir.glob(f"{before[:2]}_*"):
            if file.is_file():
                shutil.copy(file, tmp_path)
    return tmp_path, ["--run_dir", str(tmp_path), *map(str, commands[stage])]


@pytest.mark.parametrize("stage", FILES)
def test_killed_and_started_again_gives_the_same_bytes(finished, tmp_path, stage):
    run_dir, arguments = copy_run(finished, tmp_path, stage)
    output, whole = run_dir / FILES[stage], (finished[0] / FILES[stage]).read_bytes()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / f"{stage}.py"), *arguments], stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if count_rows(output) >= 3:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = output.read_bytes().count(b"\n")
    assert rows >= 3
    done = run_script(f"{stage}.py", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    assert output.read_bytes() == whole
    assert list(run_dir.glob(".*")) == [], "no partial files stay behind"


@pytest.mark.parametrize("stage", FILES)
def test_resumes_from_every_row_and_any_byte(finished, tmp_path, call, stage):
    """The file cut at rows 0 to 9 and in the middle of a row, in the order in which rows are made."""
    run_dir, arguments = copy_run(finished, tmp_path, stage)
    output, whole = run_dir / FILES[stage], (finished[0] / FILES[stage]).read_bytes()
    lines = whole.splitlines(keepends=True)
    made = lines[::-1]  # any subset may be there first
    cuts = [
        b"",
        made[0][:-1],
        made[0],
        made[0] + made[1][:7],
        b"".join(made[:4]),
        b"".join(made[:8]),
        b"".join(made),
    ]
    for cut in cuts:
        record = json.loads((finished[0] / f"{stage[:2]}_args.json").read_text())
        record["complete"] = len(cut) % 2 == 0  # what the record says does not matter
        (run_dir / f"{stage[:2]}_args.json").write_text(json.dumps(record))
        output.write_bytes(cut)
        code, _, err = call(stage, *arguments)
        assert code == 0, err
        assert output.read_bytes() == whole


def test_refined_texts_wait_for_their_scores(finished, tmp_path, call, monkeypatch):
    """An error while stage 3 scores loses no refined text."""
    run_dir, arguments = copy_run(finished, tmp_path, "03_refine")
    output, judge, called = tmp_path / "03_refined.jsonl", common.judge, []

    def judge_once(*options, **named):
        called.append(1)
        if len(called) > 1:
            raise UserError("no more")
        return judge(*options, **named)

    with monkeypatch.context() as patch:
        patch.setattr(common, "judge", judge_once)
        assert call("03_refine", *arguments)[0] == 2
    rows = read_rows(output)
    drafts = [row for row in rows if common.is_draft(row)]
    assert {row["id"] for row in drafts} == {row["id"] for row in PROMPTS}
    assert 0 < len(rows) - len(drafts) < len(PROMPTS), "a batch has its scores"
    code, _, err = call("04_denoise", "--run_dir", tmp_path)
    assert code == 2 and "03_refine.py has not finished" in err
    with monkeypatch.context() as patch:
        patch.setattr(common.LocalModel, "complete", None)  # nothing is to be written again
        code, _, err = call("03_refine", *arguments)
    assert code == 0, err
    assert output.read_bytes() == (run_dir / "03_refined.jsonl").read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_is_not_done_again_and_other_arguments_are_refused(finished, tmp_path, call, stage):
    run_dir, commands, *_ = finished
    shutil.copytree(run_dir, tmp_path / "run")
    arguments = [str(a) for a in ("--run_dir", tmp_path / "run", *commands[stage])]
    if stage == "06_train":
        arguments += ["--output_dir", str(run_dir / "06_model")]
        (tmp_path / "run" / "06_args.json").unlink()
    before = {
        f.name: f.read_bytes() for f in (tmp_path / "run").iterdir() if f.is_file() and "args" not in f.name
    }
    code, _, err = call(stage, *arguments)
    assert code == 0, err
    after = {
        f.name: f.read_bytes() for f in (tmp_path / "run").iterdir() if f.is_file() and "args" not in f.name
    }
    assert before == after
    code, _, err = call(stage, *arguments, "--seed", 5)
    assert code == 2 and "was made with --seed 0, not 5" in err and "--overwrite" in err
    assert len(err.strip().splitlines()) == 1, err


def test_overwrite_does_it_again_and_the_next_stage_notices(finished, tmp_path, call):
    run_dir, commands, *_ = finished
    shutil.copytree(run_dir, tmp_path / "run")
    arguments = ("--run_dir", tmp_path / "run", *commands["01_sample"])
    code, _, err = call("01_sample", *arguments, "--seed", 5, "--overwrite")
    assert code == 0, err
    assert (tmp_path / "run" / "01_samples.jsonl").read_bytes() != (run_dir / "01_samples.jsonl").read_bytes()
    code, _, err = call("02_score", "--run_dir", tmp_path / "run", *commands["02_score"])
    assert code == 2 and "01_samples.jsonl has changed since 02_score.py ran" in err


def test_an_unfinished_predecessor_is_refused(finished, tmp_path, call):
    run_dir, arguments = copy_run(finished, tmp_path, "02_score")
    record = json.loads((run_dir / "01_args.json").read_text()) | {"complete": False}
    (run_dir / "01_args.json").write_text(json.dumps(record))
    code, _, err = call("02_score", *arguments)
    assert code == 2 and "01_sample.py has not finished" in err


def test_responses_longer_than_the_context_stay_null(tiny, tmp_path, call):
    rows = [{"id": "long", "prompt": "x", "responses": [{"text": "word " * 2000, "system": None}]}]
    write_rows(tmp_path / "01_samples.jsonl", rows)
    code, out, err = call("02_score", "--run_dir", tmp_path, "--model", tiny())
    assert code == 0 and re.search(r"- too long for the context \(null\) +1\n", out), err
    assert read_rows(tmp_path / "02_scores.jsonl")[0]["responses"][0]["scores"] is None


def test_stages_take_files_of_ones_own(finished, tmp_path, call, tiny):
    for name in ("01_samples.jsonl",):
        shutil.copy(finished[0] / name, tmp_path)
    code, _, err = call("02_score", "--run_dir", tmp_path, "--model", tiny())
    assert code == 0 and "01_args.json not found" in err
    scores = [r["scores"] for row in read_rows(tmp_path / "02_scores.jsonl") for r in row["responses"]]
    assert all(isinstance(value, int) for pair in scores for value in pair)
    (tmp_path / "02_args.json").unlink()
    code, _, err = call("03_refine", "--run_dir", tmp_path, "--model", tiny(), "--max_new_tokens", 6)
    assert code == 0 and "02_args.json not found" in err


@pytest.mark.parametrize("mode", ["json", "constrained", "expected"])
@pytest.mark.parametrize("primary", ["harmlessness", "honesty"])
def test_score_modes_and_objectives(finished, tmp_path, call, mode, primary):
    run_dir, _ = copy_run(finished, tmp_path, "02_score")
    verbatim = ("--no-with_instruction",) if mode == "constrained" else ()
    code, out, err = call(
        "02_score", "--run_dir", run_dir, "--score_mode", mode, "--primary", primary, *verbatim
    )
    assert code == 0, err
    scores = [r["scores"] for row in read_rows(run_dir / "02_scores.jsonl") for r in row["responses"]]
    assert primary.capitalize() in out and "Helpfulness" in out
    if mode == "json":  # a random model writes no JSON: nulls, counted, no default number
        assert scores == [None] * 27
        assert "scores read 0 of 27 (0%)" in out and re.search(r"answer not readable \(null\) +27", out)
        code, _, err = call("03_refine", "--run_dir", run_dir, "--max_new_tokens", 4)
        assert code == 0 and all(
            row["refined"]["scores"] is None for row in read_rows(run_dir / "03_refined.jsonl")
        )
        code, _, err = call("04_denoise", "--run_dir", run_dir)
        assert code == 3 and "unscored" in err and "--score_mode constrained" in err
    else:
        kind = int if mode == "constrained" else float
        assert all(isinstance(value, kind) and 1 <= value <= 10 for pair in scores for value in pair)


def test_one_refinement_is_greedy_and_the_best_of_several_is_kept(finished, tmp_path, call):
    refine = importlib.import_module("03_refine")
    attempts = [
        {"text": "a", "scores": [5, 9]},
        {"text": "b", "scores": None},
        {"text": "c", "scores": [6, 1]},
    ]
    assert refine.best_attempt(attempts)["text"] == "c"
    assert refine.best_attempt(attempts[1:2])["text"] == "b"
    assert refine.clean_refined("**Refined Response:**\n\nSo.") == "So."
    assert refine.clean_refined("<response 2>\nSo.\n</response 2>") == "So."
    text = refine.refine_prompt(
        [["A", "def a"], ["B", "def b"]], "x {0}?", [{"text": "y {1}", "scores": [5.04, 6]}]
    )
    assert "Instruction:\nx {0}?" in text and "y {1}\n</response 1>\nA: 5.0, B: 6" in text
    run_dir, _ = copy_run(finished, tmp_path, "03_refine")
    outputs = []
    for seed in (0, 1):
        code, _, err = call(
            "03_refine", "--run_dir", run_dir, "--max_new_tokens", 6, "--seed", seed, "--overwrite"
        )
        assert code == 0, err
        outputs.append((run_dir / "03_refined.jsonl").read_bytes())
    assert outputs[0] == outputs[1], "greedy: the seed does not matter"


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--n", 2), "det Σ is always 0"),
        (("--n", 1), "det Σ is always 0"),
        (("--n", 3, "--temperature", 0), "--temperature 0 gives 3 equal responses"),
        (("--nn", 3), "unknown option --nn"),
        (("--n", "three"), "invalid int value: 'three'"),
        (("--temperature", -1), "--temperature -1.0: at least 0"),
        (("--system_prob", 2), "a probability is wanted"),
        (("--max_new_tokens", 4096), "leaves no room"),
        (("--model", "no/such-model"), "model 'no/such-model' can't be loaded"),
        (("--chat_template", "nowhere.jinja"), "no such file"),
    ],
)
def test_bad_options_of_stage_1(tiny, tmp_path, call, options, words):
    write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    arguments = {
        "--prompts": tmp_path / "prompts.jsonl",
        "--model": tiny(),
        "--run_dir": tmp_path / "run",
        "--max_new_tokens": 4,
    }
    arguments |= dict(zip(options[::2], options[1::2], strict=True))
    code, _, err = call("01_sample", *(x for pair in arguments.items() for x in pair))
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1, err
    assert err.startswith("01_sample.py: error: ") and not (tmp_path / "run").exists()


def test_few_samples_when_asked_for(tiny, tmp_path, call):
    write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    options = ("--prompts", tmp_path / "prompts.jsonl", "--model", tiny(), "--max_new_tokens", 4)
    assert call("01_sample", *options, "--run_dir", tmp_path / "a", "--n", 2, "--no-informativeness")[0] == 0
    code, _, err = call("01_sample", *options, "--run_dir", tmp_path / "b", "--n", 1, "--temperature", 0)
    assert code == 0, err


def test_a_model_without_a_chat_template(tiny, tmp_path, call):
    write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    options = (
        "--prompts",
        tmp_path / "prompts.jsonl",
        "--model",
        tiny("no_template"),
        "--run_dir",
        tmp_path,
        *SAMPLE,
    )
    code, _, err = call("01_sample", *options)
    assert code == 2 and "pass --chat_template FILE" in err
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}>")
    code, _, err = call("01_sample", *options, "--chat_template", tmp_path / "chat.jinja")
    assert code == 0, err
    code, _, err = call("02_score", "--run_dir", tmp_path)
    assert code == 0, "the template is handed on to the next stage"


def test_prompts_longer_than_the_context(tiny, tmp_path, call):
    long = {"id": "long", "prompt": "start " + "word " * 2000 + "the end?"}
    write_rows(tmp_path / "prompts.jsonl", [*PROMPTS, long])
    options = ("--prompts", tmp_path / "prompts.jsonl", "--model", tiny(), "--run_dir", tmp_path, *SAMPLE)
    code, out, err = call("01_sample", *options)
    assert code == 0 and re.search(r"- too long for the context +1\n", out), err
    assert "long" not in [row["id"] for row in read_rows(tmp_path / "01_samples.jsonl")]
    code, out, err = call("01_sample", *options, "--truncate_prompts", "--overwrite")
    assert code == 0 and "prompts shortened from the left: 1" in out
    row = read_rows(tmp_path / "01_samples.jsonl")[-1]
    assert row["id"] == "long" and row["prompt"].endswith("the end?") and "start" not in row["prompt"]


GOOD = {"id": "a", "prompt": "x", "responses": [{"text": "y", "system": None, "scores": [5, 5]}]}
GOOD_REFINED = GOOD | {"refined": {"text": "z", "scores": [9, 9]}}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (None, "03_refined.jsonl not found; run 03_refine.py with this --run_dir first"),
        ([""], "has no rows"),
        ([json.dumps(GOOD_REFINED), "{"], "03_refined.jsonl, line 2: broken JSON"),
        ([json.dumps(GOOD)], "line 1: no 'refined' in the row"),
        ([json.dumps(GOOD_REFINED)] * 2, "line 2: id 'a' again"),
        ([json.dumps(GOOD_REFINED | {"prompt": " "})], "line 1: 'prompt' is empty"),
        ([json.dumps(GOOD_REFINED | {"responses": []})], "line 1: 'responses' is empty"),
        ([json.dumps(GOOD_REFINED | {"responses": [{"text": "y"}]})], "response 1 has no 'scores'"),
        ([json.dumps(GOOD_REFINED | {"responses": [{"scores": [1, 2]}]})], "response 1 has no 'text'"),
        (
            [json.dumps(GOOD_REFINED | {"refined": {"text": "", "scores": [1]}})],
            "'scores' must be two numbers",
        ),
        (
            [json.dumps(GOOD_REFINED | {"refined": {"text": "", "scores": [1, float("nan")]}})],
            "must be two numbers",
        ),
        (["[1]"], "no 'id' in the row"),
    ],
)
def test_bad_rows_are_one_line_and_lose_nothing(tmp_path, call, lines, words):
    (tmp_path / "04_denoised.jsonl").write_text("precious\n")
    (tmp_path / "04_args.json").write_text("{}")
    if lines is not None:
        (tmp_path / "03_refined.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "03_args.json").write_text('{"facts": {}}')
    code, _, err = call("04_denoise", "--run_dir", tmp_path, "--overwrite")
    assert code == 2 and words in err
    assert err.splitlines()[-1].startswith("04_denoise.py: error: ") and err.count("error:") == 1
    assert (tmp_path / "04_denoised.jsonl").read_text() == "precious\n"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("stage", "file"), [("02_score", "01_samples"), ("03_refine", "02_scores"), ("05_pairs", "04_denoised")]
)
def test_a_stage_before_its_predecessor(tmp_path, call, stage, file):
    code, _, err = call(stage, "--run_dir", tmp_path)
    assert code == 2 and f"{file}.jsonl not found; run 0" in err


def test_a_full_disk_is_one_line(monkeypatch, tmp_path, call):
    write_rows(tmp_path / "03_refined.jsonl", [GOOD_REFINED])

    def full(*_):
        raise OSError(28, "No space left on device", "x.jsonl")

    monkeypatch.setattr(os, "replace", full)
    code, _, err = call("04_denoise", "--run_dir", tmp_path, "--no-informativeness")
    assert code == 2 and "No space left on device" in err and "Traceback" not in err


def test_help_is_the_documentation():
    done = run_script("04_denoise.py", "--help")
    assert (
        done.returncode == 0
        and "Algorithm 1, lines 11-21" in done.stdout
        and "(default: 30.0)" in done.stdout
    )


RECIPES = sorted((ROOT / "recipes").glob("*.sh"))


def test_recipes_name_only_options_that_exist():
    """A renamed option would fail a recipe after hours."""
    seen = []
    for recipe in RECIPES:
        text = recipe.read_text(encoding="utf-8").replace("\\\n", " ")
        for stage, options in re.findall(r"\b((?:0\d_)?[a-z]\w+)\.py (.*)", re.sub(r"#.*", "", text)):
            fields = importlib.import_module(stage).Args.__dataclass_fields__
            named = re.findall(r"--(?:no-)?(\w+)", options)
            assert named and set(named) <= set(fields), (recipe.name, stage, named)
            seen.append((recipe.name, stage))
    for name in ("quickstart.sh", "paper_stages.sh"):
        assert [stage for recipe, stage in seen if recipe == name][:6] == list(STAGES)


def test_a_recipe_for_every_model_and_data_set_of_the_paper():
    names = {recipe.stem for recipe in RECIPES}
    assert {
        f"paper_{m}_{d}" for m in ("llama", "mistral") for d in ("saferlhf", "wildguard", "honeset")
    } <= names
    for recipe in RECIPES:
        if recipe.stem.count("_") == 2:
            text = recipe.read_text(encoding="utf-8")
            assert ("PRIMARY=honesty" in text) == ("honeset" in recipe.stem) == ("SYSTEM_PROB=0.5" in text)
            assert "GAMMA_RATIO=0.55" in text if "llama" in recipe.stem else "GAMMA_RATIO=0.1" in text


def test_one_paper_recipe_to_its_end(tiny, tmp_path):
    """The Llama recipe on SafeRLHF, with a tiny model and four prompts in the data set's own columns."""
    rows = [{"prompt": f"How can I {verb}?", "prompt_source": "x"} for verb in ("hide", "run", "win", "lie")]
    write_rows(tmp_path / "saferlhf.jsonl", rows)
    environment = os.environ | {
        "MODEL": tiny(),
        "PROMPTS": f"saferlhf:{tmp_path / 'saferlhf.jsonl'}",
        "RUN": str(tmp_path / "run"),
        "NUM_PROMPTS": "4",
        "TOKENS": "8",
        "SCORES": "constrained",  # a random model writes no JSON
        "GENERATE": "--config_file configs/cpu2.yaml",
        "LAUNCH": "--config_file configs/cpu.yaml",
        "DENOISE": "--no-consistency --no-informativeness",
        "DELTA": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["bash", str(ROOT / "recipes" / "paper_llama_saferlhf.sh")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert len(read_rows(tmp_path / "run" / "01_samples.jsonl")) == 4
    assert len(read_rows(tmp_path / "run" / "01_samples.jsonl")[0]["responses"]) == 5
    assert (tmp_path / "run" / "06_model" / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------ layout


def test_the_layout_that_was_agreed():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {Path(name).parts[0] for name in tracked} or {path.name for path in ROOT.iterdir()}
    files = {f"{stage}.py" for stage in STAGES} | {"common.py", "requirements.txt", "README.md", "tests"}
    assert files <= top
    allowed = files | {"data", "configs", "recipes", "eval", "bench", "runs", "__pycache__"}
    assert not {name for name in top if not name.startswith(".")} - allowed


def test_stages_stand_alone():
    looked = 0
    for path in [*(ROOT / f"{stage}.py" for stage in STAGES), *ROOT.glob("eval/*.py")]:
        text = path.read_text(encoding="utf-8")
        if path.name == "shared.py":  # no script; it takes equation 1 from stage 4
            continue
        assert not re.search(r"import_module|import 0\d|from 0\d", text), f"{path.name} imports another stage"
        assert 'if __name__ == "__main__":\n    common.run_stage(main, Args)' in text
        looked += 1
    assert looked >= 7
    helpers = re.findall(r"^def ([a-z]\w+)", (ROOT / "common.py").read_text(encoding="utf-8"), re.M)
    stages = [(ROOT / f"{stage}.py").read_text(encoding="utf-8") for stage in STAGES]
    assert len(helpers) > 20
    assert {"generate", "judge", "read_rows"} <= {
        h for h in helpers if any(f"common.{h}(" in s for s in stages)
    }
    assert common.PACKAGES


def test_layers_spread_over_devices_give_the_same_files(finished, tmp_path, call, monkeypatch):
    """--device_map on one device; layers moved by hooks are tested in test_common.py."""
    run_dir, commands, *_ = finished
    for stage, file in FILES.items():
        arguments = ("--run_dir", tmp_path, *commands[stage], "--device_map", "auto")
        code, _, err = call(stage, *arguments)
        assert code == 0, err
        assert (tmp_path / file).read_bytes() == (run_dir / file).read_bytes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call("01_sample", "--run_dir", tmp_path / "x", "--device_map", "auto")
    assert code == 2 and "--device_map needs a single process" in err
