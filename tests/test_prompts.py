"""Stage 1's prompts: every kind of file, the known data sets, ids, draws, and what goes wrong."""

import importlib
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
from conftest import ROOT, write_rows

from common import UserError

sample = importlib.import_module("01_sample")
SHARED = ROOT.parent / "shared" / "data"


def load(prompts, **options):
    return sample.load_prompts(sample.Args(prompts=str(prompts), **options))


ROWS = [{"prompt": "First, one?", "topic": "x"}, {"prompt": "Sécond 二?", "topic": "y"}]


def make_file(folder: Path, kind: str) -> Path:
    path = folder / f"prompts.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    elif kind == "csv":
        path.write_text('topic,prompt\nx,"First, one?"\ny,Sécond 二?\n', encoding="utf-8")
    elif kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        path.write_text("First, one?\n\nSécond 二?\r\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "txt"])
def test_every_kind_of_file_gives_the_same_prompts_and_ids(tmp_path, kind):
    prompts, dropped = load(make_file(tmp_path, kind))
    assert [row["prompt"] for row in prompts] == ["First, one?", "Sécond 二?"]
    assert [row["id"] for row in prompts] == ["c2ed37b09eadc106", "df2befe1b3910e1b"]
    assert [row["id"] for row in prompts] == [row["id"] for row in load(make_file(tmp_path, "json"))[0]]
    assert dropped == {"empty": 0, "repeated": 0}


def test_another_column_and_given_ids(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"id": 7, "question": "a"}, {"id": "b", "question": "c"}])
    assert load(path, prompt_column="question")[0] == [{"id": "7", "prompt": "a"}, {"id": "b", "prompt": "c"}]
    with pytest.raises(UserError, match=r"x.jsonl, line 1: no 'prompt' among id, question; name it with"):
        load(path)


def test_empty_and_repeated_prompts_are_counted(tmp_path):
    rows = [{"prompt": text} for text in ("a", " ", "a ", None, "b")]
    prompts, dropped = load(write_rows(tmp_path / "x.jsonl", rows))
    assert [row["prompt"] for row in prompts] == ["a", "b"] and dropped == {"empty": 2, "repeated": 1}


def test_a_larger_draw_keeps_the_smaller_one(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": f"question {i}"} for i in range(50)])
    small, large = (load(path, num_prompts=count)[0] for count in (10, 30))
    assert large[:10] == small and len({row["id"] for row in large}) == 30
    assert load(path, num_prompts=10, seed=1)[0] != small
    path = write_rows(tmp_path / "y.jsonl", [{"prompt": f"question {i}"} for i in reversed(range(50))])
    assert load(path, num_prompts=10)[0] == small, "the order of the file does not matter"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, "no such file"),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"x.jsonl, line 2: broken JSON"),
        ("x.jsonl", '{"id": 1, "prompt": "a"}\n\n{"id": 1, "prompt": "b"}\n', r"line 3: id '1' again"),
        ("x.jsonl", '["a"]\n', "an object with the prompt's column"),
        ("x.jsonl", '{"prompt": ["a"]}\n', "'prompt' is not text"),
        ("x.jsonl", '{"prompt": "\\ud800"}\n', "surrogate"),
        ("x.json", '{"prompt": "a"}', "a JSON array is wanted"),
        ("x.json", '[{"prompt": "a"},]', "broken JSON"),
        ("x.csv", 'prompt\n"a\n', "broken CSV"),
        ("x.parquet", "nothing", "not a readable Parquet file"),
        ("x.xlsx", "nothing", "unknown kind of file"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=words) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_not_utf8(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        load(tmp_path / "x.txt")


def test_split_column(tmp_path):
    rows = [{"prompt": "a", "split": "train"}, {"prompt": "b", "split": "test"}]
    path = write_rows(tmp_path / "x.jsonl", rows)
    assert [row["prompt"] for row in load(path)[0]] == ["a"]
    assert [row["prompt"] for row in load(path, split="test")[0]] == ["b"]
    with pytest.raises(UserError, match=r"no rows of split 'dev' .*test, train"):
        load(path, split="dev")
    with pytest.raises(UserError, match="no 'split' column"):
        load(write_rows(tmp_path / "y.jsonl", [{"prompt": "a"}]), split="test")


# -------------------------------------------------------------------------------- known data sets


@pytest.mark.parametrize(
    ("name", "split", "expected"),
    [
        ("saferlhf", "train", ("PKU-Alignment/PKU-SafeRLHF", "default", "train")),
        ("saferlhf", "test", ("PKU-Alignment/PKU-SafeRLHF", "default", "test")),
        ("wildguard", "train", ("allenai/wildguardmix", "wildguardtrain", "train")),
        ("wildguard", "test", ("allenai/wildguardmix", "wildguardtest", "test")),
    ],
)
def test_hub_data_sets(monkeypatch, tmp_path, name, split, expected):
    """Read through `datasets` from a small Parquet file with the data set's columns."""
    columns = {
        "saferlhf": {"prompt_source": "x", "response_0": "r", "is_response_0_safe": True},
        "wildguard": {"adversarial": True, "response": None, "prompt_harm_label": "harmful"},
    }[name]
    rows = [{"prompt": f"{name} {i % 3}"} | columns for i in range(6)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "x.parquet"))
    asked = []

    def load_dataset(repository, configuration, split):
        asked.append((repository, configuration, split))
        return datasets.Dataset.from_parquet(str(tmp_path / "x.parquet"), cache_dir=str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prompts, dropped = load(name, split=split)
    assert asked == [expected]
    assert [row["prompt"] for row in prompts] == [f"{name} {i}" for i in range(3)] and dropped[
        "repeated"
    ] == 3
    assert load(f"{name}:{tmp_path / 'x.parquet'}")[0] == prompts, "a downloaded file gives the same"


def test_an_unreachable_data_set_says_what_to_do():
    with pytest.raises(
        UserError, match=r"accept its terms on its hub page.*--prompts wildguard:FILE"
    ) as error:
        load("wildguard")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not SHARED.exists(), reason="the real prompt sets are not beside the kit")
def test_honeset_and_jailbreaktrigger_from_their_published_files():
    train = load(f"honeset:{SHARED / 'HoneSet.json'}", num_prompts=400)[0]
    test = load(f"honeset:{SHARED / 'HoneSet.json'}", split="test")[0]
    assert len(train) == 400 and len(test) == 500
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    jailbreak, dropped = load(f"jailbreaktrigger:{SHARED / 'jailbreak_trigger_half.json'}", split="test")
    assert len(jailbreak) + dropped["repeated"] + dropped["empty"] == 700 and len(jailbreak) > 600
    with pytest.raises(UserError, match="pass --split test"):
        load(f"jailbreaktrigger:{SHARED / 'jailbreak_trigger_half.json'}")
    with pytest.raises(UserError, match="--prompts honeset:FILE"):
        load("honeset")
    assert load(SHARED / "HoneSet.json", prompt_column="instruction")[0]


def test_our_own_prompts():
    rows = {}
    for name, least, topics in (("high_stakes", 96, 12), ("honesty", 48, 6)):
        lines = (ROOT / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows[name] = [json.loads(line) for line in lines]
        assert len(rows[name]) >= least and len({row["topic"] for row in rows[name]}) == topics
        assert len({row["id"] for row in rows[name]}) == len(rows[name])
        for split in ("train", "test"):
            assert len({row["topic"] for row in rows[name] if row["split"] == split}) == topics
    kinds = Counter(row["kind"] for row in rows["high_stakes"])
    assert kinds["safe"] >= len(rows["high_stakes"]) / 3, kinds
    everything = [row["prompt"].strip().lower() for group in rows.values() for row in group]
    assert len(set(everything)) == len(everything) and all(everything)
    if SHARED.exists():
        known = set()
        for file in SHARED.glob("*.json"):
            for row in json.loads(file.read_text(encoding="utf-8")):
                known.add(str(row.get("prompt") or row.get("instruction")).strip().lower())
        assert len(known) > 1000 and not known & set(everything)


def test_systems_depend_on_seed_id_and_number_alone():
    draws = [sample.draw_systems(0, f"id{i}", 5, 0.5) for i in range(200)]
    assert draws[7] == sample.draw_systems(0, "id7", 5, 0.5)
    assert draws[7][:3] == sample.draw_systems(0, "id7", 3, 0.5), "more samples keep the first ones"
    share = sum(system is not None for draw in draws for system in draw) / 1000
    assert 0.45 < share < 0.55
    assert set(sample.draw_systems(0, "a", 9, 0.0)) == {None}
    assert set(sample.draw_systems(0, "a", 9, 1.0)) == {sample.HONEST_SYSTEM_PROMPT}
