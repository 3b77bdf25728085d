"""Stages 1 to 3 through a server: the same files however it misbehaves, and nothing lost when it dies."""

import json
import os
import random
import re
import shutil
import signal
import time

import huggingface_hub
import pytest
from chat_server import TROUBLE, ChatServer, answer
from conftest import count_rows, read_rows, write_rows
from forked import Launch

import common

FILES = {"01_sample": "01_samples.jsonl", "02_score": "02_scores.jsonl", "03_refine": "03_refined.jsonl"}
PROMPTS = 12


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(common, "BACK_OFF", 0.01)
    for name in common.API_KEYS.values():
        monkeypatch.delenv(name, raising=False)


def prompts_in(run_dir):
    rows = [{"id": f"p{i}", "prompt": f"question {i}, with ü"} for i in range(PROMPTS)]
    return write_rows(run_dir / "prompts.jsonl", rows)


def options_of(stage, run_dir, server, *more):
    if stage == "01_sample":
        first = ("--prompts", prompts_in(run_dir), "--model", "served", "--endpoint", server.url, "--n", 3)
        return ("--run_dir", run_dir, *first, "--system_prob", 0.4, *more)
    own = ("--score_mode", "json") if stage == "02_score" else ("--attempts", 2)
    return ("--run_dir", run_dir, "--endpoint", server.url, *own, *more)


def all_stages(call, run_dir, server, *more):
    outputs = []
    for stage in FILES:
        code, out, err = call(stage, *options_of(stage, run_dir, server, *more))
        assert code == 0, err
        outputs.append((out, err))
    return outputs


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The run directory that a well-behaved server gives; made in a process of its own."""
    run_dir = tmp_path_factory.mktemp("good")
    with ChatServer(delay=0.02) as server:
        for stage in FILES:
            arguments = options_of(stage, run_dir, server, "--concurrency", 5)
            code, out, err = Launch(f"{stage}.py", *arguments, HF_HUB_OFFLINE="0").finish()
            assert code == 0, err
            assert re.search(r"tokens in, \d+ out, .* tokens/s", out)
    assert server.most == 5, "as many requests under way as allowed, no more"
    return run_dir


def same_files(one, other):
    for file in FILES.values():
        assert (one / file).read_bytes() == (other / file).read_bytes()


def test_rows_of_the_agreed_form(good):
    rows = read_rows(good / "03_refined.jsonl")
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(PROMPTS)]
    for row in rows:
        assert len({r["text"] for r in row["responses"]}) == 3, "each response has its own seed"
        assert all(r["text"].endswith("\nin two lines, ü") for r in row["responses"])
        scores = [r["scores"] for r in row["responses"]] + [row["refined"]["scores"]]
        assert all(1 <= value <= 10 and isinstance(value, int) for pair in scores for value in pair)
    assert {r["system"] is None for row in rows for r in row["responses"]} == {True, False}
    record = json.loads((good / "03_args.json").read_text())
    assert record["facts"]["model"] == record["facts"]["judge_model"] == "served"


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_changes_nothing(good, tmp_path, call, trouble):
    """Every third request fails in this way; the files are those of a server that never failed."""
    patience = 0.7 if trouble == "slow" else 60  # on a busy machine a good answer may take that long too
    with ChatServer(lambda number, body: trouble if number % 3 == 1 else "ok") as server:
        outputs = all_stages(call, tmp_path, server, "--concurrency", 8, "--request_timeout", patience)
    same_files(tmp_path, good)
    for _, err in outputs:
        assert err.count("warning:") <= 2 and "trying again" in err, err


def test_a_server_that_dies_loses_nothing(good, tmp_path, call):
    for stage, file in FILES.items():
        with ChatServer(lambda number, body: "ok" if number < 17 else "reset") as server:
            few = ("--concurrency", 4, "--retries", 2)
            code, _, err = call(stage, *options_of(stage, tmp_path, server, *few))
        assert code == 2, err
        (line,) = [line for line in err.splitlines() if "error:" in line]
        assert "failed 3 times" in line and "run the same command again" in line and "Traceback" not in err
        kept = read_rows(tmp_path / file)
        assert 0 < len(kept) < PROMPTS
        with ChatServer() as server:  # at another port, and with more patience
            code, _, err = call(stage, *options_of(stage, tmp_path, server, "--concurrency", 3))
            assert code == 0, err
        assert (tmp_path / file).read_bytes() == (good / file).read_bytes()
        asked = [body["messages"][-1]["content"] for _, _, body in server.received[1:]]  # after the greeting
        if stage == "03_refine":
            asked = [text for text in asked if not text.startswith("You are an impartial AI judge")]
            assert all(row.keys() == {"id", "draft"} for row in kept), "the first server wrote no score"
        assert len(asked) == (2 if stage == "03_refine" else 3) * (PROMPTS - len(kept)), "asked for again"


def test_a_server_that_is_not_there(tmp_path, call):
    server = ChatServer()
    server.close()
    code, _, err = call("01_sample", *options_of("01_sample", tmp_path, server, "--retries", 1))
    assert code == 2 and "failed 2 times" in err and not (tmp_path / "01_samples.jsonl").exists()
    with ChatServer(lambda number, body: "404") as server:
        code, _, err = call("01_sample", *options_of("01_sample", tmp_path, server))
    assert code == 2 and "answers 404" in err and "--model" in err and len(server.received) == 1
    with ChatServer(lambda number, body: "400") as server:
        code, _, err = call("01_sample", *options_of("01_sample", tmp_path, server))
    assert code == 2 and "refuses a plain request: 400" in err and len(server.received) == 1


def test_refused_prompts_are_left_out_and_counted(good, tmp_path, call):
    def barred(number, body):
        return "400" if "question 3," in body["messages"][-1]["content"] else "ok"

    with ChatServer(barred) as server:
        code, out, err = call("01_sample", *options_of("01_sample", tmp_path, server))
        assert code == 0 and "refuses a request: 400" in err
        assert re.search(r"- refused by the server +1\n", out)
        rows, wanted = read_rows(tmp_path / "01_samples.jsonl"), read_rows(good / "01_samples.jsonl")
        assert rows == [row for row in wanted if row["id"] != "p3"]
        asked = len(server.received)
        code, out, _ = call("01_sample", *options_of("01_sample", tmp_path, server))
        assert code == 0 and "complete already" in out and len(server.received) == asked
    shutil.copy(good / "01_samples.jsonl", tmp_path)
    (tmp_path / "01_args.json").unlink()
    with ChatServer(barred) as server:
        options = ("--model", "served", *options_of("02_score", tmp_path, server))
        code, out, err = call("02_score", *options)
    assert code == 0, err
    nulls = {
        row["id"] for row in read_rows(tmp_path / "02_scores.jsonl") if not row["responses"][0]["scores"]
    }
    assert nulls == {"p3"} and re.search(r"answer not readable \(null\) +3\n", out)


def test_a_server_that_is_greedy_is_noticed(tmp_path, call):
    for text, warned in ((lambda body: "always this", True), (answer, False)):
        with ChatServer(answer=text) as server:
            options = options_of("01_sample", tmp_path / str(warned), server)
            code, _, err = call("01_sample", *options)
        assert code == 0 and ("all responses to a prompt are the same" in err) == warned, err


def test_the_key_is_sent_and_never_shown(tmp_path, call, monkeypatch):
    monkeypatch.setenv("SPA_API_KEY", "secret-model-key")
    monkeypatch.setenv("SPA_JUDGE_API_KEY", "secret-judge-key")
    monkeypatch.setenv("HF_TOKEN", "hf_the_users_own")
    with ChatServer() as server, ChatServer() as judge:
        assert call("01_sample", *options_of("01_sample", tmp_path, server))[0] == 0
        judged = ("--judge_endpoint", judge.url, "--judge_model", "strict")
        assert call("02_score", *options_of("02_score", tmp_path, server, *judged))[0] == 0
        assert call("03_refine", *options_of("03_refine", tmp_path, server))[0] == 0
    sent = lambda server: {headers["authorization"] for _, headers, _ in server.received}  # noqa: E731
    assert sent(server) == {"Bearer secret-model-key"} and sent(judge) == {"Bearer secret-judge-key"}
    assert {body["model"] for _, _, body in judge.received} == {"strict"}, "03 keeps the judge of 02"
    for status in ("401", "400", "500"):  # the server repeats the key
        with ChatServer(lambda number, body, status=status: status) as server:
            options = options_of("01_sample", tmp_path / status, server, "--retries", 1)
            code, _, err = call("01_sample", *options)
        assert code == 2 and "secret" not in err, err
    assert "SPA_API_KEY" in call("01_sample", *options_of("01_sample", tmp_path / "401", refusing()))[2]
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"secret" not in file.read_bytes()
    monkeypatch.delenv("SPA_API_KEY")
    with ChatServer() as server:
        assert call("01_sample", *options_of("01_sample", tmp_path / "none", server))[0] == 0
    assert not any("hf_the_users_own" in value for value in sent(server))


def refusing():
    return ChatServer(lambda number, body: "401")


@pytest.mark.parametrize(
    "options, words",
    [
        (("--endpoint", "localhost:8000"), "is a URL such as"),
        (("--endpoint", "http://me:pass@localhost/v1"), "put its key in $SPA_API_KEY"),
        (("--endpoint", "http://localhost/v1?key=1"), "put its key in $SPA_API_KEY"),
        (("--endpoint", "http://localhost/v1", "--concurrency", 0), "--concurrency 0: at least 1"),
        (("--endpoint", "http://localhost/v1", "--concurrency", 1000), "at most 100"),
        (("--endpoint", "http://localhost/v1", "--retries", -1), "--retries -1: at least 0"),
        (("--endpoint", "http://localhost/v1", "--request_timeout", 0), "more than 0 seconds"),
        (("--endpoint", "http://localhost/v1", "--truncate_prompts"), "needs the model's tokenizer"),
        (("--endpoint", "http://localhost/v1", "--chat_template", "x.jinja"), "a server applies its own"),
    ],
)
def test_bad_options(tmp_path, call, options, words):
    code, _, err = call("01_sample", "--run_dir", tmp_path / "run", *options)
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "run").exists()


def test_what_a_server_cannot_do(good, tmp_path, call, monkeypatch):
    shutil.copytree(good, tmp_path / "run")
    (tmp_path / "run" / "02_args.json").unlink()
    (tmp_path / "run" / "02_scores.jsonl").unlink()
    for mode in ("constrained", "expected"):
        code, _, err = call("02_score", "--run_dir", tmp_path / "run", "--score_mode", mode)
        assert code == 2 and "pass --score_mode json" in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call("01_sample", "--run_dir", tmp_path / "x", "--endpoint", "http://localhost/v1")
    assert code == 2 and "asked by one process" in err
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, err = call("01_sample", "--run_dir", tmp_path / "x", "--endpoint", "http://localhost/v1")
    assert code == 2 and "HF_HUB_OFFLINE is set" in err


def test_a_run_is_not_moved_from_a_server_to_a_local_model(good, tmp_path, call, tiny):
    shutil.copytree(good, tmp_path / "run")
    prompts = ("--prompts", good / "prompts.jsonl", "--n", 3, "--system_prob", 0.4)
    code, _, err = call("01_sample", "--run_dir", tmp_path / "run", *prompts, "--model", "served")
    assert code == 2 and "was made with --endpoint http" in err


def test_another_judge_for_a_local_model(tiny, tmp_path, call):
    """Sampled here, judged there: a warning, and training stays with the model of stage 1."""
    sampled = ("--prompts", prompts_in(tmp_path), "--model", tiny(), "--n", 3, "--max_new_tokens", 8)
    assert call("01_sample", "--run_dir", tmp_path, *sampled)[0] == 0
    with ChatServer() as server:
        judged = ("--judge_endpoint", server.url, "--judge_model", "strict", "--score_mode", "json")
        code, _, err = call("02_score", "--run_dir", tmp_path, *judged)
        assert code == 0 and "no longer self-alignment" in err, err
        code, out, err = call("03_refine", "--run_dir", tmp_path, "--max_new_tokens", 8)
        assert code == 0 and "no longer self-alignment" in err, err
        assert f"strict at {server.url}: " in out and f"{tiny()}: " in out
    facts = json.loads((tmp_path / "03_args.json").read_text())["facts"]
    assert facts["model"] == tiny() and facts["judge_model"] == "strict" and facts["endpoint"] is None
    rows = read_rows(tmp_path / "03_refined.jsonl")
    assert all(r["scores"] for row in rows for r in [*row["responses"], row["refined"]])
    code, _, err = call("02_score", "--run_dir", tmp_path, "--judge_model", tiny("bos"), "--overwrite")
    assert code == 0 and f"{tiny('bos')} judges the responses of {tiny()}" in err
    facts = json.loads((tmp_path / "02_args.json").read_text())["facts"]
    assert facts["model"] == tiny() and facts["judge_model"] == tiny("bos")


def test_a_local_judge_scores_a_server_s_rows_in_batches(tiny, tmp_path, call, monkeypatch):
    with ChatServer() as server:
        for stage in ("01_sample", "02_score"):
            assert call(stage, *options_of(stage, tmp_path, server))[0] == 0
        judge, sizes = common.judge, []
        monkeypatch.setattr(common, "judge", lambda *a, **o: sizes.append(len(a[1])) or judge(*a, **o))
        options = ("--run_dir", tmp_path, "--judge_model", tiny(), "--score_mode", "expected")
        options += ("--endpoint", server.url, "--attempts", 2, "--batch_size", 10)
        code, _, err = call("03_refine", *options)
        assert code == 0 and sizes == [10, 10, 4], err
        output, record = tmp_path / "03_refined.jsonl", tmp_path / "03_args.json"
        whole = output.read_bytes()
        output.write_bytes(b"".join(whole.splitlines(keepends=True)[2:7]))
        record.write_text(record.read_text().replace('"complete": true', '"complete": false'))
        code, _, err = call("03_refine", *options)
    assert code == 0 and output.read_bytes() == whole, err


def test_control_tokens_reach_a_server_as_text(tmp_path, call):
    spelled = ["<|im_end|>", "<|im_start|>system", "</s>", "[INST]", "[/INST]", "<end_of_turn>", "<|eot_id|>"]
    kept = ["a < b | c > d", "[INSTALL]", "<script>", "x[0]", "<s", "<|>"]
    prompts = write_rows(
        tmp_path / "prompts.jsonl",
        [{"id": "a", "prompt": " ".join(spelled)}, {"id": "b", "prompt": " ".join(kept)}],
    )
    with ChatServer() as server:
        options = ("--run_dir", tmp_path, "--prompts", prompts, "--endpoint", server.url, "--n", 3)
        code, _, err = call("01_sample", *options)
    assert code == 0 and err.count("control tokens") == 1
    asked = {body["messages"][-1]["content"] for _, _, body in server.received}
    assert not any(token in prompt for prompt in asked for token in spelled)
    assert " ".join(kept) in asked and "< |im_end|>" in " ".join(asked)
    assert read_rows(tmp_path / "01_samples.jsonl")[0]["prompt"] == " ".join(spelled), (
        "the rows keep the text"
    )


@pytest.mark.parametrize("kind", ["plain", "bos"])
def test_defused_text_has_no_special_token(tiny, kind):
    tokenizer = common.load_tokenizer(tiny(kind))
    endpoint = common.Endpoint("http://localhost/v1", "m", "SPA_API_KEY", 1, 1.0, 0)
    text = "a <|im_end|>\n<|im_start|>system\nb <s> c </s>"
    special = set(tokenizer.all_special_ids)
    assert special & set(tokenizer(text, add_special_tokens=False).input_ids)
    ids = tokenizer(endpoint.defuse(text), add_special_tokens=False).input_ids
    assert not special & set(ids), tokenizer.convert_ids_to_tokens(ids)


def test_killed_at_any_moment_gives_the_same_files(good, tmp_path):
    rng = random.Random(0)
    with ChatServer(delay=0.1) as server:
        for stage, file in FILES.items():
            options, path, kept = options_of(stage, tmp_path, server, "--concurrency", 2), tmp_path / file, 0
            for _ in range(3):
                launch = Launch(f"{stage}.py", *options, HF_HUB_OFFLINE="0")
                killed = launch.kill_when(
                    lambda path=path, old=kept: count_rows(path) > old, rng.random() * 0.1
                )
                assert killed, "no run was killed: this test would show nothing"
                assert count_rows(path) > kept
                kept = count_rows(path)
            code, _, err = Launch(f"{stage}.py", *options, HF_HUB_OFFLINE="0").finish()
            assert code == 0, err
    same_files(tmp_path, good)


def test_an_interrupt_does_not_wait_for_the_server(tmp_path):
    def script(number, body):
        if number > 6:
            time.sleep(60)
        return "ok"

    with ChatServer(script) as server:
        options = options_of("01_sample", tmp_path, server, "--concurrency", 2)
        launch = Launch("01_sample.py", *options, HF_HUB_OFFLINE="0")
        while len(server.received) < 9:
            time.sleep(0.05)
        started = time.time()
        os.kill(launch.running[0].pid, signal.SIGINT)
        code, _, err = launch.finish(timeout=20)
    assert code == 130 and "goes on where it stopped" in err and time.time() - started < 10
    assert len(read_rows(tmp_path / "01_samples.jsonl")) >= 1
