"""Stage 6: the losses to the digit, the gradient against a naive reference, and what a run leaves behind."""

import functools
import importlib
import json
import math
import random
import types

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import make_kind, make_model, make_tokenizer, read_rows, scored_row, write_rows
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


def test_label_smoothing_by_hand():
    chosen, rejected, weights = torch.tensor([-1.0]), torch.tensor([-1.2]), torch.tensor([3.0])
    z = 2.0 * 0.2 - 0.5
    expected = 3 * (0.9 * math.log1p(math.exp(-z)) + 0.1 * math.log1p(math.exp(z)))
    assert train.spa_loss(chosen, rejected, weights, 2.0, 0.5, 0.1).item() == pytest.approx(
        expected, rel=1e-6
    )
    z = 0.1 * (2.0 - 1.0)
    expected = 0.8 * math.log1p(math.exp(-z)) + 0.2 * math.log1p(math.exp(z))
    sums = (torch.tensor([x]) for x in (-10.0, -12.0, -12.0, -13.0))
    assert train.dpo_loss(*sums, 0.1, 0.2).item() == pytest.approx(expected, rel=1e-6)


def test_losses_equal_those_of_trl(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    cpo = pytest.importorskip("trl.experimental.cpo").CPOTrainer.cpo_loss
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = -3 * torch.rand(2, 50, generator=generator)
    for beta, ratio, smoothing in [(2.0, 0.25, 0.0), (2.5, 0.55, 0.0), (2.5, 1.6, 0.2)]:
        options = {"loss_type": "simpo", "beta": beta, "simpo_gamma": beta * ratio, "alpha": 0.0}
        options |= {"label_smoothing": smoothing, "accelerator": types.SimpleNamespace(device="cpu")}
        losses, *rewards = cpo(types.SimpleNamespace(**options), chosen, rejected)
        ours = train.spa_loss(chosen, rejected, torch.ones(50), beta, beta * ratio, smoothing)
        assert torch.allclose(ours, losses, rtol=1e-6, atol=1e-7)
        assert torch.equal(rewards[0], beta * chosen), "and the same meaning of rewards/chosen"


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
    batch = train.to_batch([([7, 8], [[9, 3]]), ([7], [[3]])], "cpu")
    assert batch.pop("responses") == 2
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[7, 8, 9, 3], [7, 3, 0, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "position_ids": [[0, 1, 2, 3], [0, 1, 0, 0]],
        "parents": [1, 2, 4],
        "targets": [9, 3, 3],
        "owners": [0, 0, 1],
    }


def test_a_shared_prompt_is_seen_by_its_responses_and_they_not_by_each_other():
    batch = train.to_batch([([7, 8], [[9, 3], [5, 3]]), ([7], [[3]])], "cpu")
    assert batch["responses"] == 3
    assert batch["input_ids"].tolist() == [[7, 8, 9, 3, 5, 3], [7, 3, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3], [0, 1, 0, 0, 0, 0]]
    assert batch["parents"].tolist() == [1, 2, 1, 4, 6]
    assert batch["targets"].tolist() == [9, 3, 5, 3, 3] and batch["owners"].tolist() == [0, 0, 1, 1, 2]
    first, second = batch["attention_mask"][:, 0].int().tolist()
    assert first == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    assert second[:2] == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]], "padding sees only itself"


def test_prompts_are_shared_where_it_is_cheaper_and_fits():
    def group(prompt, *responses):
        return {"sequences": [([1] * prompt, [2] * response) for response in responses]}

    assert train.share_prompts(group(50, 10, 20, 30), 64, 1000) == [[0, 1, 2]]
    assert train.share_prompts(group(50, 10, 20, 30), 64, 90) == [[0, 1], [2]]
    assert train.share_prompts(group(50, 10, 20, 30), 64, 70) == [[0], [1], [2]]
    assert train.share_prompts(group(5, 500, 500), 64, 9999) == [[0], [1]], "attention would cost more"
    cut = {"sequences": [([1] * 9, [2] * 3), ([1] * 8, [2] * 4)]}
    assert train.share_prompts(cut, 64, 1000) == [[0], [1]], "prompts that were cut differently differ"


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
    smoothing = args.label_smoothing
    gaps = [pair["gap"] for pair in pairs]
    losses = []
    for pair in pairs:
        (chosen, m), (rejected, n) = (logps(model, pair, side) for side in ("chosen", "rejected"))
        if args.loss == "dpo":
            with torch.no_grad():
                base = [logps(reference, pair, side)[0] for side in ("chosen", "rejected")]
            inner = args.beta * ((chosen - base[0]) - (rejected - base[1]))
            losses.append(
                (1 - smoothing) * torch.log1p(torch.exp(-inner)) + smoothing * torch.log1p(torch.exp(inner))
            )
            losses[-1] = losses[-1] - args.sft_weight * chosen / m
            continue
        weight = (pair["gap"] / np.mean(gaps)) ** args.alpha if args.loss == "spa" else 1.0
        inner = args.beta * chosen / m - args.beta * rejected / n - args.beta * args.gamma_beta_ratio
        smooth = (1 - smoothing) * torch.log1p(torch.exp(-inner)) + smoothing * torch.log1p(torch.exp(inner))
        losses.append(weight * smooth - args.sft_weight * chosen / m)
    return sum(losses) / len(losses)


PLAIN = Accelerator(cpu=True)  # one process


@pytest.mark.parametrize("budget", [100_000, 300, 60], ids=["one batch", "several", "prompts split"])
@pytest.mark.parametrize("loss", ["spa", "simpo", "dpo", "sft", "spa with extras", "dpo with extras"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
def test_gradient_equals_a_naive_float64_step(loss, budget, share):
    tokenizer = make_tokenizer("pad_eos")
    loss, extras = loss.removesuffix(" with extras"), loss.endswith("extras")
    args = train.Args(loss=loss, alpha=2.0, beta=0.1 if loss == "dpo" else 2.0, tokens_per_batch=budget)
    if extras:
        args.label_smoothing, args.sft_weight = 0.1, 0.3
    reference, model = make_model(len(tokenizer), 0), make_model(len(tokenizer), 1)
    pairs = make_pairs()
    groups, dropped = train.group_pairs(tokenizer, pairs, [3], args)
    assert dropped == 0 and sum(len(group["sequences"]) for group in groups) < 2 * len(pairs)
    train.set_weights(groups, args, None)
    for group in groups:
        group["rows"] = train.share_prompts(group, 32, budget if share else 0)
    shared = any(len(row) > 1 for group in groups for row in group["rows"])
    assert shared == share
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


# kinds of models that change the logits of their output head
HEADS = {
    "gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "head_dim": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}


@pytest.mark.parametrize("kind", HEADS)
def test_log_probabilities_are_the_models_own(kind, monkeypatch):
    """Against log-softmax of the model's own logits; a change that isn't known is refused."""
    model = make_kind(kind, 300, **HEADS[kind])
    rows = [([5, 6, 7, 8], [[9, 10, 11]]), ([12], [[13, 14]])]
    train.check_logits(model, [5, 6, 7, 8, 9, 10])
    with torch.no_grad():
        found = train.response_logps(model, **train.to_batch(rows, "cpu"))
        for value, (prompt, (response,)) in zip(found, rows, strict=True):
            logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            plain = sum(logps[len(prompt) + i - 1, token] for i, token in enumerate(response))
            assert value.item() == pytest.approx(plain.item(), abs=1e-4)
    monkeypatch.setattr(train, "logits_of", lambda model, states: model.get_output_embeddings()(states))
    with pytest.raises(UserError, match="logits_of in 06_train"):
        train.check_logits(model, [5, 6, 7, 8, 9, 10])


def test_chunks_do_not_change_the_log_probabilities(monkeypatch):
    tokenizer = make_tokenizer("plain")
    model = make_model(len(tokenizer))
    batch = train.to_batch([([5, 6, 7], [[8, 9, 10, 3]]), ([5], [[6, 7, 3]])], "cpu")
    whole = train.response_logps(model, **batch)
    monkeypatch.setattr(train, "PROJECTION_CHUNK", 2)
    assert torch.allclose(train.response_logps(model, **batch), whole, atol=1e-6)
    alone = train.response_logps(model, **train.to_batch([([5], [[6, 7, 3]])], "cpu"))
    assert torch.allclose(alone, whole[1:], atol=1e-5), "padding does not count"
    tree = train.response_logps(model, **train.to_batch([([5], [[9, 8, 3], [6, 7, 3]]), ([5], [[3]])], "cpu"))
    assert torch.allclose(tree[1], whole[1], atol=1e-5), "nor do other responses"


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
    assert all(name in train.__doc__ for name in steps[0]), "every metric is explained"
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


def test_held_out_prompts_are_measured_and_not_trained_on(tiny, call, run_dir):
    options = ("--run_dir", run_dir, "--model", tiny(), "--learning_rate", 1e-3, "--epochs", 3)
    code, out, err = call("06_train", *options, "--eval_fraction", 0.4, "--batch_size", 1)
    assert code == 0, err
    assert "prompts: 5 (2 held out)" in out and "over 2 held-out prompts" in out
    rows = read_rows(run_dir / "06_metrics.jsonl")
    evaluated = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evaluated] == [0, 3, 6, 9], "before, and at the end of every epoch"
    assert {"eval/rewards/margins", "eval/rewards/accuracies", "eval/logps/chosen"} <= set(evaluated[0])
    assert sum("learning_rate" in row for row in rows) == 9 and not any("train/loss" in row for row in rows)

    args = train.Args(eval_fraction=0.4)
    groups, _ = train.group_pairs(make_tokenizer("plain"), make_pairs(), [3], args)
    kept, held_out = train.split_prompts(groups, args)
    assert (
        len(kept) == 3
        and len(held_out) == 2
        and {g["id"] for g in kept + held_out} == {f"p{i}" for i in range(5)}
    )
    assert train.split_prompts(groups, args) == (kept, held_out)
    args.seed = 3
    assert train.split_prompts(groups, args) != (kept, held_out)


def test_held_out_pairs_are_weighted_by_the_training_mean_gap():
    args = train.Args(alpha=1.0)
    groups, held_out = [{"pairs": [(0, 1, 2), (0, 2, 6)]}], [{"pairs": [(0, 1, 8)]}]
    train.set_weights(held_out, args, train.set_weights(groups, args, None))
    assert held_out[0]["weights"] == [2.0]


def test_weight_statistics_by_hand():
    statistics = train.weight_statistics([{"weights": [2.0, 0.0]}, {"weights": [1.0, 1.0]}])
    assert statistics["weights/effective_sample_size"] == pytest.approx(16 / 6 / 4)
    assert statistics["weights/zero_fraction"] == 0.25
    statistics = train.weight_statistics([{"weights": [0.0, 0.0]}])
    assert list(statistics.values()) == [0.0, 1.0], "a batch whose totals are all equal"


def test_tensorboard_gets_what_the_file_gets(tiny, call, run_dir):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = ("--run_dir", run_dir, "--model", tiny(), *OPTIONS, "--tracker", "tensorboard")
    code, _, err = call("06_train", *options)
    assert code == 0, err
    log = events.EventAccumulator(str(next(run_dir.rglob("events.out*")).parent))
    log.Reload()
    rows = [row for row in read_rows(run_dir / "06_metrics.jsonl") if "learning_rate" in row]
    for name in ("loss", "rewards/chosen", "rewards/margins", "weights/zero_fraction", "num_tokens"):
        points = log.Scalars(name)
        assert [point.step for point in points] == [row["step"] for row in rows]
        assert [point.value for point in points] == pytest.approx([row[name] for row in rows], rel=1e-6)
    assert "train/loss" in log.Tags()["scalars"]


def test_a_tracker_that_is_not_there_is_one_line(tiny, call, run_dir, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = call("06_train", "--run_dir", run_dir, "--model", tiny(), "--tracker", "wandb")
    assert code == 2 and "--tracker wandb: it is not installed; python -m pip install wandb" in err


def test_gradient_checkpointing_and_attention_change_nothing_but_the_way(tiny, call, run_dir):
    weights = []
    for name, extra in {
        "a": (), "b": ("--gradient_checkpointing",), "c": ("--attn_implementation", "eager")
    }.items():  # fmt: skip
        folder = run_dir / name / "06_model"
        options = ("--run_dir", run_dir, "--model", tiny(), *OPTIONS, "--output_dir", folder, *extra)
        code, _, err = call("06_train", *options)
        assert code == 0, err
        weights.append(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    for other in weights[1:]:
        assert max((weights[0][k] - other[k]).abs().max().item() for k in other) < 1e-5
    options = ("--run_dir", run_dir, "--model", tiny(), "--output_dir", run_dir / "d" / "06_model")
    code, _, err = call("06_train", *options, "--attn_implementation", "no_such")
    assert code == 2 and "can't be loaded" in err and "Traceback" not in err


def test_a_model_that_takes_no_such_masks_gets_separate_rows(tiny, call, run_dir, monkeypatch):
    options = ("--run_dir", run_dir, "--model", tiny(), *OPTIONS)
    losses, original = {}, train.to_batch

    def leaky(rows, device):
        """Responses of a row see each other, as in a model that only knows causal masks."""
        batch = original(rows, device)
        if batch["attention_mask"].ndim == 4:
            batch["attention_mask"] = torch.ones_like(batch["attention_mask"]).tril()
        return batch

    for name, extra in {"shared": (), "separate": ("--no-share_prompts",), "probed": ()}.items():
        if name == "probed":
            monkeypatch.setattr(train, "to_batch", leaky)
        code, _, err = call("06_train", *options, *extra, "--output_dir", run_dir / name / "06_model")
        assert code == 0 and ("each gets its own row" in err) == (name == "probed"), err
        losses[name] = [row.get("loss", 0) for row in read_rows(run_dir / name / "06_metrics.jsonl")]
    assert losses["shared"] == pytest.approx(losses["separate"], rel=1e-4)
    assert losses["probed"] == losses["separate"]


def test_dropout_is_off_even_where_activations_are_recomputed(tmp_path, call, run_dir):
    tokenizer, model = make_tokenizer("plain"), make_model(420)
    model.config.attention_dropout = 0.9
    tokenizer.save_pretrained(tmp_path / "dropout")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "dropout")
    finals = []
    for extra in ((), ("--gradient_checkpointing",)):
        options = ("--run_dir", run_dir, "--model", tmp_path / "dropout", *OPTIONS, "--overwrite", *extra)
        code, _, err = call("06_train", *options)
        assert code == 0, err
        finals.append(read_rows(run_dir / "06_metrics.jsonl")[-1]["train/loss"])
    assert finals[0] == pytest.approx(finals[1], rel=1e-4)


def test_one_pair_trains(tmp_path, tiny, call):
    write_rows(tmp_path / "05_pairs.jsonl", make_pairs()[:1])
    options = ("--run_dir", tmp_path, "--model", tiny())
    code, out, err = call("06_train", *options, "--learning_rate", 1e-3)
    assert code == 0 and "effective sample size 100% of the pairs" in out, err
    first, _, last = read_rows(tmp_path / "06_metrics.jsonl")
    assert last["train/loss"] < first["train/loss"]
    code, _, err = call(
        "06_train", *options, "--eval_fraction", 0.1, "--output_dir", tmp_path / "x" / "06_model"
    )
    assert code == 2 and "--eval_fraction leaves none of 1 prompts to train on" in err


def test_a_loss_that_is_not_finite_names_its_prompts(tmp_path, tiny, call):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny()), AutoTokenizer.from_pretrained(tiny())
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    write_rows(tmp_path / "05_pairs.jsonl", make_pairs(2))
    code, _, err = call("06_train", "--run_dir", tmp_path, "--model", tmp_path / "broken")
    assert code == 2 and "the loss is not finite" in err and "p0" in err and "p1" in err
    assert not (tmp_path / "06_model").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--label_smoothing", 0.5), "--label_smoothing 0.5: from 0 to below 0.5 is wanted"),
        (("--eval_fraction", 1), "--eval_fraction 1.0: from 0 to below 1 is wanted"),
        (("--loss", "sft", "--sft_weight", 1), "not for --loss sft"),
        (("--save_steps", -1), "--save_steps -1: at least 0 is wanted"),
    ],
)
def test_bad_options_are_one_line(run_dir, tiny, call, options, words):
    code, _, err = call("06_train", "--run_dir", run_dir, "--model", tiny(), *options)
    assert code == 2 and words in err


def test_a_tokenizer_that_does_not_fit_is_one_line(tmp_path, call, run_dir):
    make_tokenizer("plain").save_pretrained(tmp_path / "small")
    make_model(100).save_pretrained(tmp_path / "small")
    code, _, err = call("06_train", "--run_dir", run_dir, "--model", tmp_path / "small")
    assert code == 2 and "the tokenizer has" in err and "the model only 100" in err
