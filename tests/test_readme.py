"""Every command of the README: run here on a tiny model, run by the test that is named, or marked as needing a GPU."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
from chat_server import ChatServer
from conftest import ROOT, run_script, write_rows

import common

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S))
COMMANDS = re.findall(r"(?m)^[^#\n].*$", BLOCKS)  # but for lines of comment
# script -> the file that runs it
ELSEWHERE = {"recipes/quickstart.sh": "tests/test_real_model.py", "tests/run.sh": ".ci/run"}


def words_of(command: str) -> list[str]:
    return shlex.split(command.split("#")[0])


def stage_of(words: list[str]) -> int | None:
    return next((i for i, word in enumerate(words) if re.fullmatch(r"(0\d_\w+|eval/\w+)\.py", word)), None)


def test_there_are_commands():
    assert len(COMMANDS) > 8 and any("# GPU" in line for line in COMMANDS)


@pytest.mark.parametrize("command", [line for line in COMMANDS if "# GPU" in line])
def test_a_command_that_needs_a_gpu_names_options_and_files_that_there_are(command):
    words = words_of(command)
    for word in words:
        assert "/" not in word or not word.endswith((".sh", ".py", ".yaml")) or (ROOT / word).is_file(), word
    place = stage_of(words)
    if place is not None:
        module = importlib.import_module(words[place].removesuffix(".py"))
        common.parse_args(module.Args, words[place + 1 :])


@pytest.mark.parametrize("command", [line for line in COMMANDS if "# GPU" not in line and line.startswith("bash ")])
def test_a_recipe_is_run_by_a_test_of_its_own(command):
    script = words_of(command)[1]
    assert (ROOT / script).is_file() and Path(script).name in (ROOT / ELSEWHERE[script]).read_text()


def test_the_others_run_one_after_the_other(tiny, tmp_path, monkeypatch):
    scored = {"system": None, "truncated": False}
    rows = []
    for i, own in enumerate([[(3, 4), (5, 5), (6, 8)], [(2, 4), (5, 4), (6, 3)]]):
        responses = [{"text": f"answer {j}", "scores": list(one), **scored} for j, one in enumerate(own)]
        refined = {"text": "best", "scores": [9, 9], **scored}
        rows.append(
            {"id": f"p{i}", "prompt": f"Is it safe {i}?", "responses": responses, "refined": refined, "det": 1.0}
        )
    (tmp_path / "runs" / "a").mkdir(parents=True)
    write_rows(tmp_path / "runs" / "a" / "04_denoised.jsonl", rows)
    done = run_script("05_pairs.py", "--run_dir", tmp_path / "runs" / "a")
    assert done.returncode == 0, done.stderr
    (tmp_path / "my.csv").write_text("question\nWhat is it?\nIs that safe?\n")
    server = ChatServer(models=[{"id": "ORG/NAME", "max_model_len": 4096}])
    small = "--model|--judge_model"
    ran = []
    for command in COMMANDS:
        if "# GPU" in command or command.startswith("bash "):
            continue
        words = [word for word in words_of(command) if "=" not in word or word.startswith(("before=", "after="))]
        place = stage_of(words)
        assert words[0] == "python" and place == 1, command
        served = "--endpoint" in words
        line = shlex.join(words[2:]).replace("http://localhost:8000/v1", server.url)
        if not served:
            line = re.sub(rf"({small}) \S+", rf"\1 {tiny('long')}", line)
        line = re.sub(r"(?<![\w/])(runs/|my\.csv)", rf"{tmp_path}/\1", line)
        if words[1].startswith("01") and "--max_new_tokens" not in line:
            line += " --max_new_tokens 8 --num_prompts 2"
        if words[1].startswith("06"):  # the run's samples would name the model
            line += f" --model {tiny('long')}"
        if words[1].startswith("eval/judge_check"):
            line += f" --probes {ROOT}/tests/probes.jsonl"
        done = run_script(words[1], *shlex.split(line))
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if "runs/before" in command and words[1].startswith("02"):
            shutil.copytree(tmp_path / "runs" / "before", tmp_path / "runs" / "after")
        ran.append(words[1])
    server.close()
    assert {"01_sample.py", "02_score.py", "05_pairs.py", "06_train.py", "eval/judge_table.py"} <= set(ran)
