"""Every command of the README: run here on a tiny model, run by the test that is named, or marked as needing a GPU."""

import importlib
import re
import shlex
import shutil

import pytest
from chat_server import ChatServer
from conftest import PROBES, ROOT, run_script, scored_row, write_rows

import common

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S))
COMMANDS = re.findall(r"(?m)^[^#\n].*$", BLOCKS)  # but for lines of comment
GPU = [line for line in COMMANDS if "# GPU" in line]
RECIPES = [line for line in COMMANDS if line.startswith("bash ") and line not in GPU]
# script -> the file that runs it
ELSEWHERE = {"recipes/quickstart.sh": "tests/test_real_model.py", "tests/run.sh": ".ci/run"}


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def stage_of(words: list[str]) -> int | None:
    return next((i for i, word in enumerate(words) if re.fullmatch(r"(0\d_\w+|eval/\w+)\.py", word)), None)


@pytest.mark.parametrize("command", GPU)
def test_a_command_that_needs_a_gpu_names_options_and_files_that_there_are(command):
    words = words_of(command)
    for word in words:
        assert "/" not in word or not word.endswith((".sh", ".py", ".yaml")) or (ROOT / word).is_file(), word
    place = stage_of(words)
    if place is not None:
        module = importlib.import_module(words[place].removesuffix(".py"))
        common.parse_args(module.Args, words[place + 1 :])


@pytest.mark.parametrize("command", RECIPES)
def test_a_recipe_is_run_by_a_test_of_its_own(command):
    script = words_of(command)[1]
    assert (ROOT / script).is_file() and script.rpartition("/")[2] in (ROOT / ELSEWHERE[script]).read_text()


def test_the_others_run_one_after_the_other(tiny, tmp_path):
    rows = [scored_row("p0", [(3, 4), (5, 5), (6, 8)], (9, 9)), scored_row("p1", [(2, 4), (5, 4), (6, 3)], (9, 9))]
    write_rows(tmp_path / "runs" / "a" / "04_denoised.jsonl", rows)
    (tmp_path / "my.csv").write_text("question\nWhat is it?\nIs that safe?\n")
    # of 06 the run's samples would name the model; without --output_dir a table would go into the kit's own runs/
    more = {"06_train.py": ("--model", tiny("long")), "eval/judge_check.py": ("--probes", PROBES)}
    more["eval/judge_table.py"] = ("--output_dir", tmp_path)
    others = [line for line in COMMANDS if line not in GPU and line not in RECIPES]
    ran, commands = [], ["python 05_pairs.py --run_dir runs/a", *others]
    with ChatServer(models=[{"id": "ORG/NAME", "max_model_len": 4096}]) as server:
        for command in commands:
            words = [word for word in words_of(command) if "=" not in word or word.startswith(("before=", "after="))]
            assert words[0] == "python" and stage_of(words) == 1, command
            script, line = words[1], shlex.join(words[2:]).replace("http://localhost:8000/v1", server.url)
            if "--endpoint" not in words:
                line = re.sub(r"(--model|--judge_model) \S+", rf"\1 {tiny('long')}", line)
            line = re.sub(r"(?<![\w/])(runs/|my\.csv)", rf"{tmp_path}/\1", line)
            if script.startswith("01") and "--max_new_tokens" not in line:
                line += " --max_new_tokens 8 --num_prompts 2"
            done = run_script(script, *shlex.split(line), *more.get(script, ()))
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            if "runs/before" in command and script.startswith("02"):
                shutil.copytree(tmp_path / "runs" / "before", tmp_path / "runs" / "after")
            ran.append(script)
    assert GPU and {"01_sample.py", "02_score.py", "05_pairs.py", "06_train.py", "eval/judge_table.py"} <= set(ran[1:])
