"""Stage 1: prompts from every kind of file and the known data sets, draws, and what is sampled."""

import importlib
import json
import shutil
from collections import Counter

import datasets
import pytest
from conftest import CHAT, ROOT, read_rows, refused, write_rows

import common

sample = importlib.import_module("01_sample")
SHARED = ROOT.parent / "shared" / "data"
PROMPTS = [{"id": f"p{i}", "prompt": f"Question {i}: " + "is it safe? " * (i % 4 + 1)} for i in range(6)]


def load(prompts, **options):
    return sample.load_prompts(sample.Args(prompts=str(prompts), **options))


# ------------------------------------------------------------------------------------ prompts

ROWS = [{"prompt": "First, one?", "topic": "x"}, {"prompt": "Sécond 二?", "topic": "y"}]
TEXTS = {
    "json": json.dumps(ROWS, indent=1),
    "jsonl": "\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS),
    "lines.json": "\n".join(json.dumps(row) for row in ROWS),  # JSON Lines in a file named .json
    "csv": 'topic,prompt\nx,"First, one?"\ny,Sécond 二?\n',
    "txt": "First, one?\n\nSécond 二?\r\n",
}


@pytest.mark.parametrize("kind", [*TEXTS, "parquet"])
def test_every_kind_of_file_gives_the_same_prompts_and_ids(tmp_path, kind):
    path = tmp_path / f"prompts.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        path.write_text(TEXTS[kind], encoding="utf-8")
    prompts, dropped = load(path)
    assert [row["prompt"] for row in prompts] == ["First, one?", "Sécond 二?"]
    assert [row["id"] for row in prompts] == ["c2ed37b09eadc106", "df2befe1b3910e1b"]
    assert dropped == {"empty": 0, "repeated": 0}


def test_columns_ids_and_what_is_left_out(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"id": 7, "question": "a"}, {"id": "b", "question": "c"}])
    assert load(path, prompt_column="question")[0] == [{"id": "7", "prompt": "a"}, {"id": "b", "prompt": "c"}]
    with refused("x.jsonl, line 1: no 'prompt' among id, question; name it with --prompt_column"):
        load(path)
    prompts, dropped = load(write_rows(tmp_path / "y.jsonl", [{"prompt": t} for t in ("a", " ", "a ", None, "b")]))
    assert [row["prompt"] for row in prompts] == ["a", "b"] and dropped == {"empty": 2, "repeated": 1}


def test_conversations_as_people_have_them(tmp_path):
    """A prompt that is a list of messages, and rows of `messages`; several turns, a system message."""
    rows = [{"messages": CHAT}, {"messages": CHAT}, {"messages": CHAT[1:2]}]
    prompts, dropped = load(write_rows(tmp_path / "x.jsonl", rows))
    assert [row["prompt"] for row in prompts] == [CHAT, CHAT[1:2]] and dropped["repeated"] == 1
    assert load(write_rows(tmp_path / "y.jsonl", [{"prompt": CHAT, "id": 1}]))[0] == [{"id": "1", "prompt": CHAT}]
    for chat in (CHAT[:3], CHAT[:1], [{"role": "user"}], [{"role": "user", "content": " "}], CHAT[1:2] + CHAT[:2]):
        with refused("line 1, 'messages': 'prompt' must be text, or a list of"):
            load(write_rows(tmp_path / "z.jsonl", [{"messages": chat}]))


def test_a_larger_draw_keeps_the_smaller_one(tmp_path, capsys):
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": f"question {i}"} for i in range(50)])
    small, large = (load(path, num_prompts=count)[0] for count in (10, 30))
    assert large[:10] == small and len({row["id"] for row in large}) == 30
    assert load(path, num_prompts=10, seed=1)[0] != small
    path = write_rows(tmp_path / "y.jsonl", [{"prompt": f"question {i}"} for i in reversed(range(50))])
    assert load(path, num_prompts=10)[0] == small, "the order of the file does not matter"
    assert len(load(path, num_prompts=60)[0]) == 50 and "only 50 distinct prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", None, "no such file"),  # it is a folder; FAULTS section 4
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": \n', "x.jsonl, line 2: broken JSON"),
        ("x.jsonl", '{"id": 1, "prompt": "a"}\n\n{"id": 1, "prompt": "b"}\n', "line 3: id '1' again"),
        ("x.jsonl", '["a"]\n', "line 1: an object with the prompt's column"),
        ("x.jsonl", '{"prompt": ["a"]}\n', "line 1, 'prompt': 'prompt' must be text"),
        ("x.jsonl", '{"prompt": "\\ud800"}\n', "surrogate"),
        ("x.json", '[{"prompt": "a"},]', "broken JSON"),
        ("x.json", '["a"]', "row 1: an object with the prompt's column"),
        ("x.csv", 'prompt\n"a\n', "broken CSV"),
        # FAULTS 20: half a prompt is none
        ("x.csv", "id,prompt\n1,Tell me, please, how\n", "line 2: 4 fields where the header has 2; quote the prompt"),
        ("x.csv", 'id,prompt\n1,"Tell\nme"\n2\n', "line 4: 1 fields where the header has 2"),
        ("x.csv", "id,prompt,\n1,Tell me, please\n", "line 2: text in a last column without a name; quote the prompt"),
        ("x.csv", "prompt,prompt\na,b\n", "the header has a name twice"),
        ("x.csv", "messages\n\"[{'content': 'Why?', 'role': 'user'}]\"\n", "'messages': messages written as text"),
        ("x.parquet", "nothing", "not a readable Parquet file"),
        ("x.parquet", {"prompt": []}, "not a readable Parquet file"),  # an empty table; FAULTS section 4
        ("x.xlsx", "nothing", "one of .json .jsonl .csv .parquet .txt"),
        ("x.txt", b"one\ncaf\xe9\n", "not UTF-8; save the file as UTF-8"),
        ("x.csv", b"prompt\ncaf\xe9\n", "broken CSV"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, words):
    path = tmp_path / name
    if content is None:
        path.mkdir()
    elif isinstance(content, dict):
        datasets.Dataset.from_dict(content).to_parquet(str(path))
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with refused(words):
        load(path)


def test_split_column(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": "a", "split": "train"}, {"prompt": "b", "split": "test"}])
    assert [row["prompt"] for row in load(path)[0]] == ["a"]
    assert [row["prompt"] for row in load(path, split="test")[0]] == ["b"]
    with refused("no rows of split 'dev' (it has: test, train)"):
        load(path, split="dev")
    with refused("no 'split' column"):
        load(write_rows(tmp_path / "y.jsonl", [{"prompt": "a"}]), split="test")
    path = write_rows(tmp_path / "z.jsonl", [{"prompt": "a", "split": 1}, {"prompt": "b", "split": 2}])
    assert [row["prompt"] for row in load(path, split="1")[0]] == ["a"]


@pytest.mark.parametrize(
    ("name", "split", "expected", "columns"),
    [
        ("saferlhf", "train", ("PKU-Alignment/PKU-SafeRLHF", "default"), {"is_response_0_safe": True}),
        ("wildguard", "train", ("allenai/wildguardmix", "wildguardtrain"), {"adversarial": True}),
        ("wildguard", "test", ("allenai/wildguardmix", "wildguardtest"), {"response": None}),
    ],
)
def test_hub_data_sets(monkeypatch, tmp_path, name, split, expected, columns):
    """Read through `datasets` from a small Parquet file with the data set's columns."""
    path, asked = str(tmp_path / "x.parquet"), []
    datasets.Dataset.from_list([{"prompt": f"{name} {i % 3}"} | columns for i in range(6)]).to_parquet(path)

    def load_dataset(repository, configuration, split):
        asked.append((repository, configuration, split))
        return datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prompts, dropped = load(name, split=split)
    assert asked == [(*expected, split)]
    assert [row["prompt"] for row in prompts] == [f"{name} {i}" for i in range(3)] and dropped["repeated"] == 3
    assert load(f"{name}:{path}")[0] == prompts, "a downloaded file gives the same"


def test_an_unreachable_data_set_says_what_to_do():
    with refused("accept its terms on its hub page") as error:
        load("wildguard")
    assert "--prompts wildguard:FILE" in str(error.value)


@pytest.mark.skipif(not SHARED.exists(), reason="the real prompt sets are not beside the kit")
def test_honeset_and_jailbreaktrigger_from_their_published_files():
    train = load(f"honeset:{SHARED / 'HoneSet.json'}", num_prompts=400)[0]
    test = load(f"honeset:{SHARED / 'HoneSet.json'}", split="test")[0]
    assert len(train) == 400 and len(test) == 500
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    jailbreak, dropped = load(f"jailbreaktrigger:{SHARED / 'jailbreak_trigger_half.json'}", split="test")
    assert len(jailbreak) + dropped["repeated"] + dropped["empty"] == 700 and len(jailbreak) > 600
    with refused("pass --split test"):
        load(f"jailbreaktrigger:{SHARED / 'jailbreak_trigger_half.json'}")
    with refused("--prompts honeset:FILE"):
        load("honeset")
    assert load(SHARED / "HoneSet.json", prompt_column="instruction")[0]


def test_our_own_prompts():
    rows = {}
    for name, least, topics in (("high_stakes", 96, 12), ("honesty", 48, 6)):
        rows[name] = read_rows(ROOT / "data" / f"{name}.jsonl")
        assert len(rows[name]) >= least and len({row["topic"] for row in rows[name]}) == topics
        assert len({row["id"] for row in rows[name]}) == len(rows[name])
        for split in ("train", "test"):
            assert len({row["topic"] for row in rows[name] if row["split"] == split}) == topics
    kinds = Counter(row["kind"] for row in rows["high_stakes"])
    assert kinds["safe"] >= len(rows["high_stakes"]) / 3, kinds
    everything = [row["prompt"].strip().lower() for group in rows.values() for row in group]
    assert len(set(everything)) == len(everything) and all(everything)
    if SHARED.exists():
        files = [json.loads(file.read_text(encoding="utf-8")) for file in SHARED.glob("*.json")]
        known = {str(row.get("prompt") or row.get("instruction")).strip().lower() for file in files for row in file}
        assert len(known) > 1000 and not known & set(everything)


def test_the_share_of_the_honest_system_prompt():
    draws = [system for i in range(200) for system in sample.draw_systems(0, f"id{i}", 5, 0.2)]
    assert set(draws) == {None, sample.HONEST_SYSTEM_PROMPT} and 150 < 1000 - draws.count(None) < 250


# ------------------------------------------------------------------------------------ the stage


@pytest.fixture
def stage(ok, fails, tiny, tmp_path):
    """stage(*options, rows=…, model=…) samples into a new folder, or is refused in `words`: (output, errors, rows)."""
    runs = iter(range(99))

    def start(*options, rows=PROMPTS, model=None, run_dir=None, words=None):
        run_dir = run_dir or tmp_path / f"run{next(runs)}"
        prompts = write_rows(tmp_path / "prompts.jsonl", rows)
        command = ("01_sample", "--prompts", prompts, "--model", model or tiny(), "--run_dir", run_dir)
        command += ("--max_new_tokens", 5, *options)
        out, err = fails(words, *command) if words else ok(*command)
        path = run_dir / "01_samples.jsonl"
        return out, err, read_rows(path) if path.exists() else None

    return start


def texts(rows):
    return [[response["text"] for response in row["responses"]] for row in rows]


def test_samples_depend_on_seed_id_and_number_alone(stage):
    """Not on the batch, the memory, the other prompts, n, or the order of the file; nor do their system prompts."""
    options = ("--system_prob", 0.5, "--n", 5)
    out, _, five = stage(*options)
    assert "01 sample: " in out and "(cpu, float32)" in out and "6 prompts, 5 responses each" in out
    assert "temperature 1, top_p 1, at most 5 tokens" in out
    for row, few in zip(five, stage(*options, "--n", 3)[2], strict=True):
        assert few["responses"] == row["responses"][:3]
    assert stage(*options, "--batch_size", 4)[2] == stage(*options, "--cached_tokens", 300)[2] == five
    assert stage(*options, rows=PROMPTS[4:1:-1])[2] == five[4:1:-1]
    assert texts(stage(*options, "--seed", 1)[2]) != texts(five)
    assert all(len(set(row)) == 1 for row in texts(stage("--n", 5, "--top_p", 0.01)[2]))


def test_system_prompts_and_conversations(stage, monkeypatch):
    """The honest system prompt comes before a conversation's own; what the model is asked is what is written."""
    asked, encode = [], common.Local.encode
    monkeypatch.setattr(common.Local, "encode", lambda self, chat: asked.append(chat) or encode(self, chat))
    _, _, rows = stage(
        "--n", 9, "--system_prob", 0.5, rows=[{"id": "c", "prompt": CHAT}, {"id": "q", "prompt": "Why?"}]
    )
    systems = [r["system"] for row in rows for r in row["responses"]]
    assert set(systems) == {None, sample.HONEST_SYSTEM_PROMPT} and rows[0]["prompt"] == CHAT
    honest = {"role": "system", "content": f"{sample.HONEST_SYSTEM_PROMPT}\n\nBe brief."}
    question = [common.as_messages("Why?", system) for system in (None, sample.HONEST_SYSTEM_PROMPT)]
    assert {json.dumps(chat) for chat in asked} == {*map(json.dumps, (CHAT, [honest, *CHAT[1:]], *question))}


def test_what_met_the_limit_says_so(stage):
    """FAULTS 6: in the row, and as a warning with its share."""
    out, err, rows = stage("--n", 3, "--max_new_tokens", 2)
    cut = [r["truncated"] for row in rows for r in row["responses"]]
    assert sum(cut) > 9 and f"warning: {sum(cut)} of 18 responses" in err and "06 will not teach an ending there" in err
    assert all(set(r) == {"text", "system", "truncated"} for row in rows for r in row["responses"])
    assert "responses: 18" in out and "tokens/s" in out and "next: python 02_score.py" in out


def test_prompts_that_do_not_fit_are_left_out(stage):
    long = {"id": "long", "prompt": "start " + "word " * 2000 + "the end?"}
    out, _, rows = stage("--n", 3, rows=[*PROMPTS, long])
    assert [row["id"] for row in rows] == [row["id"] for row in PROMPTS]
    assert "- too long for the context       1" in out
    stage("--n", 3, rows=[long], words="every prompt is too long for the context")


def test_few_samples_when_asked_for(stage):
    assert "det Σ needs 3 responses or more" in stage("--n", 2)[1]
    _, _, rows = stage("--n", 1, "--temperature", 0)
    assert len(rows[0]["responses"]) == 1
    assert rows == stage("--n", 1, "--temperature", 0, "--seed", 10**30)[2], "greedy, and a huge seed is a seed"


def test_a_model_without_a_chat_template(stage, tiny, ok, tmp_path):
    bare, template, run_dir = tiny("no_template"), tmp_path / "chat.jinja", tmp_path / "own"
    stage("--n", 3, model=bare, words="pass --chat_template FILE")
    template.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}>")
    stage("--n", 3, "--chat_template", template, model=bare, run_dir=run_dir)
    template.write_text("Gone")
    ok("02_score", "--run_dir", run_dir, "--no-judge_check")  # the template's text is handed on to the next stage


def test_what_only_changes_memory_may_change_and_the_prompts_file_may_move(stage, tmp_path, monkeypatch):
    """FAULTS 37 and 38; what is done is not tokenized again, here to count the tokens of long prompts."""
    rows = [row | {"id": f"{i}", "prompt": row["prompt"] + "so " * 250} for i, row in enumerate(PROMPTS)]
    options = {"rows": rows, "run_dir": tmp_path / "run"}
    _, _, made = stage("--n", 3, **options)
    write_rows(tmp_path / "run" / "01_samples.jsonl", made[:1] + made[2:])
    seen, encode = [], common.Local.encode
    monkeypatch.setattr(common.Local, "encode", lambda self, chat: seen.append(chat) or encode(self, chat))
    assert stage("--n", 3, "--batch_size", 3, "--cached_tokens", 99, **options)[2] == made and len(made) == 6
    assert {chat[-1]["content"] for chat in seen} == {made[1]["prompt"]}
    moved = write_rows(tmp_path / "elsewhere.jsonl", rows)
    out, _, _ = stage("--n", 3, "--prompts", moved, **options)
    assert "is complete already; --overwrite redoes it" in out
    stage("--n", 3, **options | {"rows": rows[:5]}, words="prompts is another than when 01_sample.py ran")


def test_a_model_that_a_killed_training_has_left_is_refused(stage, tiny, tmp_path):
    """FAULTS 33."""
    shutil.copytree(tiny(), tmp_path / "06_model")
    (tmp_path / "06_args.json").write_text('{"stage": "06_train", "args": {}, "complete": false}')
    stage(model=tmp_path / "06_model", words="06_train.py has not finished")


def test_a_server_s_model_is_named(fails, tmp_path):
    words = "--endpoint http://localhost:1/v1 needs --model: the name of the model there"
    fails(words, "01_sample", "--run_dir", tmp_path, "--endpoint", "http://localhost:1/v1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--n", 3, "--temperature", 0), "--temperature 0 gives 3 equal responses"),
        (("--n", 0), "--n 0: at least 1"),
        (("--temperature", -1), "--temperature -1.0: at least 0"),
        (("--top_p", 0), "--top_p 0.0: more than 0"),
        (("--system_prob", 2), "a probability is wanted"),
        (("--batch_size", 0), "--batch_size 0: at least 1"),
        (("--cached_tokens", 0), "--cached_tokens 0: at least 1"),
        (("--max_new_tokens", 4096), "leaves no room"),
        (("--model", "no/such-model"), "model 'no/such-model' can't be loaded"),
        (("--prompts", "nowhere.jsonl"), "no such file, nor one of saferlhf"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(stage, options, words):
    _, err, rows = stage(*options, words=words)
    assert len(err.strip().splitlines()) == 1 and rows is None, err


def test_prompts_of_an_earlier_run_are_kept_out(tmp_path, fails):
    """Where that leaves none, it is exit code 3, and nothing is begun."""
    path, run_dir = write_rows(tmp_path / "x.jsonl", [{"prompt": f"question {i}"} for i in range(50)]), tmp_path / "run"
    first = [row | {"responses": [{"text": "x"}]} for row in load(path, num_prompts=20)[0]]
    write_rows(run_dir / "01_samples.jsonl", first)
    second, dropped = load(path, num_prompts=20, exclude=[str(run_dir)])
    assert len(second) == 20 and not {r["id"] for r in first} & {r["id"] for r in second}
    assert dropped["in an earlier run"] == 20
    twice = common.parse_args(sample.Args, ["--exclude", "a", "--exclude", "b", "c"])
    assert twice.exclude == ["a", "b", "c"], "the first is not lost in silence"
    options = ("--prompts", write_rows(tmp_path / "y.jsonl", first), "--exclude", run_dir)
    fails("--exclude leaves no prompt of", "01_sample", *options, "--run_dir", tmp_path / "next", code=3)
    assert not (tmp_path / "next").exists()
    (run_dir / "01_args.json").write_text('{"stage": "01_sample", "args": {}, "complete": false}')
    with refused("has not finished"):
        load(path, exclude=[str(run_dir)])


def test_what_is_kept_out_of_the_test_prompts_moves_no_training_prompt_there(tmp_path):
    source = write_rows(tmp_path / "HoneSet.json", [{"instruction": f"question {i}"} for i in range(930)])
    test = load(f"honeset:{source}", split="test", num_prompts=100)[0]
    write_rows(tmp_path / "run" / "01_samples.jsonl", [row | {"responses": [{"text": "x"}]} for row in test])
    ids = {row["id"] for row in load(f"honeset:{source}")[0]}
    other, dropped = load(f"honeset:{source}", split="test", exclude=[str(tmp_path / "run")])
    assert len(other) == 400 and not ids & {row["id"] for row in other} and dropped["in an earlier run"] == 100


def test_a_prompt_is_the_same_as_text_and_as_a_message(tmp_path):
    forms = ["Why?", [{"role": "user", "content": "Why?"}], [{"content": "Why?", "role": "user"}]]
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": prompt} for prompt in forms])
    (row,), dropped = load(path)
    assert dropped["repeated"] == 2
    write_rows(tmp_path / "run" / "01_samples.jsonl", [row | {"responses": [{"text": "x"}]}])
    for prompt in forms:
        path = write_rows(tmp_path / "y.jsonl", [{"prompt": prompt}, {"prompt": "And how?"}])
        (other,), _ = load(path, exclude=[str(tmp_path / "run")])
        assert other["prompt"] == "And how?"
