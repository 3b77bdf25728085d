"""The experiments of recipes/: which options each system passes on, and every recipe to its end with a tiny model."""

import json
import os
import socketserver
import sys
import threading
from pathlib import Path

import pairwise
import pandas as pd
import pytest
import soup
from conftest import PROBES, ROOT, write_rows
from forked import Launch
from test_recipes import HARMLESS, HONEST, LLAMA, MISTRAL, arguments_of, bash, calls, check_paper_s, pretend_sampled  # noqa: F401

import common

# In the place of python: asks the test's own process to fork, so that a start takes half a second.
STAND_IN = f"""#!{sys.executable} -IS
import json, os, socket, sys
asked = socket.socket(socket.AF_UNIX)
asked.connect(os.environ["FORKS"])
asked.sendall(json.dumps(sys.argv[1:]).encode() + b"\\n")
code, out, err = json.loads(asked.makefile().read())
sys.stdout.write(out), sys.stderr.write(err), sys.exit(code)
"""
# Both axes rise together, not on a line, so that the best of many refinements is often above all candidates on both.
SCORER = """
import hashlib

def scores(prompts, responses):
    shares = [int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) / 2**24 for text in responses]
    return [[1 + 9 * share, 1 + 9 * share**3] for share in shares]

def three(prompts, responses):
    return [[*own, own[0]] for own in scores(prompts, responses)]
"""


@pytest.fixture
def options(calls, tmp_path):  # noqa: F811
    """options(system, data, **settings) -> (all calls, [(stage, arguments), …]) of training at the paper's scale."""
    (tmp_path / "train.sh").write_text(f'. {ROOT}/recipes/systems.sh\ndata "$1"\nSEED=1\ntrain "$2"\n')

    def find(name: str, data: str = "saferlhf", **settings) -> tuple:
        env = {"JUDGE": "--judge_model j", "OUT": "o"} | settings
        _, made = calls(tmp_path / "train.sh", data, name, **env)
        return made, [pair for pair in arguments_of(made) if "Vanilla" not in pair[1].run_dir]

    return find


def test_spa_has_the_paper_s_settings(options):
    sample, score, *_, train = check_paper_s(options("SPA")[1], LLAMA, "saferlhf")
    assert sample.exclude == ["o/Vanilla_saferlhf_validation"], "what is chosen on is never trained on"
    assert score.judge_check and sample.seed == train.seed == 1
    check_paper_s(options("SPA", "honeset", MODEL=MISTRAL, ALPHA=3)[1], MISTRAL, "honeset", alpha=3)


def test_the_honest_system_prompt_goes_with_honesty_and_not_with_a_set_s_name(options):
    for data, goals, share in (("my.jsonl", HONEST, 0.5), ("honeset", HARMLESS, 0), ("my.jsonl", HARMLESS, 0)):
        sample = options("SPA", data, OBJECTIVES=" ".join(goals))[1][0][1]
        assert sample.system_prob == share, (data, goals)


@pytest.mark.parametrize(
    ("name", "folder", "expected"),
    [
        ("SPA_SimPO", "lex", {"06": {"loss": "simpo", "beta": 2.5, "gamma_beta_ratio": 0.55}}),
        ("SPA_DPO", "lex", {"06": {"loss": "dpo", "beta": None}}),
        ("SFT", "lex", {"06": {"loss": "sft"}}),
        ("wo_NF", "wo_NF", {"04": {"consistency": "off", "informativeness": False}, "06": {"loss": "spa"}}),
        ("only_consistency", "only_consistency", {"04": {"consistency": "strict", "informativeness": False}}),
        ("only_informativeness", "only_informativeness", {"04": {"consistency": "off", "informativeness": True}}),
        ("SPA_50", "SPA_50", {"04": {"max_prompts": 50, "consistency": "strict"}}),
        ("RS_7_3", "RS_7_3", {"05": {"rule": "weighted", "weights": [7, 3], "delta": 0, "refined_only": False,
            "input": "o/saferlhf/pool_n5-1/02_scores.jsonl"}, "06": {"loss": "spa"}}),
        ("Self_Criticism", "Self_Criticism", {"01": {"n": 1, "temperature": 0}, "05": {"delta": 0},
            "02": {"objectives": ["harmlessness", "honesty", "helpfulness"]},
            "03": {"template": "recipes/prompts/self_criticism.txt", "attempts": 1},
            "04": {"consistency": "weak", "informativeness": False}, "06": {"loss": "spa"}}),
    ],
)  # fmt: skip
def test_what_sets_a_system_apart(options, name, folder, expected):
    _, found = options(name)
    stages = {stage[:2]: args for stage, args in found}
    assert set(stages) == {"01", "02", "05", "06"} | (set() if name.startswith("RS") else {"03", "04"})
    for stage, values in expected.items():
        assert {key: getattr(stages[stage], key) for key in values} == values, stage
    run_dir = f"o/saferlhf/{folder}_n5_rho30_d2-1"
    assert stages["05"].run_dir == run_dir and stages["06"].output_dir == f"{run_dir}/06_{name}_a1_r1e-6"


def test_without_filters_at_equal_size(options, tmp_path):
    folder = tmp_path / "saferlhf" / "lex_n5_rho30_d2-1"
    write_rows(folder / "04_denoised.jsonl", [{}] * 7)
    filters = [args for stage, args in options("wo_NF_equal", OUT=tmp_path)[1] if stage[:2] == "04"]
    assert [(args.consistency, args.max_prompts) for args in filters] == [("strict", None), ("off", 7)]


def test_a_second_iteration_starts_from_the_trained_model(options):
    first = "o/saferlhf/lex_n5_rho30_d2-1/06_SPA_a1_r1e-6"
    for kind, kept_out in (("same", []), ("diff", ["o/saferlhf/pool_n5-1"])):
        _, found = options(f"Iter2_{kind}")
        samples = [args for stage, args in found if stage[:2] == "01"]
        assert [args.model for args in samples] == [LLAMA, first]
        assert samples[1].exclude[1:] == kept_out and samples[1].seed == samples[0].seed
        assert found[-1][1].run_dir.startswith(f"o/saferlhf/Iter2_{kind}_"), "06 trains the model that has sampled"
    pairs = {options("Iter2_same", ALPHA=alpha)[1][-2][1].run_dir for alpha in (1, 2)}
    assert len(pairs) == 2, "another α is another model, whose samples make other pairs"
    samples = [args for stage, args in options("Iter3_diff")[1] if stage[:2] == "01"]
    assert len(samples) == 3 and samples[2].exclude[1:] == ["o/saferlhf/pool_n5-1", samples[1].run_dir]


@pytest.mark.parametrize(
    "words", ["01_sample.py --run_dir o/saferlhf/pool_Iter2", "04_denoise.py --run_dir o/saferlhf/It"]
)
def test_a_round_without_prompts_is_a_warning(tmp_path, words):
    lines = [f". {ROOT}/recipes/systems.sh", f'python() {{ case "$*" in "{words}"*) return 3 ;; esac }}']
    lines += ["data saferlhf", "evaluate Iter2_diff", "evaluate Iter3_diff", "echo after"]
    (tmp_path / "rounds.sh").write_text("\n".join(["set -euo pipefail", *lines]))
    env = {"JUDGE": "--judge_model j", "OUT": "o", "GENERATE": "python", "TRAIN": "python"}
    done = bash(tmp_path / "rounds.sh", **env)
    told = "warning: Iter{}_diff, seed 0: nothing is left to train on, so the table lacks it\n"
    assert (done.stdout, done.stderr) == ("after\n", told.format(2) + told.format(3))


def test_a_soup_is_of_two_specialists(options):
    made, found = options("Soup_6_4")
    assert [args.weights for stage, args in found if stage == "05_pairs"] == [[1, 0], [0, 1]]
    words = next(call for call in made if "eval/soup.py" in call)
    args = common.parse_args(soup.Args, words[2:])
    assert args.weights == [6, 4] and [Path(name).name[:9] for name in args.models] == ["06_RS_1_0", "06_RS_0_1"]
    assert sum(stage == "01_sample" for stage, _ in found) == 1, "their samples are shared"


def test_settings_that_are_missing_or_wrong(calls):  # noqa: F811
    for env, words in (({}, "JUDGE is not set: who scores"), ({"SCALE": "big"}, "paper, gpu or small is wanted")):
        done, made = calls("table1.sh", code=2, **env)
        assert made == [] and words in done.stderr and done.stderr.count("\n") == 1


def test_mmlu_of_another_rate_is_of_another_model(calls, tmp_path):  # noqa: F811
    for rate in ("1e-6", "1e-5"):
        _, made = calls("table2.sh", JUDGE="--judge_model j", OUT=tmp_path, TRAINED_ON="saferlhf", RATE=rate)
        found = [Path(call[-1]).name for call in made if call[1:3] == ["-m", "lm_eval"]]
        assert found == ["Vanilla", f"SPA_saferlhf_n5_rho30_d2_a1_r{rate}-0"]
        assert [word.rpartition("/")[2] for word in made[-1] if "lm_eval/" in word] == found


def test_mmlu_cut_short_is_not_taken_for_all_of_it(calls, tmp_path):  # noqa: F811
    for options in ("--limit 5", ""):
        env = {"JUDGE": "--judge_model j", "OUT": tmp_path, "TRAINED_ON": "saferlhf", "MMLU_OPTIONS": options}
        asked = [call for call in calls("table2.sh", **env)[1] if call[1:3] == ["-m", "lm_eval"]]
        assert len(asked) == 2 and all(("--limit" in call) == bool(options) for call in asked)
        for call in asked:  # as lm_eval leaves it
            Path(call[-1]).mkdir(parents=True)


def test_figure4_names_its_judge_s_server(calls, tmp_path):  # noqa: F811
    folder = tmp_path / "saferlhf/lex_n5_rho30_d2-0/answers_SPA_a1_r1e-6_saferlhf_test"
    pretend_sampled(tmp_path / "Vanilla_saferlhf_test", folder)
    env = {"JUDGE": "--judge_model j --judge_endpoint http://x", "OUT": tmp_path, "DATASETS": "saferlhf"}
    args = common.parse_args(pairwise.Args, calls("figure4.sh", **env)[1][-1][2:])
    assert (args.judge_endpoint, args.score_mode) == ("http://x", None), "a key goes to a server that is named alone"
    assert [run.partition("=")[0] for run in args.runs] == ["saferlhf:Vanilla", "saferlhf:SPA"]


@pytest.mark.parametrize(("given", "mode"), [({}, "expected"), ({"JUDGING": "--score_mode json"}, "json")])
def test_figure3_compares_no_judge_with_itself(calls, tmp_path, given, mode):  # noqa: F811
    pretend_sampled(tmp_path / "high_stakes/figure3_n3-0")
    _, made = calls("figure3.sh", SCALE="small", MODEL="m", OUT=tmp_path, **given)
    scored = [(args.judge_model, args.score_mode) for stage, args in arguments_of(made) if stage == "02_score"]
    assert scored == [(None, "choice"), ("m", mode)]


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory):
    """recipe(name, **settings) -> what it printed, at SCALE=small on a tiny model with a function as every judge."""

    class Fork(socketserver.StreamRequestHandler):
        def handle(self):
            words = json.loads(self.rfile.readline())
            execute.started.append(words)
            self.wfile.write(json.dumps(Launch(*words).finish()).encode())

    folder = tmp_path_factory.mktemp("systems")
    (folder / "scorer.py").write_text(SCORER)
    (folder / "python").write_text(STAND_IN)
    (folder / "python").chmod(0o755)
    scorer = f"--scorer {folder / 'scorer.py'}"
    env = {"SCALE": "small", "MODEL": tiny("long"), "OUT": folder / "out", "SEEDS": "0 1", "PROMPTS": 6}
    env |= {"TEST_PROMPTS": 3, "VALIDATION": 2, "HONEST_PROMPTS": 4, "TOKENS": 6, "DELTA": 0.1, "RATE": "1e-3"}
    env |= {"SCORING": f"{scorer}:scores", "CRITIC": f"{scorer}:three", "JUDGE": f"{scorer}:scores", "JUDGING": ""}
    env |= {"REFINING": "--attempts 12 --temperature 1", "PROBES": PROBES, "EPOCHS": 1, "FORKS": folder / "forks"}
    env |= {"PATH": f"{folder}:{os.environ['PATH']}"}
    server = socketserver.ThreadingUnixStreamServer(str(folder / "forks"), Fork)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def execute(name: str, **settings) -> str:
        execute.started = []
        return bash(f"{name}.sh", timeout=3000, **env | settings).stdout

    execute.out = folder / "out"
    yield execute
    server.shutdown()
    server.server_close()


def test_table1_at_a_tiny_scale(recipe):
    said = recipe("table1")
    table = pd.read_csv(recipe.out / "judged" / "table1" / "judge_table.csv", dtype={"seeds": str})
    assert list(table["system"].unique()) == ["Vanilla", "SFT", "SPA_DPO", "SPA_SimPO", "SPA"]
    assert {len(seeds.split()) for seeds in table["seeds"][table["system"] != "Vanilla"]} == {2}
    assert "means of the seeds" in said and (recipe.out / "judged" / "table1" / "judge_table.tex").exists()
    pools = [words[0] for words in recipe.started if "pool" in words[2]]
    assert pools == ["01_sample.py", "02_score.py", "03_refine.py"] * 2, "shared work once a seed"
    pairs = {path.parent.name: path for path in recipe.out.glob("high_stakes/*/05_pairs.jsonl")}
    assert set(pairs) == {"lex_n3_rho30_d0.1-0", "lex_n3_rho30_d0.1-1"}, "one set of pairs for the four of a seed"


TABLE, PLOT, GRID = "judge_table.tex", "judge_table.pdf", "a{}_d0.1_r1e-3_rho{}_n3"
# the last file of each recipe, and the systems of its table
ENDS = {"table2": ("mtbench.md", ""), "table6": ("annotate.html", ""), "figure3": ("rv.pdf", "")}
ENDS |= {"figure4": ("pairwise.pdf", ""), "figure5": (PLOT, "Vanilla Iter1 Iter2_same Iter2_diff")}
ENDS |= {"table3": (TABLE, "SPA Self_Criticism RS_6_4 Soup_6_4"), "one_gpu": (TABLE, "Vanilla wo_NF")}
ENDS |= {"table4": (TABLE, "Vanilla SFT SPA_DPO SPA_SimPO SPA"), "figure7": (PLOT, "Vanilla SPA_1 SPA_2 SPA")}
ENDS |= {"table5": (TABLE, f"Vanilla {GRID.format(1, 30)} {GRID.format(2, 30)} {GRID.format(1, 20)}")}
ENDS |= {"figure6": (PLOT, "Vanilla SPA wo_NF wo_NF_equal only_consistency only_informativeness")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_every_recipe_runs_to_its_end(recipe, tiny, tmp_path, name):
    last, systems = ENDS[name]
    settings = {"ALPHAS": "1 2", "DELTAS": 0.1, "RATES": "1e-3", "RHOS": "20 30", "NS": 3, "RV_PROMPTS": 6}
    settings |= {"SAMPLES": "1 2", "SYSTEMS": systems if name == "table3" else "SPA"}
    if name == "one_gpu":  # a filter that leaves nothing takes its system out of the table, and no more
        settings |= {"SYSTEMS": "SPA wo_NF", "RHO": 1e-12}
    if name == "table2":
        questions = [{"question_id": 1, "category": "writing", "turns": ["One?", "Two?"]}]
        settings |= {"MTBENCH": write_rows(tmp_path / "q.jsonl", questions), "MMLU": "no"}
        settings |= {"JUDGE": f"--judge_model {tiny('long')}"}
    said = recipe(name, **settings)
    there = {path.name: path for path in (recipe.out / "judged" / name).rglob("*")}
    assert last in there, said[-2000:]
    if systems:
        table = pd.read_csv(there["judge_table.csv"])
        assert " ".join(table["system"].unique()) == systems
        sets = {"table4": "honesty", "table5": "high_stakes-validation"}
        assert set(table["test_set"]) == {sets.get(name, "high_stakes")}
