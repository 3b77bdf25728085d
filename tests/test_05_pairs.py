"""Stage 5: pairs worked out by hand, the three rules, the report, branching. Kills: test_sample_processes.py."""

import importlib
import json
import random
import re
from collections import Counter

import pytest
import spec_reading
from conftest import make_record, read_rows, scored_row, write_rows

import common

pairs = importlib.import_module("05_pairs")

FIXTURE = scored_row("f", [[7, 6], [8, 5], [6, 8]], [9, 9])
GRID = [[a, b] for a in range(1, 11) for b in range(1, 11)]


def build(row, **options):
    return pairs.build_pairs(row, pairs.Args(**options))[0]


# ------------------------------------------------------------------------------------ equation 2


@pytest.mark.parametrize(("delta", "gaps"), [(2, [5, 5, 4, 0, 1, 1]), (3, [5, 5, 4, 1, 1]), (4, [5, 5, 4, 1])])
def test_pairs_of_the_fixture(delta, gaps):
    built, too_close = pairs.build_pairs(FIXTURE, pairs.Args(delta=delta))
    assert [pair["gap"] for pair in built] == gaps
    assert sorted(too_close) == {2: [], 3: [2], 4: [2, 3]}[delta]
    assert built[0] == {
        "id": "f",
        "prompt": [{"role": "user", "content": "question f"}],
        "chosen": [{"role": "assistant", "content": "f refined"}],
        "rejected": [{"role": "assistant", "content": "f answer 0"}],
        "chosen_scores": [9, 9],
        "rejected_scores": [7, 6],
        "margin": 5,
        "gap": 5,
    }


def test_margin_and_gap_differ_on_the_grid():
    lex = [(y, z) for y in GRID for z in GRID if pairs.is_preferred(y, z, "lex")]
    found = [pairs.margin_and_gap(y, z, "total") for y, z in lex]
    wide = [(gap, sum(y) - sum(z)) for (margin, gap), (y, z) in zip(found, lex, strict=True) if margin >= 2]
    assert len(wide) == 4770
    assert sum(gap == 0 for gap, _ in wide) == 285
    assert sum(total < 0 for _, total in wide) == 870


def test_large_lambda_orders_lexicographically():
    """Appendix E: on integer scores 1 to 10 the bound is λ > 20; 9.0 still ties."""

    def agrees(weight):
        return all(
            pairs.is_preferred(y, z, "lex") == (weight * y[0] + y[1] > weight * z[0] + z[1]) for y in GRID for z in GRID
        )

    assert agrees(20.5) and not agrees(9.0)


def test_lexicographic_order_of_three():
    """Best first; of two objectives: the independent reading."""
    a, b, c, refined = [5, 5, 2], [5, 6, 1], [5, 5, 1], [6, 1, 1]
    built = build(scored_row("a", [a, b, c], refined), delta=0)
    assert [(p["chosen_scores"], p["rejected_scores"], p["margin"], p["gap"]) for p in built] == [
        (refined, a, 6, 4), (refined, b, 6, 4), (refined, c, 5, 3), (b, a, 2, 0), (b, c, 1, 1), (a, c, 1, 1)
    ]  # fmt: skip


def test_pareto_of_more_than_two():
    """Ours: none is worse, and one behind the first is better. Of two, as in section 2: the independent reading."""
    for y, z, preferred in (
        ([5, 5, 6], [5, 5, 5], True),
        ([6, 6, 5], [5, 5, 5], True),
        ([6, 5, 5], [5, 5, 5], False),  # better on the first alone, as [6, 5] over [5, 5]
        ([5, 6, 4], [5, 5, 5], False),
        ([4, 6, 6], [5, 5, 5], False),
        ([5, 5, 5], [5, 5, 5], False),
    ):
        assert pairs.is_preferred(y, z, "pareto") is preferred


def test_sums_lose_their_binary_dust():
    """9.3 − 9.1 is 0.2; 0.1 · 6 + 0.2 · 3 and 0.1 · 2 + 0.2 · 5 are both 1.2."""
    (pair,) = build(scored_row("a", [[9.3, 5], [9.1, 5]], None), delta=0.2)
    assert (pair["margin"], pair["gap"]) == (0.2, 0.2)
    assert build(scored_row("a", [[6, 3], [2, 5]], None), rule="weighted", weights=[0.1, 0.2]) == []


# ------------------------------------------------------------------------------------ who takes part


def test_responses_without_text_are_never_taught():
    """FAULTS 15: an empty response with [10, 1] against [5, 8] was chosen."""
    row = scored_row("a", [[10, 1], [5, 8], [9, 9]], [10, 10], texts=["", "answer", " \n\t"])
    row["refined"]["text"] = "\n"
    assert build(row, delta=0) == []
    row["refined"]["text"] = "refined"
    assert [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in build(row)] == [("refined", "answer")]


def test_what_was_cut_off_says_so():
    """FAULTS 6."""
    row = scored_row("a", [[5, 5], [9, 9], [1, 1]], None)
    row["responses"][1]["truncated"], row["responses"][2]["truncated"] = True, False
    seen = {tuple(p["chosen_scores"] + p["rejected_scores"]): {k for k in p if "truncated" in k} for p in build(row)}
    assert seen == {
        (9, 9, 5, 5): {"chosen_truncated"}, (9, 9, 1, 1): {"chosen_truncated"}, (5, 5, 1, 1): set()
    }  # fmt: skip
    row["responses"][2]["truncated"] = True
    assert all(p["rejected_truncated"] is True for p in build(row) if p["rejected_scores"] == [1, 1])


def test_prompts_of_several_turns_and_the_system_prompt_of_the_preferred():
    row = scored_row("a", [[5, 5], [9, 9]], [1, 1])
    row["responses"][1]["system"] = "Be honest."
    assert build(row, keep_system=True)[0]["prompt"][0] == {"role": "system", "content": "Be honest."}
    assert [message["role"] for message in build(row)[0]["prompt"]] == ["user"]
    said = (("system", "Be brief."), ("user", "one"), ("assistant", "two"), ("user", "three"))
    messages = [{"role": role, "content": content} for role, content in said]
    row["prompt"] = messages
    assert all(pair["prompt"] == messages for pair in build(row))
    system, *rest = build(row, keep_system=True)[0]["prompt"]
    assert system["role"] == "system" and "Be honest." in system["content"] and rest == messages[1:]


def test_what_weighs_a_pair_is_an_option():
    """lex order with each gap: the total, the total where it rises, a composite's."""
    row = scored_row("a", [[9, 2], [8, 8]], None)
    for options, gap in (({}, 5), ({"gap": "signed"}, 0), ({"gap": "composite", "weights": [9, 1]}, 0.3)):
        (pair,) = build(row, **options)
        assert pair["chosen_scores"] == [9, 2] and pair["gap"] == pytest.approx(gap), options


def test_agrees_with_an_independent_reading_on_2000_random_rows():
    """tests/spec_reading.py was written from SPEC.md alone, without sight of the stages."""
    rng, count = random.Random(7), 0
    for number in range(2000):
        n, whole = rng.choice((1, 2, 3, 3, 5, 7)), rng.random() < 0.5

        def score(whole=whole):
            values = [rng.randint(1, 10) if whole else round(rng.uniform(1, 10), rng.choice((1, 6))) for _ in "ab"]
            return None if rng.random() < 0.05 else values

        texts = [rng.choice(("same", f"{i}")) if rng.random() < 0.2 else f"{i}" for i in range(n)]
        row = scored_row(str(number), [score() for _ in range(n)], score(), texts)
        if rng.random() < 0.1:
            row["refined"]["text"] = texts[0]
        if rng.random() < 0.2:
            del row["refined"]
        rule = rng.choice(("lex", "pareto", "weighted"))
        options = {"delta": rng.choice((0.0, 0.3, 2.0, 3.0, 4.0)), "rule": rule}
        options["weights"] = rng.choice(([6, 4], [9, 1], [0.7, 0.3])) if rule == "weighted" else None
        options["refined_only"] = rng.random() < 0.3
        built = build(row, **options)
        expected = spec_reading.pairs(row, **options)
        ours = {(p["chosen"][0]["content"], p["rejected"][0]["content"]): p for p in built}
        theirs = {(p["chosen_text"], p["rejected_text"]): p for p in expected}
        assert ours.keys() == theirs.keys() and len(built) == len(expected), (row, options)
        for key, pair in ours.items():
            assert all(pair[side] == theirs[key][side] for side in ("chosen_scores", "rejected_scores"))
            assert pair["margin"] == pytest.approx(theirs[key]["margin"])
            assert pair["gap"] == pytest.approx(theirs[key]["gap"], abs=1e-9)
        count += len(built)
    assert count > 2000


# ------------------------------------------------------------------------------------ what it writes and says


def test_it_writes_what_it_promises(tmp_path, ok):
    write_rows(tmp_path / "04_denoised.jsonl", [FIXTURE, scored_row("same", [[5, 5]] * 3, [5, 5])])
    make_record(tmp_path, "04", objectives=["honesty", "helpfulness"])
    out, err = ok("05_pairs", "--run_dir", tmp_path)
    assert err == "" and read_rows(tmp_path / "05_pairs.jsonl") == build(FIXTURE)
    record = json.loads((tmp_path / "05_args.json").read_text())
    assert record["complete"] and record["rows"] == 6
    for pattern in (
        r"\A05 pairs: .*04_denoised.jsonl, lex rule on Honesty before Helpfulness, margin >= 2\n",
        r"prompts in +2\n.*- without a pair +1\n.*prompts with pairs +1\n",
        r"pairs: 6, mean gap 2.667",
        r"margin, in steps of 1: 2: 1, 3: 1, 4: 1, 5: 3\n",
        r"zero gap \(weight 0 in SPA\): 1; preferred response has the lower total: 2\n",
        r"That is meant: .*primary.*\|gap\|",
        r"wrote .*05_pairs.jsonl\nnext: accelerate launch 06_train.py",
    ):
        assert re.search(pattern, out, re.DOTALL), (pattern, out)


def test_margins_of_expected_scores_have_bins_of_their_size():
    def table(*margins):
        return pairs.margin_table(Counter(round(1000 * margin) for margin in margins))

    assert table(2, 2, 3, 11) == "in steps of 1: 2: 2, 3: 1, 11: 1"
    assert table(0.31, 0.33, 0.34, 0.52) == "in steps of 0.05: 0.3: 3, 0.5: 1"
    assert table(0.5, 0.9, 3.2, 4.4) == "in steps of 0.5: 0.5: 2, 3: 1, 4: 1"
    assert table(0.011) == "in steps of 0.01: 0.01: 1"
    assert table(0.1, 89.5) == "in steps of 10: 0: 1, 80: 1"
    rng = random.Random(3)
    for spread in (0.05, 0.3, 1, 4, 18):
        margins = [rng.random() * spread for _ in range(500)]
        counts = [int(part.split(": ")[-1]) for part in table(*margins).split(", ")]
        assert sum(counts) == 500 and 4 <= len(counts) <= 11, spread


def test_no_pair_is_exit_code_3_with_advice(tmp_path, ok, fails):
    near, command = scored_row("near", [[5, 5], [5.1, 5]], [5.2, 5.1]), ("05_pairs", "--run_dir", tmp_path)
    write_rows(tmp_path / "04_denoised.jsonl", [near])
    for _ in range(2):  # the same command says the same again
        out, err = fails("the widest of 3 ordered pairs is 0.3 apart", *command, code=3)
        assert "--delta" in err and re.search(r"prompts with pairs +0\n", out)
    write_rows(tmp_path / "04_denoised.jsonl", [scored_row("none", [None, [5, 5]], None)])
    fails("no prompt has two responses", *command, "--overwrite", code=3)
    write_rows(tmp_path / "04_denoised.jsonl", [scored_row("a", [[8, 5], [7, 6]], None)])
    _, err = ok(*command, "--overwrite")
    assert "every gap is 0" in err and "--loss simpo" in err


def test_reward_soups_from_scored_rows_without_refinement(tmp_path, ok, fails):
    row = scored_row("a", [[9, 2], [5, 9], [5, 4]], [1, 1])
    del row["refined"]
    write_rows(tmp_path / "02_scores.jsonl", [row])
    options = ("--input", tmp_path / "02_scores.jsonl", "--rule", "weighted", "--delta", 0)
    ok("05_pairs", "--run_dir", tmp_path, *options, "--weights", 9, 1)
    built = read_rows(tmp_path / "05_pairs.jsonl")
    assert [pair["gap"] for pair in built] == [pytest.approx(g) for g in (2.9, 3.4, 0.5)]
    wrong = {(1, 2, 3): "2 numbers >= 0", (1, -1): "2 numbers >= 0", (0, 0): "not all 0", (): "go together"}
    for weights, words in wrong.items():
        given = ("--weights", *weights) if weights else ()
        fails(words, "05_pairs", "--run_dir", tmp_path / "bad", *options, *given)
    fails("go together", "05_pairs", "--run_dir", tmp_path / "bad", "--weights", 1, 2)
    assert not (tmp_path / "bad").exists()


# ------------------------------------------------------------------------------------ runs


def test_a_run_branches(tmp_path, ok, fails, monkeypatch):
    """--input of 04 and 05 takes a run directory or a file, from where the user stands; the rest is beside it."""
    write_rows(tmp_path / "base" / "03_refined.jsonl", [FIXTURE, scored_row("flat", [[5, 5]] * 3, [9, 9])])
    make_record(tmp_path / "base", "03", objectives=["honesty", "helpfulness"], model="m")
    monkeypatch.chdir(tmp_path)
    for run, source in (("one", "base"), ("two", "base/03_refined.jsonl")):
        out, err = ok("04_denoise", "--input", source, "--run_dir", run, "--rho", 10)
        assert "Honesty" in out and err == ""
    one, two = ((tmp_path / run / "04_denoised.jsonl").read_bytes() for run in ("one", "two"))
    assert one == two and not list((tmp_path / "base").glob("04_*"))
    ok("05_pairs", "--run_dir", "one")
    out, err = ok("05_pairs", "--input", "one", "--run_dir", "four", "--delta", 4)
    assert "Honesty" in out and err == ""
    assert [len(read_rows(tmp_path / run / "05_pairs.jsonl")) for run in ("one", "four")] == [6, 4]
    made = common.made_by(tmp_path / "four" / "05_pairs.jsonl")
    assert (made["03"]["model"], made["04"]["rho"], made["05"]["delta"]) == ("m", 10, 4), "stage 6 finds all it needs"
    for stage, file in (("04_denoise", "03_refined.jsonl"), ("05_pairs", "04_denoised.jsonl")):
        fails(f"{file} not found", stage, "--input", "nowhere", "--run_dir", "three")
    assert not (tmp_path / "three").exists()
