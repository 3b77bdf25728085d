"""Stage 6: the losses to the digit, the gradient against a naive reference, and what a run leaves behind."""

import functools
import importlib
import json
import math
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import make_model, make_tokenizer, read_rows, scored_row, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
from common import UserError

pairs_stage = importlib.import_module("05_pairs")
train = importlib.import_module("06_train")


def test_weights_of_the_fixture():
    gaps = [5, 5, 4, 0, 1, 1]
    assert train.pair_weights(gaps, 1).tolist() == [1.875, 1.875, 1.5, 0, 0.375, 0.375]
    assert train.pair_weights([5, 5, 4, 1, 1], 1).mean().item() == pytest.approx(1)
    assert train.pair_weights([2, 6], 2).tolist() == [0.25, 2.25]
    assert train.pair_weights([2, 6], 2, mean_gap=2).tolist() == [1, 9]
    with pytest.raises(UserError, match="mean gap is 0"):
        train.pair_weights([0, 0], 1)


def test_loss_of_the_fixture():
    chosen, rejected = torch.tensor([-1.0, -0.8]), torch.tensor([-1.2, -1.3])
    weights = train.pair_weights([2, 6], 2)
    spa = train.spa_loss(chosen, rejected, weights, beta=2.0, gamma=0.5)
    assert spa.shape == (2,) and spa.mean().item() == pytest.approx(0.6263862, abs=1e-6)
    simpo = train.spa_loss(chosen, rejected, torch.ones(2), beta=2.0, gamma=0.5)
    assert simpo.mean().item() == pytest.approx(0.6092368, abs=1e-6)


def test_signs_and_gradients_of_the_losses():
    chosen = torch.tensor([-1.0, -2.0], requires_grad=True)
    rejected = torch.tensor([-1.5, -0.5], requires_grad=True)
    weights = torch.tensor([1.0, 0.0])
    train.spa_loss(chosen, rejected, weights, 2.0, 0.5).sum().backward()
    assert chosen.grad[0] < 0 < rejected.grad[0], "descent raises the chosen and lowers the rejected"
    assert chosen.grad[1] == rejected.grad[1] == 0, "a pair with gap 0 teaches nothing"
    # d/dc of −w log σ(β(c − r) − γ) = −w β σ(−(β(c − r) − γ)), by hand
    assert chosen.grad[0].item() == pytest.approx(-2.0 / (1 + math.exp(2.0 * 0.5 - 0.5)), abs=1e-6)
    far = train.spa_loss(torch.tensor([-900.0]), torch.tensor([0.0]), torch.ones(1), 2.0, 0.5)
    assert far.item() == pytest.approx(1800.5), "no overflow"
    dpo = train.dpo_loss(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), beta=0.1)
    assert dpo.item() == pytest.approx(math.log1p(math.exp(-0.2)), abs=1e-6)


# -------------------------------------------------------------------------------- encoding


def turn(role: str, content: str) -> list[dict]:
    return [{"role": role, "content": content}]


@pytest.mark.parametrize("kind", ["plain", "bos", "pad_eos", "default_system", "no_end"])
def test_a_response_is_its_tokens_and_one_end_token(kind):
    tokenizer = make_tokenizer(kind)
    prompt, ids = train.encode_response(
        tokenizer, turn("user", "Why?"), turn("assistant", "It is."), [3], 999
    )
    assert prompt == common.encode_prompt(tokenizer, "Why?"), "trained on what generation sees"
    assert ids == [
        *tokenizer("It is." + ("|\n" if kind == "no_end" else ""), add_special_tokens=False).input_ids,
        3,
    ]
    assert ids.count(3) == 1 and 1 not in ids


def test_hostile_responses_do_not_end_early():
    tokenizer = make_tokenizer("plain")
    text = "a<|im_end|>\n<|im_start|>user\nb"
    _, ids = train.encode_response(tokenizer, turn("user", "Why?"), turn("assistant", text), [3], 999)
    assert ids.count(3) == 1 and ids[-1] == 3 and tokenizer.decode(ids[:-1]) == text


def test_an_empty_response_is_its_end_token():
    tokenizer = make_tokenizer("plain")
    assert train.encode_response(tokenizer, turn("user", "Why?"), turn("assistant", ""), [3], 999)[1] == [3]


def test_long_prompts_lose_their_left_and_long_responses_are_dropped():
    tokenizer = make_tokenizer("plain")
    whole, ids = train.encode_response(
        tokenizer, turn("user", "Why? " * 20), turn("assistant", "So."), [3], 999
    )
    short, same = train.encode_response(
        tokenizer, turn("user", "Why? " * 20), turn("assistant", "So."), [3], len(ids) + 7
    )
    assert same == ids and short == whole[-7:]
    assert (
        train.encode_response(tokenizer, turn("user", "Why?"), turn("assistant", "So."), [3], len(ids))
        is None
    )


def test_a_template_that_rewrites_its_prompt_is_refused():
    with pytest.raises(UserError, match="pass a plain one with --chat_template"):
        train.encode_response(
            make_tokenizer("not_a_prefix"), turn("user", "a"), turn("assistant", "b"), [3], 99
        )


def test_right_padding_and_masks_by_position():
    batch = train.to_batch([([7, 8], [9, 3]), ([7], [3])], "cpu")
    assert batch["input_ids"].tolist() == [[7, 8, 9, 3], [7, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["response_mask"].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]


def test_pack_keeps_the_budget_and_every_item():
    rng = random.Random(0)
    lengths = [[rng.randint(1, 60) for _ in range(rng.randint(1, 6))] for _ in range(200)]
    bins = train.pack(lengths, 256)
    assert sorted(i for members in bins for i in members) == list(range(200))
    for members in bins:
        rows = [length for i in members for length in lengths[i]]
        assert len(rows) * max(rows) <= 256 or len(members) == 1


# -------------------------------------------------------------------------------- gradients


def make_pairs(prompts: int = 5, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    words = ["the", "a", "harm", "help", "answer", "question", "is", "not", "safe", "because", "you", "again"]
    rows = []
    for p in range(prompts):
        candidates = [[rng.randint(1, 8), rng.randint(1, 8)] for _ in range(3)]
        texts = [" ".join(rng.choices(words, k=rng.randint(1, 25))) for _ in range(3)]
        rows.append(scored_row(f"p{p}", candidates, [9, 9], texts))
    return [pair for row in rows for pair in pairs_stage.build_pairs(row, pairs_stage.Args(delta=1.0))]


def naive_loss(model, reference, tokenizer, pairs: list[dict], args) -> torch.Tensor:
    """Two plain forward passes a pair in float64, equation 3 written out; no code of the stage."""

    def logps(model, pair, side):
        prompt = tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
        a = tokenizer(prompt, add_special_tokens=False).input_ids
        b = [*tokenizer(pair[side][0]["content"], add_special_tokens=False).input_ids, 3]
        logits = model(torch.tensor([a + b])).logits[0]
        steps = logits[len(a) - 1 : -1].log_softmax(-1)
        return steps[range(len(b)), b].sum(), len(b)

    if args.loss == "sft":
        distinct = {(p["id"], p["chosen"][0]["content"]): p for p in pairs}.values()
        parts = [logps(model, pair, "chosen") for pair in distinct]
        return -sum(total for total, _ in parts) / sum(count for _, count in parts)
    gaps = [pair["gap"] for pair in pairs]
    losses = []
    for pair in pairs:
        (chosen, m), (rejected, n) = (logps(model, pair, side) for side in ("chosen", "rejected"))
        if args.loss == "dpo":
            with torch.no_grad():
                base = [logps(reference, pair, side)[0] for side in ("chosen", "rejected")]
            inner = args.beta * ((chosen - base[0]) - (rejected - base[1]))
            losses.append(torch.log1p(torch.exp(-inner)))
            continue
        weight = (pair["gap"] / np.mean(gaps)) ** args.alpha if args.loss == "spa" else 1.0
        inner = args.beta * chosen / m - args.beta * rejected / n - args.beta * args.gamma_beta_ratio
        losses.append(weight * torch.log1p(torch.exp(-inner)))
    return sum(losses) / len(losses)


PLAIN = Accelerator(cpu=True)  # one process


@pytest.mark.parametrize("budget", [100_000, 300, 60], ids=["one batch", "several", "prompts split"])
@pytest.mark.parametrize("loss", ["spa", "simpo", "dpo", "sft"])
def test_gradient_equals_a_naive_float64_step(loss, budget):
    tokenizer = make_tokenizer("pad_eos")
    args = train.Args(loss=loss, alpha=2.0, beta=0.1 if loss == "dpo" else 2.0, tokens_per_batch=budget)
    reference, model = make_model(len(tokenizer), 0), make_model(len(tokenizer), 1)
    pairs = make_pairs()
    groups, dropped = train.group_pairs(tokenizer, pairs, [3], args)
    assert dropped == 0 and sum(len(group["sequences"]) for group in groups) < 2 * len(pairs)
    train.set_weights(groups, args, None)
    for network in (reference, model):
        network.forward = functools.partial(train.response_logps, network)
    for group, values in zip(groups, train.all_logps(PLAIN, reference, groups, 512), strict=True):
        group["reference"] = values.tolist()
    denominator = train.denominator_of(groups, args)
    sums = train.backward_step(PLAIN, model, groups, args, denominator)
    ours = {name: p.grad.double() for name, p in model.named_parameters()}

    for network in (reference, model):
        del network.forward
    double = model.double()
    double.zero_grad()
    value = naive_loss(double, reference.double(), tokenizer, pairs, args)
    value.backward()
    assert sums["loss"] / denominator == pytest.approx(value.item(), rel=1e-5)
    for name, p in double.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
        error = (ours[name] - p.grad).norm() / p.grad.norm()
        assert error < 2e-5, (name, error)


def test_chunks_do_not_change_the_log_probabilities(monkeypatch):
    tokenizer = make_tokenizer("plain")
    model = make_model(len(tokenizer))
    batch = train.to_batch([([5, 6, 7], [8, 9, 10, 3]), ([5], [6, 7, 3])], "cpu")
    whole = train.response_logps(model, **batch)
    monkeypatch.setattr(train, "PROJECTION_CHUNK", 2)
    assert torch.allclose(train.response_logps(model, **batch), whole, atol=1e-6)
    alone = train.response_logps(model, **train.to_batch([([5], [6, 7, 3])], "cpu"))
    assert torch.allclose(alone, whole[1:], atol=1e-5), "padding does not count"


def test_gap_mean_of_the_batch():
    groups = [{"pairs": [(0, 1, 2), (0, 2, 6)]}, {"pairs": [(0, 1, 4)]}]
    args = train.Args(alpha=1.0)
    train.set_weights(groups, args, None)
    assert [group["weights"] for group in groups] == [[0.5, 1.5], [1.0]]
    train.set_weights(groups[1:], args, None)
    assert groups[1]["weights"] == [1.0]
    train.set_weights(groups, args, 2.0)
    assert [group["weights"] for group in groups] == [[1.0, 3.0], [2.0]]


def test_schedule_moves_at_once_and_ends_at_zero():
    factors = [train.learning_rate_factor(step, 20, 0.1) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0] and factors[3] < 1
    assert 0 < factors[-1] < 0.01 and factors[1:] == sorted(factors[1:], reverse=True)
    assert train.learning_rate_factor(0, 1, 0.1) == 1.0


def test_every_epoch_sees_every_prompt_once_in_another_order():
    steps = train.plan_steps(10, train.Args(epochs=2, batch_size=4))
    assert [len(step) for step in steps] == [4, 4, 2] * 2
    first, second = ([i for step in half for i in step] for half in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


# -------------------------------------------------------------------------------- whole runs


@pytest.fixture
def run_dir(tmp_path):
    write_rows(tmp_path / "05_pairs.jsonl", make_pairs())
    return tmp_path


OPTIONS = ("--learning_rate", 1e-3, "--batch_size", 2, "--epochs", 4)


@pytest.mark.parametrize("loss", ["spa", "simpo", "dpo", "sft"])
def test_a_run_trains_and_saves(tiny, call, run_dir, loss):
    extra = ("--beta", 0.1) if loss == "dpo" else ()
    code, out, err = call(
        "06_train", "--run_dir", run_dir, "--model", tiny(), "--loss", loss, *OPTIONS, *extra
    )
    assert code == 0, err
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (tiny(), run_dir / "06_model"))
    moved = [not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved), "every weight has moved"
    assert AutoTokenizer.from_pretrained(run_dir / "06_model").chat_template
    card = (run_dir / "06_model" / "README.md").read_text()
    assert f"loss `{loss}`" in card and "arXiv 2511.06222" in card
    first, *steps, last = read_rows(run_dir / "06_metrics.jsonl")
    assert len(steps) == 12 and last["train/loss"] < first["train/loss"]
    assert {"step", "epoch", "loss", "grad_norm", "learning_rate", "logps/chosen"} <= set(steps[0])
    if loss != "sft":
        assert last["train/rewards/margins"] > first["train/rewards/margins"]
        assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies"} <= set(steps[0])
    assert "before" in out and "the trained model:" in out
    code, out, _ = call("06_train", "--run_dir", run_dir, "--model", tiny(), "--loss", loss, *OPTIONS, *extra)
    assert code == 0 and "complete already" in out
    code, _, err = call("06_train", "--run_dir", run_dir, "--model", tiny(), "--loss", loss, "--epochs", 9)
    assert code == 2 and "was made with --" in err


def test_batch_mean_gap_run_and_two_losses_side_by_side(tiny, call, run_dir):
    common_options = ("06_train", "--run_dir", run_dir, "--model", tiny(), *OPTIONS)
    assert call(*common_options, "--gap_mean", "batch")[0] == 0
    assert call(*common_options, "--loss", "simpo", "--output_dir", run_dir / "06_simpo")[0] == 0
    assert (run_dir / "06_simpo_metrics.jsonl").exists() and (run_dir / "06_metrics.jsonl").exists()


def test_one_seed_one_result(tiny, call, run_dir):
    options = ("--run_dir", run_dir, "--model", tiny(), *OPTIONS)
    for name in ("a", "b"):
        assert call("06_train", *options, "--output_dir", run_dir / name / "06_model")[0] == 0
    a, b = ((run_dir / name / "06_model" / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row.pop("gap"), "line 1: no 'gap'"),
        (lambda row: row.pop("chosen"), "line 1: no 'chosen'"),
        (lambda row: row.update(prompt="text"), "'prompt' must be a list of messages"),
        (lambda row: row.update(gap=-1), "'gap' must be a number"),
    ],
)
def test_bad_pairs_are_one_line(tmp_path, call, tiny, change, words):
    rows = make_pairs()
    change(rows[0])
    write_rows(tmp_path / "05_pairs.jsonl", rows)
    code, _, err = call("06_train", "--run_dir", tmp_path, "--model", tiny())
    assert code == 2 and words in err and "06_train.py: error: " in err and "Traceback" not in err


def test_other_bad_input_is_one_line(tmp_path, call, tiny):
    code, _, err = call("06_train", "--run_dir", tmp_path, "--model", tiny())
    assert code == 2 and "05_pairs.jsonl not found; run 05_pairs.py" in err
    (tmp_path / "05_pairs.jsonl").write_text("")
    code, _, err = call("06_train", "--run_dir", tmp_path, "--model", tiny())
    assert code == 2 and "has no pairs" in err
    rows = [row | {"gap": 0} for row in make_pairs()]
    write_rows(tmp_path / "05_pairs.jsonl", rows)
    code, _, err = call("06_train", "--run_dir", tmp_path, "--model", tiny())
    assert code == 2 and "use --loss simpo" in err
    code, _, err = call("06_train", "--run_dir", tmp_path, "--model", tiny(), "--max_length", 3)
    assert code == 2 and "no response fits" in err
    code, _, err = call("06_train", "--run_dir", tmp_path, "--model", tmp_path / "nothing")
    assert code == 2 and "can't be loaded" in err
    code, out, err = call(
        "06_train", "--run_dir", tmp_path, "--model", tiny(), "--loss", "simpo", "--gamma_beta_ratio", 2
    )
    assert code == 0 and "above 1.6" in err and "γ 4, γ/β 2" in out


def test_invalid_generation_config_does_not_cost_the_run(tmp_path, call, run_dir):
    tokenizer, folder = make_tokenizer("plain"), tmp_path / "odd"
    tokenizer.save_pretrained(folder)
    make_model(len(tokenizer)).save_pretrained(folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps(config | {"do_sample": False, "temperature": 0.6})
    )
    code, _, err = call("06_train", "--run_dir", run_dir, "--model", folder)
    assert code == 0, err
