"""Stage 6: the losses to the digit, the gradient against a naive reference, and what a run leaves behind."""

import contextlib
import importlib
import json
import math
import os
import random
import shutil
import stat

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import FAMILIES, make_kind, make_model, make_tokenizer, read_rows, refused, scored_row, write_rows
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import common

pairs_stage = importlib.import_module("05_pairs")
train = importlib.import_module("06_train")


def test_weights_and_losses_by_hand():
    """To the digit; where they go wrong in a whole step, the naive reference below shows it."""
    assert train.pair_weights([5, 5, 4, 0, 1, 1], 1).tolist() == [1.875, 1.875, 1.5, 0, 0.375, 0.375]
    chosen, rejected = torch.tensor([-1.0, -0.8]), torch.tensor([-1.2, -1.3])
    for weights, value in ((train.pair_weights([2, 6], 2), 0.6263862), (torch.ones(2), 0.6092368)):
        losses = train.spa_loss(chosen, rejected, weights, beta=2.0, gamma=0.5)
        assert losses.shape == (2,) and losses.mean().item() == pytest.approx(value, abs=1e-6)
    far = train.spa_loss(torch.tensor([-900.0]), torch.tensor([0.0]), torch.ones(1), 2.0, 0.5)
    assert far.item() == pytest.approx(1800.5), "no overflow"


def test_signs_and_gradients_of_the_losses():
    chosen = torch.tensor([-1.0, -2.0], requires_grad=True)
    rejected = torch.tensor([-1.5, -0.5], requires_grad=True)
    weights = torch.tensor([1.0, 0.0])
    train.spa_loss(chosen, rejected, weights, 2.0, 0.5).sum().backward()
    assert chosen.grad[0] < 0 < rejected.grad[0], "descent raises the chosen and lowers the rejected"
    assert chosen.grad[1] == rejected.grad[1] == 0, "a pair with gap 0 teaches nothing"
    # d/dc of −w log σ(β(c − r) − γ) = −w β σ(−(β(c − r) − γ)), by hand
    assert chosen.grad[0].item() == pytest.approx(-2.0 / (1 + math.exp(2.0 * 0.5 - 0.5)), abs=1e-6)
    dpo = train.dpo_loss(*(torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)), beta=0.1)
    assert dpo.item() == pytest.approx(math.log1p(math.exp(-0.2)), abs=1e-6)


# -------------------------------------------------------------------------------- rows and their tokens


def turn(role: str, content: str) -> list[dict]:
    return [{"role": role, "content": content}]


BEFORE = {"no generation prompt": " ", "system before the last": " ", "channels": "<s>final\n"}


@pytest.mark.parametrize("family", [*FAMILIES, "pad_eos", "no_end"])
def test_a_response_is_what_the_model_wrote_and_one_end_token(family):
    """FAULTS 6, 7 and 9: the prompt is what generation sees; what met the limit is taught neither end nor closing."""
    tokenizer = make_tokenizer("bos" if family in FAMILIES else family)
    tokenizer.chat_template = FAMILIES.get(family, tokenizer.chat_template)
    if family == "eos at the end":
        tokenizer.eos_token = "<unk>"  # not its template's end of turn
    end = "|\n<|im_end|>" if family == "no_end" else "<|im_end|>"
    ends = common.end_token_ids(tokenizer, make_model(420))
    for text in ("It is.", "<think>\nIs it", "a<|im_end|>\n<|im_start|>user\nb", "<think>\nHm.\n</think>\n\nIt is."):
        lost = family in ("thought opened", "parts only")
        with refused("the chat template") if lost else contextlib.nullcontext():
            for truncated in (False, True):
                answer = turn("assistant", text)[0]
                prompt, ids = train.encode_response(tokenizer, turn("user", "Why?"), answer, truncated, ends)
                assert prompt == common.encode_chat(tokenizer, turn("user", "Why?"))
                assert tokenizer.decode(ids) == BEFORE.get(family, "") + text + end * (not truncated)
                assert ids.count(3) == (not truncated), "what a response spells is text"


def pair(chosen: str, rejected: str, **more) -> dict:
    """A row as `read_pairs` gives it."""
    sides = {"chosen": turn("assistant", chosen)[0], "rejected": turn("assistant", rejected)[0]}
    return {"id": "a", "prompt": turn("user", "Why? " * 5), **sides, "gap": 1, **more}


def group(*pairs: dict, **options):
    return train.group_pairs(make_tokenizer("plain"), list(pairs), [3], train.Args(**options))


def test_long_prompts_lose_their_left_and_long_responses_are_dropped():
    ((whole,), none), text = group(pair("So.", "No.")), "So. " * 30
    assert not any(none.values()) and not whole["shortened"]
    ids = [ids for _, ids in whole["sequences"]]
    (short,), dropped = group(pair("So.", "No."), pair("So.", text), max_length=len(ids[0]) + 7)
    assert dropped["longer than --max_length"] == 1 and len(short["pairs"]) == 1 and short["shortened"] == 2
    assert short["sequences"] == [(prompt[-7:], ids) for prompt, ids in whole["sequences"]]
    assert group(pair("So.", "No."), max_length=len(ids[0]))[0] == []


def test_pairs_of_equal_tokens_and_blank_responses_are_dropped():
    """FAULTS 8: a template that trims makes "Yes." and "Yes.\\n" one response; FAULTS 15: blank ones teach silence.

    A truncated and a whole response of one text are two.
    """
    tokenizer = make_tokenizer("plain")
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'] | trim")
    rows = [pair("Yes.", "Yes.\n"), pair("Yes.", "No."), pair("Yes.\n", "No."), pair(" ", "No."), pair("Yes.", "")]
    rows += [pair("Yes.", "No.", chosen_truncated=True)]
    (one,), dropped = train.group_pairs(tokenizer, rows, [3], train.Args())
    assert dropped == {train.SAME: 1, train.BLANK: 2, train.LONG: 0}
    (_, yes), (_, no), (_, cut) = one["sequences"]
    assert yes == [*cut, 3] and no[-1] == 3 and one["truncated"] == 1
    assert one["pairs"] == [(0, 1, 1), (0, 1, 1), (2, 1, 1)]


def raw(**changes) -> dict:
    """A row of a file: prompt, chosen and rejected as messages."""
    row = {"prompt": turn("user", "Why?"), "chosen": turn("assistant", "So."), "rejected": turn("assistant", "No.")}
    return {key: value for key, value in (row | {"gap": 1} | changes).items() if value is not None}


def both_sides(turns: list[dict], chosen: str, rejected: str) -> dict:
    """The whole conversation in both sides, as others write it."""
    return {"chosen": turns + turn("assistant", chosen), "rejected": turns + turn("assistant", rejected)}


def test_conversations_that_repeat_the_prompt_are_split(tmp_path):
    """FAULTS 23: others write the whole conversation into both sides, and the prompt as text or not at all."""
    (plain,) = train.read_pairs(write_rows(tmp_path / "plain.jsonl", [raw()]), True)
    both = both_sides(turn("user", "Why?"), "So.", "No.")
    rows = [raw(**both), raw(**both, prompt="Why?\n"), raw(**both, prompt=None), raw(prompt="Why?")]
    for row in train.read_pairs(write_rows(tmp_path / "other.jsonl", rows), True):
        assert row == plain
    (null,) = train.read_pairs(write_rows(tmp_path / "null.jsonl", [raw() | {"gap": None}]), False)
    assert null["gap"] == 0, "only spa weighs by it"
    turns = [*turn("user", "Why?"), *turn("assistant", "Hm."), *turn("user", "And?")]
    both = both_sides(turns, "chosen", "rejected")
    (row,) = train.read_pairs(write_rows(tmp_path / "turns.jsonl", [raw(**both, prompt="Why?")]), True)
    assert row["prompt"] == turns and row["chosen"]["content"] == "chosen"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (raw(gap=None), "line 1: no 'gap'"),
        (raw() | {"gap": None}, "line 1: no 'gap'"),
        (raw(chosen=None), "line 1: no 'chosen'"),
        (raw(prompt=None), "line 1: no 'prompt'"),
        (raw(prompt=5), "'prompt' must be text, or a list"),
        (raw(gap=-1), "'gap' must be a number"),
        (raw(gap=True), "'gap' must be a number"),
        (raw(gap=1e308), "'gap' must be a number from 0 to 1e9"),  # the sum of two is infinite, all weights 0
        (raw(gap=10**400), "'gap' must be a number from 0 to 1e9"),
        (raw(chosen="So."), "must be lists of one assistant message"),
        (raw(chosen=turn("user", "So.")), "must be lists of one assistant message"),
        (raw(chosen=turn("assistant", "a") + turn("assistant", "b")), "'prompt' must be text, or a list"),
        (raw(chosen=turn("user", "Why?") + turn("assistant", "b")), "must be lists of one assistant message"),
        (raw(**both_sides(turn("user", "Who?"), "a", "b")), "must be lists of one assistant message"),
        ([1], "line 1: no 'chosen'"),
    ],
)
def test_bad_pairs_are_one_line(tmp_path, row, words):
    """FAULTS 23 and section 4."""
    with refused(words):
        train.read_pairs(write_rows(tmp_path / "05_pairs.jsonl", [row]), True)


def test_held_out_prompts_depend_on_seed_and_id_alone():
    """FAULTS 19."""

    def groups(*ids):
        return [{"id": id, "sequences": [([1], [2])]} for id in ids]

    def held_out(items, **options):
        kept, out = train.split_prompts(items, train.Args(eval_fraction=0.25, **options))
        assert {g["id"] for g in kept}.isdisjoint(g["id"] for g in out), "an id is on one side"
        return {g["id"] for g in out}

    everything = [f"p{i}" for i in range(200)]
    whole = held_out(groups(*everything))
    assert 30 < len(whole) < 70 and held_out(groups(*everything), seed=1) != whole
    for some in (everything[::2], everything[5:50], sorted(everything)):
        assert held_out(groups(*some)) == whole & set(some), "another δ or filter moves none"
    assert held_out(groups(*everything, *everything)) == whole, "with and without a system message"
    assert train.split_prompts(groups("a", "b"), train.Args())[1] == []
    assert len(held_out(groups("a", "b", "c"))) >= 1, "at least one"
    with refused("leaves none of 1 prompts to train on"):
        held_out(groups("a"))


def test_held_out_prompts_without_ids_depend_on_the_question_alone():
    """FAULTS 19, in files of one's own: not on a system message, nor on what --max_length leaves of a prompt."""

    def held_out(system=None, length=4096):
        rows = [pair("So.", "No. " * 9, id=None, prompt=common.as_messages(f"Why {i}? {i}", system)) for i in range(40)]
        groups, _ = group(*rows, max_length=length)
        kept, out = train.split_prompts(groups, train.Args(eval_fraction=0.5))
        assert len(kept) + len(out) == 40
        return {one["id"] for one in out}

    assert held_out() == held_out("Be brief.") == held_out(length=45) and 10 < len(held_out()) < 30


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
    """Rows of 05_pairs.jsonl."""
    rng = random.Random(seed)
    words = ["the", "a", "harm", "help", "answer", "question", "is", "not", "safe", "because", "you", "again"]
    rows = []
    for p in range(prompts):
        candidates = [[rng.randint(1, 8), rng.randint(1, 8)] for _ in range(3)]
        texts = [" ".join(rng.choices(words, k=rng.randint(1, 25))) for _ in range(3)]
        rows.append(scored_row(f"p{p}", candidates, [9, 9], texts))
    return [pair for row in rows for pair in pairs_stage.build_pairs(row, pairs_stage.Args(delta=1.0))[0]]


def grouped(pairs: list[dict], tokenizer, args) -> list[dict]:
    """Groups of rows as a file has them."""
    rows = [{**row, "chosen": row["chosen"][-1], "rejected": row["rejected"][-1]} for row in pairs]
    groups, dropped = train.group_pairs(tokenizer, rows, [3], args)
    assert not any(dropped.values())
    return groups


def naive_loss(model, reference, tokenizer, pairs: list[dict], args) -> torch.Tensor:
    """Two plain forward passes a pair in float64, equation 3 written out; no code of the stage."""

    def logps(model, pair, side):
        prompt = tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
        a = tokenizer(prompt, add_special_tokens=False).input_ids
        b = tokenizer(pair[side][0]["content"], add_special_tokens=False).input_ids
        b = b if pair.get(f"{side}_truncated") else [*b, 3]
        logits = model(torch.tensor([a + b])).logits[0]
        steps = logits[len(a) - 1 : -1].log_softmax(-1)
        return steps[range(len(b)), b].sum(), len(b)

    if args.loss == "sft":
        distinct = {(p["id"], p["chosen"][0]["content"]): p for p in pairs}.values()
        parts = [logps(model, pair, "chosen") for pair in distinct]
        return -sum(total for total, _ in parts) / sum(count for _, count in parts), None
    gaps = [pair["gap"] for pair in pairs]
    losses, rewards = [], []
    for pair in pairs:
        (chosen, m), (rejected, n) = (logps(model, pair, side) for side in ("chosen", "rejected"))
        if args.loss == "dpo":
            with torch.no_grad():
                base = [logps(reference, pair, side)[0] for side in ("chosen", "rejected")]
            rewards.append(args.beta * (chosen - base[0]))
            losses.append(torch.log1p(torch.exp(args.beta * (rejected - base[1]) - rewards[-1])))
            continue
        weight = (pair["gap"] / np.mean(gaps)) ** args.alpha if args.loss == "spa" else 1.0
        rewards.append(args.beta * chosen / m)
        inner = rewards[-1] - args.beta * rejected / n - args.beta * args.gamma_beta_ratio
        losses.append(weight * torch.log1p(torch.exp(-inner)))
    return sum(losses) / len(losses), sum(rewards).item() / len(rewards)


PLAIN = Accelerator(cpu=True)  # one process


@pytest.mark.parametrize("call", [512, 40], ids=["few calls", "many calls"])
@pytest.mark.parametrize("budget", [100_000, 300, 60], ids=["one pass", "several", "recomputed"])
@pytest.mark.parametrize("loss", ["spa", "simpo", "dpo", "sft"])
def test_gradient_equals_a_naive_float64_step(loss, budget, call, monkeypatch):
    monkeypatch.setitem(train.CALL_TOKENS, "cpu", call)
    tokenizer = make_tokenizer("pad_eos")
    args = train.Args(loss=loss, alpha=2.0, beta=0.1 if loss == "dpo" else 2.0, tokens_per_batch=budget)
    reference, model = make_model(len(tokenizer), 0), make_model(len(tokenizer), 1)
    pairs = make_pairs()
    pairs[0]["chosen_truncated"] = loss != "sft"
    groups = grouped(pairs, tokenizer, args)
    assert sum(len(group["sequences"]) for group in groups) < 2 * len(pairs)
    train.set_weights(groups, args, None)
    for network in (reference, model):
        train.prepare(PLAIN, network, args)
    for one, values in zip(groups, train.all_logps(PLAIN, reference, groups), strict=True):
        one["reference"] = values.tolist()
    denominator = train.denominator_of(groups, args)
    sums = train.backward_step(PLAIN, model, groups, args, denominator)
    assert model.exceeds == (budget == 60), "what does not fit is computed again"
    ours = {name: p.grad.double() for name, p in model.named_parameters()}

    for network in (reference, model):
        del network.forward
    double = model.double()
    double.zero_grad()
    value, reward = naive_loss(double.eval(), reference.double(), tokenizer, pairs, args)
    value.backward()
    assert sums["loss"] / denominator == pytest.approx(value.item(), rel=1e-5)
    assert loss == "sft" or sums["rewards/chosen"] / denominator == pytest.approx(reward, rel=1e-5)
    for name, p in double.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
        error = (ours[name] - p.grad).norm() / p.grad.norm()
        assert error < 2e-5, (name, error)


# kinds of models that change the logits of their output head, or have positions of another kind
KINDS = {
    "gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8, "head_dim": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "opt": {},
    "bloom": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_the_models_own(kind, monkeypatch):
    """Against log-softmax of the model's own logits, row by row; padding and the rows beside do not count."""
    model = make_kind(kind, 300, **KINDS[kind])
    rows = [([5, 6, 7, 8], [9, 10, 11]), ([12], [13, 14]), ([12, 5, 6], [13])]
    monkeypatch.setitem(train.CALL_TOKENS, "cpu", 14)
    assert len(train.pack([[train.width_of(row)] for row in rows], 14)) == 2, "several calls, with padding"
    with torch.no_grad():
        found = train.response_logps(model, rows, 5, 1e9)
        for value, (prompt, response) in zip(found, rows, strict=True):
            logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            plain = sum(logps[len(prompt) + i - 1, token] for i, token in enumerate(response))
            assert value.item() == pytest.approx(plain.item(), abs=1e-4)


def test_weights_with_the_mean_gap_of_the_batch_and_of_the_whole():
    groups, held_out = [{"pairs": [(0, 1, 2), (0, 2, 6)]}, {"pairs": [(0, 1, 4)]}], [{"pairs": [(0, 1, 8)]}]
    args = train.Args(alpha=1.0)
    mean = train.set_weights(groups, args, None)
    assert [group["weights"] for group in groups] == [[0.5, 1.5], [1.0]]
    train.set_weights(held_out, args, mean)
    assert held_out[0]["weights"] == [2.0], "held-out pairs are weighed by the mean gap of the others"
    train.set_weights(held_out, args, None)
    assert held_out[0]["weights"] == [1.0], "of a batch of its own"
    train.set_weights(groups, train.Args(loss="simpo"), None)
    assert [group["weights"] for group in groups] == [[1.0, 1.0], [1.0]], "of the losses that are in WEIGHTED alone"
    statistics = train.weight_statistics([{"weights": [2.0, 0.0]}, {"weights": [1.0, 1.0]}])
    assert statistics["weights/effective_sample_size"] == pytest.approx(16 / 6 / 4)
    assert statistics["weights/zero_fraction"] == 0.25
    assert [*train.weight_statistics([{"weights": [0.0, 0.0]}]).values()] == [0.0, 1.0], "all totals are equal"


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


def tensors(folder) -> dict:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("loss", ["spa", "simpo", "dpo", "sft"])
def test_a_run_trains_and_saves(tiny, ok, fails, run_dir, loss):
    """FAULTS 46: no text file of the model, the card neither, has a path in it."""
    command = ("06_train", "--run_dir", run_dir, "--model", tiny(), "--loss", loss)
    options = (*OPTIONS, *(("--beta", 0.1) if loss == "dpo" else ()))
    out, _ = ok(*command, *options)
    before, after = tensors(tiny()), tensors(run_dir / "06_model")
    assert all(not torch.equal(before[name], after[name]) for name in before), "every weight has moved"
    assert AutoTokenizer.from_pretrained(run_dir / "06_model").chat_template
    assert {stat.S_IMODE(p.stat().st_mode) for p in (run_dir / "06_model").iterdir()} == {0o644}
    first, *steps, last = read_rows(run_dir / "06_metrics.jsonl")
    assert len(steps) == 12 and last["train/loss"] < first["train/loss"]
    assert {"step", "epoch", "loss", "grad_norm", "learning_rate", "logps/chosen"} <= set(steps[0])
    assert all(name in train.__doc__ for name in steps[0]), "every metric is explained"
    if loss != "sft":
        assert last["train/rewards/margins"] > first["train/rewards/margins"]
        assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies"} <= set(steps[0])
    beta, pairs = 0.1 if loss == "dpo" else 2, len(make_pairs())
    facts = f"loss {loss}, model {tiny()}, {pairs} pairs, 5 prompts, 12 steps, learning rate 0.001"
    scales = {"sft": "", "dpo": f", β {beta}"}.get(loss, f", β {beta}, γ {beta / 4:g}, γ/β 0.25")
    assert out.startswith(f"06 train: {facts}{scales}\n")
    assert "before training: '" in out and "the trained model: '" in out
    record = json.loads((run_dir / "06_args.json").read_text())
    assert record["complete"] and record["rows"] == 14 and record["args"]["beta"] == beta
    card = (run_dir / "06_model" / "README.md").read_text()
    assert f"loss `{loss}`" in card and "arXiv 2511.06222" in card and "# 06_model" in card
    assert os.path.basename(tiny()) in card
    for file in (run_dir / "06_model").iterdir():
        text = file.read_bytes()
        assert os.fsencode(run_dir) not in text and os.fsencode(os.path.dirname(tiny())) not in text, file.name


def test_two_trainings_side_by_side(tiny, ok, run_dir):
    """FAULTS section 4: each variant's `next:` names a folder of its own; here the second is saved in bfloat16."""
    command = ("06_train", "--run_dir", run_dir, "--model", tiny(), *OPTIONS)
    out, _ = ok(*command, "--gap_mean", "batch")
    assert f"next: python 01_sample.py --model {run_dir}/06_model --prompts data/high_stakes.jsonl --split test" in out
    assert f" --temperature 0 --run_dir {run_dir}/test_model\n" in out
    out, _ = ok(*command, "--loss", "simpo", "--output_dir", run_dir / "06_simpo", "--save_dtype", "bfloat16")
    assert f"--run_dir {run_dir}/test_simpo\n" in out, "another folder for another model's answers"
    assert (run_dir / "06_simpo_metrics.jsonl").exists() and (run_dir / "06_metrics.jsonl").exists()
    saved = AutoModelForCausalLM.from_pretrained(run_dir / "06_simpo", dtype="auto")
    assert {p.dtype for p in saved.parameters()} == {torch.bfloat16}


ZERO = [row | {"gap": 0} for row in make_pairs()]


@pytest.mark.parametrize(
    ("options", "words", "change"),
    [
        ((), "has no pairs", {"rows": []}),
        ((), "the mean gap is 0: no pair's totals differ, so no weight is defined; use --loss simpo", {"rows": ZERO}),
        (("--max_length", 3), f"no pair is left: {len(ZERO)} longer than --max_length", {}),
        (("--model", "/no/such/folder"), "no such folder", {}),
        (("--attn_implementation", "no_such"), "can't be loaded", {}),
        (("--eval_fraction", 1), "--eval_fraction 1.0: from 0 to below 1 is wanted", {}),
        (("--save_steps", -1), "--save_steps -1: at least 0 is wanted", {}),
        (("--base_dtype", "bfloat16"), "--base_dtype bfloat16 is for --lora_rank", {}),
        (("--output_dir", "."), "is no model's folder and would be replaced", {}),
        (("--output_dir", "RUN", "--overwrite"), "is no model's folder and would be replaced", {}),
        (("--output_dir", "RUN/05_model"), "is no model's folder and would be replaced", {}),
        (("--max_grad_norm", 0), "--max_grad_norm 0.0: more than 0 is wanted", {}),
        (("--label_smoothing", 0.1), "unknown option --label_smoothing", {}),
        (("--tracker", "wandb"), "--tracker wandb: it is not installed; python", {"no": "package"}),
        (("--lora_rank", 4), "--lora_rank needs peft: python -m pip install peft", {"no": "package"}),
        # FAULTS 2: dynamo renames every weight, accelerate would divide each loss; from a user's own accelerate config
        ((), "dynamo (EAGER) is not supported", {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}),
        ((), "gradient accumulation (4) is not supported", {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}),
        # its folders could not be put in place, after --save_steps steps
        ((), "FSDP 2 SHARDED_STATE_DICT is not supported", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
        # FAULTS 22 and 37, in the first step
        (("--learning_rate", 1e30, "--epochs", 4), "in float32; the prompts of this step: p", {}),
        ((), "out of memory: try --gradient_checkpointing, a smaller --max_length", {"step": torch.OutOfMemoryError}),
    ],
)
def test_what_is_refused_is_one_line(tiny, fails, run_dir, monkeypatch, options, words, change):
    def fail(*arguments):
        raise change["step"]("CUDA out of memory. Tried to allocate 2.00 GiB")

    if "rows" in change:
        write_rows(run_dir / "05_pairs.jsonl", change["rows"])
    if "no" in change:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if "step" in change:
        monkeypatch.setattr(train, "train_step", fail)
    for name in [name for name in change if name.isupper()]:
        monkeypatch.setenv(name, change[name])
    options = [str(word).replace("RUN", str(run_dir)) for word in options]
    fails(words, "06_train", "--run_dir", run_dir, "--model", tiny(), *options)
    assert not (run_dir / "06_model").exists() and (run_dir / "05_pairs.jsonl").exists()


def test_processes_wait_while_the_first_one_writes(monkeypatch, tmp_path):
    """8B parameters and their optimizer are 96 GB; NCCL's own patience is ten minutes."""
    started = {}
    monkeypatch.setattr(train, "Accelerator", lambda **options: started.update(options) or PLAIN)
    train.make_accelerator(train.Args(), tmp_path)
    assert started["kwargs_handlers"][0].to_kwargs()["timeout"].total_seconds() > 3600


def test_renamed_weights_are_not_saved(run_dir, tiny, fails, monkeypatch):
    """FAULTS 2: however they come to be renamed, the saved model would load as random."""
    renamed = lambda self, model: {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}  # noqa: E731
    monkeypatch.setattr(Accelerator, "get_state_dict", renamed)
    words = "the trained weights are not those of LlamaForCausalLM: _orig_mod."
    fails(words, "06_train", "--run_dir", run_dir, "--model", tiny())
    assert not json.loads((run_dir / "06_args.json").read_text())["complete"] and not (run_dir / "06_model").exists()


def test_held_out_prompts_are_measured_and_not_trained_on(tiny, ok, run_dir):
    options = ("--run_dir", run_dir, "--model", tiny(), "--learning_rate", 1e-3, "--epochs", 3)
    out, _ = ok("06_train", *options, "--eval_fraction", 0.4, "--batch_size", 1)
    draws = [common.derive_seed(0, "eval", f"p{i}") / 2**63 for i in range(5)]
    count = sum(draw < 0.4 for draw in draws)
    assert 0 < count < 5 and f"prompts: 5 ({count} held out)" in out and f"over {count} held-out prompts" in out
    rows = read_rows(run_dir / "06_metrics.jsonl")
    evaluated = [row for row in rows if "eval/loss" in row]
    ends = [(5 - count) * epoch for epoch in range(4)]
    assert [row["step"] for row in evaluated] == ends, "before, and at the end of every epoch"
    assert {"eval/rewards/margins", "eval/rewards/accuracies", "eval/logps/chosen"} <= set(evaluated[0])
    assert sum("learning_rate" in row for row in rows) == ends[-1] and not any("train/loss" in row for row in rows)


def test_tensorboard_gets_what_the_file_gets(tiny, ok, run_dir):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    ok("06_train", "--run_dir", run_dir, "--model", tiny(), *OPTIONS, "--tracker", "tensorboard")
    log = events.EventAccumulator(str(next(run_dir.rglob("events.out*")).parent))
    log.Reload()
    rows = [row for row in read_rows(run_dir / "06_metrics.jsonl") if "learning_rate" in row]
    for name in ("loss", "rewards/chosen", "rewards/margins", "weights/zero_fraction", "num_tokens"):
        points = log.Scalars(name)
        assert [point.step for point in points] == [row["step"] for row in rows]
        assert [point.value for point in points] == pytest.approx([row[name] for row in rows], rel=1e-6)
    assert "train/loss" in log.Tags()["scalars"]


def save_base(folder, model):
    make_tokenizer("plain").save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def test_what_saves_memory_changes_nothing_but_the_way(ok, run_dir, monkeypatch):
    """Of a model with dropout, which is off even where activations are computed again."""
    model = make_model(420)
    model.config.attention_dropout = 0.9
    base, weights = save_base(run_dir / "base", model), []
    extras = ((), ("--gradient_checkpointing",), ("--attn_implementation", "eager"), ("--tokens_per_batch", 30))
    for name, extra in zip("abcde", ((), *extras), strict=True):
        if name == "b":  # from here on as a model with more than TINY parameters
            monkeypatch.setattr(importlib.import_module("06_train"), "TINY", 0)
        folder = run_dir / name / "06_model"
        ok("06_train", "--run_dir", run_dir, "--model", base, *OPTIONS, "--output_dir", folder, *extra)
        weights.append(tensors(folder))
    for other in weights[1:]:
        assert max((weights[0][k] - other[k]).abs().max().item() for k in other) < 1e-5


@pytest.mark.parametrize("kind", ["opt", "starcoder2", "biogpt", "gpt_neox_japanese"])
def test_layers_that_drop_out_themselves_do_not(kind, monkeypatch):
    """Such layers are in training mode where they are computed again; the last kind knows no such layers."""
    monkeypatch.setattr(train, "TINY", 0)
    model, rows = make_kind(kind, 420, **({"embedding_dropout": 0.1} if kind == "starcoder2" else {})), [([5, 6], [7])]
    plain = train.response_logps(model, rows, 1, 1e9)
    again = train.prepare(PLAIN, model, train.Args(tokens_per_batch=9))[0](rows, 1)
    torch.testing.assert_close(again, plain)
    with refused("does not know --gradient_checkpointing") if "neox" in kind else contextlib.nullcontext():
        train.prepare(PLAIN, make_kind(kind, 420), train.Args(gradient_checkpointing=True))


def test_what_only_sees_is_not_trained():
    """Gemma 3: several processes would wait for its gradient, and after a single step have their own weights each."""
    text = make_kind("gemma3_text", 420, head_dim=8).config.to_dict()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    eye = sizes | {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=eye)
    model = train.prepare(PLAIN, AutoModelForCausalLM.from_config(config).eval(), train.Args(tokens_per_batch=9))[0]
    model([([5, 6], [7])], 1).sum().backward()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert any("vision" in name for name, _ in model.named_parameters()) and len(trained) > 20


def test_one_pair_trains(tmp_path, tiny, ok):
    write_rows(tmp_path / "05_pairs.jsonl", make_pairs()[:1])
    options = ("--gamma_beta_ratio", 2, "--learning_rate", 1e-3)
    out, err = ok("06_train", "--run_dir", tmp_path, "--model", tiny(), *options)
    assert "effective sample size 100% of the pairs" in out and "γ 4, γ/β 2" in out and "above 1.6" in err
    first, _, last = read_rows(tmp_path / "06_metrics.jsonl")
    assert last["train/loss"] < first["train/loss"]


def test_counted_and_said_what_is_cut_or_shortened(run_dir, tiny, ok):
    """FAULTS section 4: prompts that are shortened."""
    rows = make_pairs()
    cut = {row["rejected"][0]["content"] for row in rows[:2]}
    rows = [row | {"rejected_truncated": True} if row["rejected"][0]["content"] in cut else row for row in rows]
    write_rows(run_dir / "05_pairs.jsonl", [*rows, rows[-1] | {"rejected": rows[-1]["chosen"]}])
    out, err = ok("06_train", "--run_dir", run_dir, "--model", tiny())
    assert "were cut at the length limit: they are taught without an end token" in err
    assert "chosen and rejected are the same tokens" in out
    _, err = ok("06_train", "--run_dir", run_dir, "--model", tiny(), "--max_length", 60, "--overwrite")
    assert "which lose their left" in err


def test_numbers_that_are_not_finite_save_nothing(run_dir, tiny, fails):
    """FAULTS 22: weights that are damaged before, or by the last step."""
    command = ("06_train", "--run_dir", run_dir, "--learning_rate", 1e38, "--batch_size", 99)
    fails("the model's numbers are not finite in float32", *command, "--model", tiny())
    weights = tensors(tiny())
    weights["model.norm.weight"][3] = math.nan
    folder = shutil.copytree(tiny(), run_dir / "damaged")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    words = "the model's numbers are not finite in torch.float32: damaged weights"
    fails(words, *command, "--model", folder, "--overwrite")
    assert not (run_dir / "06_model").exists()
    assert not json.loads((run_dir / "06_args.json").read_text())["complete"]


@pytest.mark.parametrize("dangling", [False, True])
def test_a_linked_output_folder_is_written_behind_the_link(run_dir, tiny, ok, fails, tmp_path, dangling):
    """FAULTS 40: a symlink, dangling or not; a file is refused."""
    target, command = tmp_path / "elsewhere" / "model", ("06_train", "--run_dir", run_dir, "--model", tiny())
    if not dangling:
        target.mkdir(parents=True)
    (run_dir / "06_model").symlink_to(target)
    ok(*command, *(() if dangling else ("--overwrite",)))
    assert (run_dir / "06_model").is_symlink() and (target / "model.safetensors").exists()
    assert (run_dir / "06_metrics.jsonl").exists() and (run_dir / "06_args.json").exists()
    (run_dir / "file").write_text("")
    fails("is a file", *command, "--output_dir", run_dir / "file")


def test_what_bfloat16_keeps_of_the_training(tiny, ok, run_dir):
    """FAULTS 5, by hand: a base that bfloat16 holds exactly; small steps vanish in it, large ones do not."""
    base = save_base(run_dir / "base", AutoModelForCausalLM.from_pretrained(tiny()).bfloat16())
    for rate, low in ((1e-6, True), (1e-1, False)):
        options = ("--run_dir", run_dir, "--model", base, "--learning_rate", rate, "--overwrite")
        out, err = ok("06_train", *options)
        before, after = tensors(base), tensors(run_dir / "06_model")
        changed = sum((after[k] != before[k]).sum().item() for k in before)
        kept = sum((after[k].bfloat16() != before[k].bfloat16()).sum().item() for k in before)
        assert f"{kept / changed:.0%} of them differ in bfloat16 too" in out
        assert ("read in bfloat16, the trained model is nearly the one before" in err) == low
        assert (kept / changed < 0.5) == low


def test_a_tokenizer_with_several_templates_is_saved_with_all_of_them(tiny, ok, run_dir):
    """One for tools beside the usual one lies in a folder of its own: the training ended with "Is a directory"."""
    base = shutil.copytree(tiny(), run_dir / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    ok("06_train", "--run_dir", run_dir, "--model", base, *OPTIONS)
    saved = AutoTokenizer.from_pretrained(run_dir / "06_model").chat_template
    assert saved == AutoTokenizer.from_pretrained(base).chat_template and set(saved) == {"default", "tool_use"}


def test_older_readers_find_the_same_values(ok, run_dir):
    """FAULTS section 4: transformers 4.5x, in older servers, knows rope_theta alone and would go on with 10,000.

    The base has an invalid generation config too, which must not cost the run at its end.
    """
    model = make_model(420)
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 77777.0}
    file = save_base(run_dir / "base", model) / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_sample": False, "temperature": 0.6}))
    ok("06_train", "--run_dir", run_dir, "--model", run_dir / "base")
    config, names = (
        json.loads((run_dir / "06_model" / f"{n}.json").read_text()) for n in ("config", "tokenizer_config")
    )
    assert config["rope_theta"] == 77777.0 and config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["torch_dtype"] == "float32" and names["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(names.get("extra_special_tokens"), list)
    assert AutoConfig.from_pretrained(run_dir / "06_model").rope_parameters == model.config.rope_parameters
    old, new = (AutoTokenizer.from_pretrained(run_dir / name) for name in ("base", "06_model"))
    text = "a<|im_start|>b<|im_end|>"
    assert old(text).input_ids == new(text).input_ids and set(old.all_special_ids) == set(new.all_special_ids)


# -------------------------------------------------------------------------------- LoRA; test_resume.py goes on with one

ADAPTER = ("--lora_rank", 4, "--learning_rate", 1e-2, "--batch_size", 2, "--epochs", 2, "--seed", 10**30)


@pytest.mark.parametrize(("loss", "base"), [("spa", "float32"), ("dpo", "bfloat16")])
def test_an_adapter_is_trained_and_merged_in_float32(tiny, ok, run_dir, loss, base, monkeypatch):
    """FAULTS section 4: a huge seed, by which the adapter's random factor is drawn."""
    pytest.importorskip("peft")
    live = {}
    original = train.save_model

    def save(accelerator, model, *rest):
        live["deltas"] = {
            f"{name}.weight": layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach() * 2
            for name, layer in model.named_modules()
            if hasattr(layer, "lora_A")
        }
        live["dtypes"] = {(w.requires_grad, str(w.dtype)) for w in model.parameters()}
        return original(accelerator, model, *rest)

    monkeypatch.setattr(train, "save_model", save)
    options = ("--run_dir", run_dir, "--model", tiny(), "--loss", loss, *ADAPTER, "--base_dtype", base)
    out, _ = ok("06_train", *options, *(("--beta", 0.1) if loss == "dpo" else ()))
    assert f"LoRA rank 4 on {base}" in out
    first, *_, last = read_rows(run_dir / "06_metrics.jsonl")
    assert last["train/loss"] < first["train/loss"]
    if loss == "dpo":  # the adapter begins as 0: the reference is the base
        assert first["train/rewards/margins"] == 0 and first["train/loss"] == pytest.approx(math.log(2))
    assert live["dtypes"] == {(True, "torch.float32"), (False, f"torch.{base}")}
    before, after = tensors(tiny()), tensors(run_dir / "06_model")
    assert len(live["deltas"]) == 14, "every linear layer of two blocks, not the head"
    for name, weight in before.items():
        merged = weight + live["deltas"].get(name, 0)
        assert torch.allclose(after[name], merged, atol=1e-6), name
    if loss == "spa":  # the merged model is the adapted one: it has its loss
        args = train.Args(beta=2.0)
        groups = grouped(make_pairs(), make_tokenizer("plain"), args)
        train.set_weights(groups, args, None)
        merged = AutoModelForCausalLM.from_pretrained(run_dir / "06_model")
        with torch.no_grad():
            logps = [train.response_logps(merged, group["sequences"], 1, 1e9) for group in groups]
        found = train.total_metrics(groups, logps, args, "train")["train/loss"]
        assert found == pytest.approx(last["train/loss"], rel=1e-4)
