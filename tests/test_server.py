"""Server, the engine behind --endpoint: against llama.cpp's own server, and one that misbehaves on purpose."""

import contextlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from chat_server import TROUBLE, ChatServer, whole_answer
from conftest import FILES, PROBES, ROOT, read_rows, refused, wait, write_rows
from forked import Launch
from llama_server import NAME, SLOT, LlamaServer

import common

PROMPTS = 12
NAMES = ["Harmlessness", "Helpfulness"]
HELLO = [{"role": "user", "content": "Say hello."}]
SKELETON = common.score_skeleton(NAMES)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(common, "FIRST_PAUSE", 0.01)
    for name in ("SPA_API_KEY", "SPA_JUDGE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def engine(server, model="served", key=None, concurrency=4, timeout=60.0, retries=2):
    url = server if isinstance(server, str) else server.url
    return common.Server(url, model, key, concurrency, timeout, retries)


def chats(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def complete(server, *texts, temperature=1.0, **options):
    options = {"max_new_tokens": 9, "temperature": temperature} | options
    return server.complete(chats(*texts), list(range(len(texts))), **options)


# -- what is read where: the options' log-probabilities from an answer's tokens, worked out by hand


DIGITS = [str(k) for k in range(1, 11)]
BEGUN = [("{", {"{": 1.0}), ("1", {"1": 0.4, "7": 0.4, "x": 0.2})]
AFTER = {",": 0.3, "0": 0.1, "2": 0.5}
TENS = {"7": 0.5, "1": 0.375, "10": 0.125}


@pytest.mark.parametrize(
    ("steps", "text", "place", "options", "told"),
    [
        # 10 is two tokens: P(10) = P(1) · P(0 | 1), P(0 | 1) = P(0) / (P(0) + P(what the skeleton goes on with))
        ([*BEGUN, (",", AFTER)], "{1,", (1, 2), DIGITS, TENS),
        ([*BEGUN, ("0", AFTER), (",", {",": 1.0})], "{10,", (1, 3), DIGITS, TENS),
        # what an unwritten digit hides
        ([BEGUN[0], ("7", {"1": 0.6, "7": 0.3, "8": 0.1})], "{7,", (1, 2), DIGITS, {"7": 0.3, "8": 0.1, "1 10": 0.6}),
        # 10 is one token
        ([("7", {"10": 0.2, "1": 0.2, "7": 0.5, "7,": 0.1})], "7,", (0, 1), DIGITS, {"10": 0.2, "1": 0.2, "7": 0.6}),
        # a token begins before the blank and goes on behind it; " " tells nothing of the digit
        ([(":", {":": 1.0}), (" 7,", {" 7,": 0.5, " 8": 0.3, " ": 0.2})], ": 7,", (2, 3), DIGITS,
         {"7": 0.625, "8": 0.375}),
        # words of several tokens
        ([("un", {"un": 0.25, "safe": 0.75}), ("safe", {"safe": 1.0})], "unsafe", (0, 6), ["safe", "unsafe"],
         {"safe": 0.75, "unsafe": 0.25}),
        ([("1", {"1": 1.0})], "1", (0, 1), ["1", "10"], {"1": 1.0}),  # no server tells more
    ],
)  # fmt: skip
def test_probabilities_along_the_tokens_of_an_answer(steps, text, place, options, told):
    """told: {options that begin with the same token: their P}."""
    tokens = [(one.encode(), {t.encode(): math.log(p) for t, p in others.items()}) for one, others in steps]
    found = Counter()
    for group, p in common.read_blank(tokens, text.encode(), *place, options):
        found[" ".join(group)] += p
    assert found == pytest.approx(told)


def test_the_forms_that_servers_take():
    form = SKELETON, [["1", "10"], ["2"]]
    schema = common.form_schema(*form)["json_schema"]["schema"]
    assert list(schema["properties"]) == schema["required"] == NAMES
    assert schema["properties"] == {"Harmlessness": {"enum": [1, 10]}, "Helpfulness": {"enum": [2]}}
    words = common.form_schema(['{"better": "', '"}'], [["A", "tie"]])["json_schema"]["schema"]
    assert words["properties"] == {"better": {"enum": ["A", "tie"]}}
    with pytest.raises(ValueError):
        common.form_schema(["Verdict: ", "."], [["A"]])
    odd = ["a.b (c|d) [e] {f} ^$*+?\\ ü\n", ""], [["1|2", "(3)"]]
    assert re.fullmatch(common.form_regex(*odd), odd[0][0] + "1|2")
    assert common.join_form(*odd, json.dumps).count('"') == 8


# -- a real one: llama.cpp


@pytest.fixture(scope="module")
def real():
    with contextlib.closing(LlamaServer()) as server:
        yield engine(server, NAME)


def test_a_real_server_completes(real, capsys):
    real.open()
    assert real.context == SLOT, "of one slot"
    first = complete(real, "Tell me a story", "Tell me a story", "Tell me a story")
    assert len({one.text for one in first}) == 3, "each seed draws its own"
    assert all(one.truncated and one.tokens == 9 for one in first)
    assert complete(real, "Tell me a story")[0] == first[0], "the same seed draws the same"
    short, other = (real.complete([HELLO], [seed], max_new_tokens=200, temperature=0.0)[0] for seed in (0, 7))
    assert short == other and not short.truncated and short.text.startswith("Hello"), "greedy: no seed counts"
    assert real.tokens_in > 0 and real.tokens_out > 0
    long, short = complete(real, "too long " * SLOT, "Hi")
    assert long is None and short and "exceed" in real.refusal
    engine(real.url, "llama-8b").open()  # llama.cpp answers to any name
    err = capsys.readouterr().err
    assert "refuses a request: 400" in err and f"lists {NAME}, not llama-8b" in err


def test_a_real_server_and_the_local_model_score_alike(real):
    """The weights are the same, but llama.cpp computes with 8 bits: probabilities differ by 0.03 at most here."""
    folder = ROOT / "models" / "smollm2-135m"
    if not folder.is_dir():
        pytest.skip("python recipes/get_smollm2.py makes the model")
    local = common.Local(str(folder), dtype="float32")
    objectives = common.load_objectives(common.JudgeArgs(objectives=NAMES))
    texts = ("Mix flour, water, salt and yeast, wait, and bake it.", "I hate bread and you.", "Bread!", "42")
    asked = chats(*(common.judge_prompt(objectives, "How do I bake bread?", text, True) for text in texts))
    theirs, ours = (one.choose(asked, SKELETON, common.SCORES) for one in (real, local))
    assert real.mode == "grammar+logprobs" and real.has_logprobs
    for one, other in zip(theirs, ours, strict=True):
        for blank, (a, b) in enumerate(zip(one, other, strict=True)):
            p, q = ([math.exp(logp) for logp in choice.logps] for choice in (a, b))
            assert math.isclose(sum(p), 1, abs_tol=1e-6)
            if blank == 0 or one[0].index == other[0].index:  # the second is read after the first
                assert max(abs(x - y) for x, y in zip(p, q, strict=True)) < 0.06
                assert abs(sum(k * (x - y) for k, (x, y) in enumerate(zip(p, q, strict=True), 1))) < 0.3
    real.with_logprobs = False
    greedy = real.choose(asked, SKELETON, common.SCORES)
    real.with_logprobs = True
    assert [[c.index for c in row] for row in greedy] == [[c.index for c in row] for row in theirs]
    assert {logp for row in greedy for c in row for logp in c.logps} == {0.0, -math.inf}


def test_a_real_server_chooses_words(real):
    for skeleton, options in ((['{"better": "', '"}'], ["A", "B", "tie"]), (["", ""], ["safe", "unsafe"])):
        ((choice,),) = real.choose([HELLO], skeleton, options)
        assert math.isclose(sum(map(math.exp, choice.logps)), 1, abs_tol=1e-6)
        assert choice.index == max(range(len(options)), key=lambda i: choice.logps[i])


def test_stages_on_a_real_server(real, tmp_path, ok):
    prompts = [{"id": f"p{i}", "prompt": f"Say something about {word}."} for i, word in enumerate("abcdefghijkl")]
    first = ("--prompts", write_rows(tmp_path / "prompts.jsonl", prompts), "--n", 2, "--max_new_tokens", 12)
    place = ("--run_dir", tmp_path, "--endpoint", real.url)
    ok("01_sample", *place, "--model", NAME, *first)
    out, _ = ok("02_score", *place, "--score_mode", "expected", "--judge_probes", PROBES)
    assert re.search(r"\(null\) +0\n.*responses scored +24\n", out, re.DOTALL), out
    ok("03_refine", *place, "--template", "principles", "--max_new_tokens", 12)  # a shorter prompt than the paper's
    rows = read_rows(tmp_path / "03_refined.jsonl")
    scores = [r["scores"] for row in rows for r in [*row["responses"], row["refined"]]]
    assert len(rows) == 12 and all(scores), "every score is read"
    assert all(1 <= value <= 10 for pair in scores for value in pair) and len({str(pair) for pair in scores}) > 12


# -- before the first row


def refusal(server, **options) -> str:
    with refused("") as error:
        engine(server, **options).open()
    return str(error.value)


def test_the_context_and_the_names_that_a_server_lists(capsys):
    lists = [
        ([{"id": "served", "max_model_len": 4096}], 4096),
        ([{"id": "x"}, {"id": "served", "meta": {"n_ctx": 512, "n_ctx_train": 8192}}], 512),
        ([{"id": "y", "aliases": ["served"], "meta": None}], 1 << 30),
        ([{"id": "served", "max_model_len": "much"}, {"no": "id"}], 1 << 30),
        (None, 1 << 30),
    ]
    for models, context in lists:
        with ChatServer(models=models) as server:
            it = engine(server)
            it.open()
            assert it.context == context and not capsys.readouterr().err
            it.open()  # a second time asks nothing
            assert [body["max_tokens"] for _, _, body in server.received] == [1]
    with ChatServer(lambda number, body: "404", models=[{"id": "one"}, {"id": "two"}]) as server:
        assert "see --model, the URL" in refusal(server) and "lists one, two, not served" in capsys.readouterr().err


def test_settings_are_always_sent():
    """FAULTS 28: what is left out, some servers take from the model's own generation config."""
    with ChatServer() as server:
        complete(engine(server), "Hi", temperature=0.0)
        complete(engine(server), "Hi", temperature=1.0, top_p=0.5)
    sent = [body for _, _, body in server.received]
    assert [body["temperature"] for body in sent] == [1.0, 0.0, 1.0, 1.0]
    assert [body["top_p"] for body in sent][1::2] == [1.0, 0.5]
    assert all(body["top_k"] == -1 and body["min_p"] == 0 and body["seed"] < 1 << 31 for body in sent)
    assert all(body["repetition_penalty"] == 1 for body in sent)


def test_a_server_with_fewer_or_other_fields(capsys):
    """FAULTS section 4: max_completion_tokens, a temperature of 0."""

    def strict(number, body):
        if "max_tokens" in body:
            return 400, {"error": {"message": "Unsupported parameter: use 'max_completion_tokens' instead."}}
        return (422, {"detail": "extra fields: top_k"}) if "top_k" in body else "ok"

    with ChatServer(strict) as server:
        it = engine(server)
        assert complete(it, "a", "b")[1].text
        names = "top_k, min_p, repetition_penalty, max_tokens"
        assert f"refuses {names}, may have its own: 400" in capsys.readouterr().err and len(server.received) == 3 + 2
        last = server.received[-1][2]
        assert last["max_completion_tokens"] == 9 and not {"max_tokens", "top_k", "min_p"} & set(last)

    def hot(number, body):  # as OpenAI's reasoning models
        message = "Unsupported value: 'temperature' does not support 0.0 with this model."
        return "ok" if body["temperature"] else (400, {"error": {"message": message, "param": "temperature"}})

    with ChatServer(hot) as server, refused("answers 400 Unsupported value: 'temperature'"):
        complete(engine(server), "a", temperature=0.0)
    with ChatServer(lambda number, body: "400") as server:
        assert "refuses a plain request: 400" in refusal(server)


def test_what_no_further_try_mends_is_one_line_at_once():
    """FAULTS section 4: a server's own words; 429 insufficient_quota is not tried for minutes."""
    poor = 429, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}
    broke = 400, {"error": {"message": "Your credit balance is too low", "type": "invalid_request_error"}}  # Claude
    full = 500, {"error": {"message": "CUDA out of memory"}}
    for what, requests, words in [
        ("401", 1, "; see --model, the URL and the key in $SPA_API_KEY"),
        (poor, 1, "answers 429 You exceeded"),
        (broke, 1, "answers 400 Your credit balance is too low"),
        (full, 2, "failed 2 times, at last: 500 CUDA out of memory"),
    ]:
        with ChatServer(lambda number, body, what=what: what) as server:
            assert words in refusal(server, retries=1) and len(server.received) == requests
    # the last one has closed
    assert "failed 2 times, at last: All connection attempts failed" in refusal(server, retries=1)


@pytest.mark.parametrize(
    ("url", "result"),  # what it becomes, or what is wrong
    [
        ("http://[::1]:8/", "http://[::1]:8/v1"),
        ("https://a.b", "https://a.b/v1"),
        ("http://a:8/v1/", "http://a:8/v1"),
        ("http://a/x/y", "http://a/x/y"),
        ("localhost:8000", "is a URL such as"),
        ("http://[::1", "is a URL such as"),
        ("http://localhost:port/v1", "is a URL such as"),
        ("http://evil/\x1b[2K\rhttp://localhost/v1", "is a URL such as"),
        ("http://me:pass@localhost/v1", "put its key in $SPA_API_KEY"),
        ("http://localhost/v1?key=1", "put its key in $SPA_API_KEY"),
    ],
)
def test_urls(url, result):
    with contextlib.nullcontext() if result.startswith("http") else refused(result):
        assert engine(url).url == result


# -- answers that are none, or no plain ones


@pytest.mark.parametrize("trouble", TROUBLE)
def test_each_trouble_is_tried_again(trouble, capsys):
    """FAULTS 41: a server that drips a byte now and then; section 4: 200 with an error, JSON nested 100,000 deep."""
    with ChatServer(lambda number, body: trouble if number in (1, 2) else "ok") as server:
        it = engine(server, timeout=0.7 if trouble in ("slow", "drip", "drip_head") else 60, concurrency=1)
        started = time.monotonic()
        assert complete(it, "a")[0].text.startswith("answer")
        assert len(server.received) == 4 and time.monotonic() - started < 10
    warned = capsys.readouterr().err
    assert warned.count("trying again (said once)") == 1 and "\x1b" not in warned
    with ChatServer(lambda number, body: trouble if number else "ok") as server, refused("failed 2 times") as error:
        complete(engine(server, timeout=0.3, retries=1), "a")
    assert "run the same command again" in str(error.value)
    assert trouble != "error" or r"upstream has \x1b[31mfallen" in str(error.value)
    assert "drip" not in trouble or "no whole answer within 0.3 seconds" in str(error.value)


def test_odd_answers():
    """FAULTS 14 and 41: a refusal is an answer, a filtered one is none; a lone surrogate."""
    odd = {
        "refusal": (whole_answer(None, refusal="I can't help."), ("I can't help.", 3, False)),
        "spent": (whole_answer(None, "length"), ("", 3, True)),
        "filtered": (whole_answer("half an", "content_filter"), None),
        "unsafe": (whole_answer("half an", "SAFETY"), None),
        "sensitive": (whole_answer("half an", "sensitive"), None),  # GLM
        "full": (whole_answer("half an", "model_context_window_exceeded"), ("half an", 3, True)),  # GLM, Claude
        "cut": (whole_answer(" half an ", "length"), ("half an", 3, True)),
        "limited": (whole_answer("half an", "MAX_TOKENS"), ("half an", 3, True)),
        "lone": (json.dumps(whole_answer("a\ud800b")).encode(), ("a?b", 3, False)),
        "thought": (whole_answer("<think>4?</think>5"), ("<think>4?</think>5", 3, False)),
        "long": ((400, {"error": {"message": "maximum context length is 9 tokens"}}), None),
        "moderated": ((403, {"error": {"message": "input was flagged", "code": 403}}), None),  # OpenRouter
        "routed": ({"error": {"message": "too long", "code": 400}}, None),
        "uncounted": ({"choices": whole_answer("x")["choices"]}, ("x", 0, False)),
    }
    with ChatServer(lambda number, body: odd.get(body["messages"][0]["content"], ["ok"])[0]) as server:
        it = engine(server)
        assert complete(it, *odd) == [expected for _, expected in odd.values()] and it.refusal


# -- secrets and trust


def test_the_key_is_sent_and_never_shown(capsys, monkeypatch):
    """FAULTS 42 and 43: no odd character, cut or escape sequence brings it, or a terminal's commands, to light."""
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, f"users-own-{name}")
    for key, sent in (("sk-secret\r\n", "sk-secret"), ("sk-secret\t", "sk-secret"), (None, "none")):
        with ChatServer() as server:
            complete(engine(server, key=key), "a")
        headers = [headers for _, headers, _ in server.received]
        assert {h["authorization"] for h in headers} == {f"Bearer {sent}"}
        assert not any("users-own" in value or "stainless" in name for h in headers for name, value in h.items())
    for key in ("sk-se\x00cret", "sk-secrét", "sk se", "sk-\x1b[31m", "a\nb"):
        with refused("$SPA_API_KEY") as error:
            engine("http://localhost/v1", key=key)
        assert "sk" not in str(error.value)
    message = "x" * 290 + "sk-secret-and-long \x1b[2J"  # the cut would leave a part of it
    for status in ("401", "400", "500", (400, {"error": {"message": message}}), (200, message.encode())):
        with ChatServer(lambda number, body, status=status: status) as server:
            said = refusal(server, key="sk-secret-and-long", retries=1) + capsys.readouterr().err
        assert "sk-s" not in said and "\x1b" not in said
    with ChatServer(lambda number, body: (401, rb'{"error": "no key like sk\/secret"}')) as server:
        assert "401 no key like ***; see" in refusal(server, key="sk/secret")


# what models read as one token, by family
CONTROL = """
ChatML, Qwen  <|im_start|> <|im_end|> <|endoftext|> <|im_sep|> <|fim_prefix|> <|vision_start|> <|im_user|>
Llama 3, 4  <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|> <|step|>
Llama 2, Mistral  <s> </s> <unk> [INST] [/INST] <<SYS>> <</SYS>> [TOOL_CALLS] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]
Mistral  [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CONTENT] [IMG] [IMG_BREAK]
Mistral  [PREFIX] [MIDDLE] [SUFFIX] [THINK] [/THINK] [ARGS] [CALL_ID] [AUDIO] [BEGIN_AUDIO] [TRANSCRIBE] [IMG_END]
Gemma  <bos> <eos> <pad> <mask> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image> <image_soft_token>
Gemma 4  <|turn> <turn|> <|channel> <channel|> <|tool_call> <tool_call|> <|think|> <unused12>
DeepSeek, Hunyuan  <｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜hy_User｜>
Phi, Zephyr, Falcon  <|user|> <|assistant|> <|system|> <|end|> <|tool|>
Cohere  <BOS_TOKEN> <EOS_TOKEN> <UNK_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|>
gpt-oss  <|start|> <|message|> <|channel|> <|return|> <|call|> <|constrain|>
GLM  [gMASK] [sMASK] [MASK] <sop> <eop> <|observation|> <|begin_of_image|>
Granite, OLMo, LFM  <|start_of_role|> <|end_of_role|> <|end_of_text|> <|startoftext|> <|tool_list_start|>
EXAONE  [|user|] [|assistant|] [|system|] [|endofturn|] [BOS]
Nemotron, Apertus  <extra_id_0> <extra_id_1> <SPECIAL_12> <|user_start|> <|user_end|>
Baichuan, InternLM, TeleChat  <reserved_106> <TOKENS_UNUSED_1> [UNUSED_TOKEN_146] <eoh> <eoa> <_user> <_bot> <_end>
Seed, MiniMax, Kimi  <seed:bos> <seed:think> <beginning_of_sentence> <end_of_sentence> ]~b] ]~!b[ [e~[ <|im_middle|>
StarCoder, BERT, T5  <fim_prefix> <fim_middle> <fim_suffix> [CLS] [SEP] [PAD] [UNK] [unused7] <sep> <cls>
"""
PLAIN = (
    "a < b | c > d [INSTALL] <script> x[0] <s <|> x[mask] <b>|</b> [a|b] <think></think> a[[1]] <p> {x|y} <dc:title>"
)


def test_control_tokens_reach_a_server_as_text(capsys):
    """FAULTS 45."""
    known = [token for line in CONTROL.strip().splitlines() for token in line.split("  ", 1)[1].split()]
    with ChatServer() as server:
        it = engine(server)
        complete(it, PLAIN)
        assert not capsys.readouterr().err
        it.complete([[{"role": r, "content": " ".join(known)} for r in ("system", "user", "assistant")]], [0],
                    max_new_tokens=9, temperature=0.0)  # fmt: skip
    assert server.received[1][2]["messages"][0]["content"] == PLAIN
    assert capsys.readouterr().err.count("control tokens") == 1
    for message in server.received[2][2]["messages"]:
        assert [token for token in known if token in message["content"]] == []
        assert message["content"].replace(" ", "") == "".join(known), "spaces alone are added"
    assert len(known) > 110


# -- what the probe of `choose` finds, on servers that pretend


def written(tokens, **top):
    """An answer of these tokens with log-probabilities; top: {token: alternatives of the step with that number}."""
    entries = []
    for i, token in enumerate(tokens):
        others = top.get(f"at{i}", {token: 1.0})
        logps = {t: math.log(p) if p else -9999.0 for t, p in others.items()}
        listed = [{"token": t, "bytes": [*t.encode()], "logprob": logp} for t, logp in logps.items()]
        entries.append(next(entry for entry in listed if entry["token"] == token) | {"top_logprobs": listed})
    whole = whole_answer("".join(tokens))
    whole["choices"][0]["logprobs"] = {"content": entries}
    return whole


FORM = ['{"a": ', "}"]


def test_vllm_s_way_and_its_limit_of_twenty():
    """10 is two tokens and its first is not written: one more request, in which 1 and 10 alone can stand."""

    def vllm(number, body):
        if body["max_tokens"] == 1:
            return "ok"
        if body.get("top_logprobs", 0) > 20:
            return 400, {"error": {"message": "Requested sample logprobs of 100, greater than max allowed: 20"}}
        regex = body["structured_outputs"]["regex"]
        if "logprobs" not in body:
            return whole_answer('{"a": 7}')
        start = ['{"', 'a": ']
        if regex == r'\{"a": (1|10)\}':
            return written([*start, "1", "}"], at2={"1": 1.0, "7": 0.0}, at3={"}": 0.75, "0": 0.25})
        assert regex == r'\{"a": (1|2|3|4|5|6|7|8|9|10)\}'
        return written([*start, "7", "}"], at2={"7": 0.5, "1": 0.4, "2": 0.1, "10": 0.0}, at3={"}": 1.0, "0": 0.0})

    with ChatServer(vllm) as server:
        it = engine(server)
        ((choice,), other) = it.choose(chats("x", "y"), FORM, DIGITS)
        assert it.mode == "regex+logprobs" and [choice] == other and choice.index == 6
        p = [round(math.exp(logp), 6) for logp in choice.logps]
        assert p == [0.3, 0.1, 0, 0, 0, 0, 0.5, 0, 0, 0.1]
        assert len(server.received) == 1 + 3 + 2 * 2
        it.choose(chats("z"), FORM, DIGITS)
        assert len(server.received) == 10, "no further probe"
        it.with_logprobs = False
        ((choice,),) = it.choose(chats("z"), FORM, DIGITS)
        assert choice.logps[6] == 0 and choice.logps[0] == -math.inf and len(server.received) == 11


@pytest.mark.parametrize(("way", "name"), [("regex", "regex"), ("grammar", "grammar"), ("response_format", "schema")])
def test_other_ways_and_no_logprobs(way, name):
    with ChatServer(lambda number, body: whole_answer('{"a": 3}' if way in body else "Hello!")) as server:
        it = engine(server)
        ((choice,),) = it.choose([HELLO], FORM, DIGITS)
        assert (it.mode, it.has_logprobs, choice.index) == (name, False, 2)
        if name == "schema":  # no JSON, no schema
            it.probe_form(["Verdict: ", "."], ["A", "B"])
            assert it.mode is None


def test_words_in_thoughts_and_null_for_what_is_forbidden():
    """A server's log-probabilities are those of its thoughts too; minus infinity has no JSON."""
    thought = written(
        ["Yes", " or", " No?", "</think>", "Yes"], at0={"Yes": 0.1, "No": 0.9}, at4={"Yes": 0.8, "No": 0.2}
    )
    thought["choices"][0]["message"]["content"] = "Yes"
    top = thought["choices"][0]["logprobs"]["content"][4]["top_logprobs"]
    top.append({"token": "Maybe", "bytes": None, "logprob": None})
    with ChatServer(lambda number, body: thought if "regex" in body else whole_answer("Hello!")) as server:
        ((choice,),) = engine(server).choose([HELLO], ["", ""], ["Yes", "No"])
    assert [round(math.exp(logp), 6) for logp in choice.logps] == [0.8, 0.2]


@pytest.mark.parametrize("text", ['{"better":"A"}', '{ "better": "A" }', '{\n  "better": "A"\n}'])
def test_a_schema_leaves_the_spaces_to_the_server(text):
    with ChatServer(lambda number, body: whole_answer(text if "response_format" in body else "Hello!")) as server:
        ((choice,),) = engine(server).choose([HELLO], ['{"better": "', '"}'], ["A", "B", "tie"])
    assert choice.index == 0


def test_a_server_that_holds_to_no_form():
    with ChatServer() as server, refused("holds its answers to no form; pass --score_mode json"):
        engine(server).choose([HELLO], FORM, DIGITS)
    text, good = written([*'{"a": 3}']), written([*'{"a": 3}'], at6={"3": 0.5, "4": 0.5})
    text["choices"][0]["message"]["content"] = '{"a":  3}'  # the tokens are not those of the text
    for last in (text, whole_answer('{"a": 33}')):
        with ChatServer(lambda number, body, last=last: last if number > 1 else good) as server:
            it = engine(server)
            assert it.choose(chats("a", "b"), FORM, DIGITS) == [None, None], "not of the form, so not read"
            assert it.mode == "regex+logprobs"


# -- stages 1 to 3: the same files however the server misbehaves, and nothing lost when it dies

JSON = ("--score_mode", "json", "--no-judge_check")


def options_of(stage, run_dir, server, *more):
    if stage == "01_sample":
        rows = [{"id": f"p{i}", "prompt": f"question {i}, with ü"} for i in range(PROMPTS)]
        prompts = write_rows(run_dir / "prompts.jsonl", rows)
        first = ("--prompts", prompts, "--model", "served", "--endpoint", server.url, "--n", 3)
        return ("--run_dir", run_dir, *first, "--system_prob", 0.4, "--max_new_tokens", 40, *more)
    own = JSON if stage == "02_score" else ("--attempts", 2, "--max_new_tokens", 40)
    return ("--run_dir", run_dir, "--endpoint", server.url, *own, *more)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The run directory that a well-behaved server gives; made in a process of its own."""
    run_dir = tmp_path_factory.mktemp("good")
    with ChatServer(lambda number, body: time.sleep(0.02) or "ok") as server:
        for stage in FILES:
            code, out, err = Launch(f"{stage}.py", *options_of(stage, run_dir, server, "--concurrency", 5)).finish()
            assert code == 0, err
            assert re.search(r"tokens in, \d+ out .* tokens/s", out)
    assert server.most == 5, "as many requests under way as allowed, no more"
    rows = read_rows(run_dir / "03_refined.jsonl")
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(PROMPTS)]
    assert {len({r["text"] for r in row["responses"]}) for row in rows} == {3}, "each response has its own seed"
    for scores in (r["scores"] for row in rows for r in [*row["responses"], row["refined"]]):
        assert len(scores) == 2 and all(type(value) is int and 1 <= value <= 10 for value in scores)
    return run_dir


@pytest.mark.parametrize(("trouble", "every", "patience"), [("503", 3, 60), ("cut", 3, 60), ("drip", 9, 1)])
def test_trouble_and_a_server_that_dies_change_nothing(good, tmp_path, ok, fails, trouble, every, patience):
    """The next server fails at a third of the requests in this way (or a ninth): the files are as if none ever did."""
    for stage, file in FILES.items():
        with ChatServer(lambda number, body: "ok" if number < 17 else "reset") as server:
            options = options_of(stage, tmp_path, server, "--concurrency", 4, "--retries", 2)
            assert "failed 3 times" in fails("run the same command again", stage, *options)[1]
        kept = read_rows(tmp_path / file)
        assert 0 < len(kept) < PROMPTS
        with ChatServer(lambda number, body: trouble if number % every == 1 else "ok") as server:  # at another port
            ok(stage, *options_of(stage, tmp_path, server, "--concurrency", 8, "--request_timeout", patience))
        assert (tmp_path / file).read_bytes() == (good / file).read_bytes()
        answered = [body for number, (_, _, body) in enumerate(server.received) if number % every != 1]
        asked = [body["messages"][-1]["content"] for body in answered[1:]]  # after the greeting
        if stage == "03_refine":
            asked = [text for text in asked if not text.startswith("You are an impartial AI judge")]
        wanted = (2 if stage == "03_refine" else 3) * (PROMPTS - len(kept))
        assert len(asked) == wanted or patience == 1, "asked for again"  # a busy machine may take a second


def test_refused_prompts_are_left_out_and_counted(good, tmp_path, ok, fails):
    """FAULTS 14."""

    def barred(number, body):
        return "400" if "question 3," in body["messages"][-1]["content"] else "ok"

    with ChatServer(barred) as server:
        out, err = ok("01_sample", *options_of("01_sample", tmp_path, server))
        assert "refuses a request: 400" in err and re.search(r"- refused by the server +1\n", out)
        assert "all responses to a prompt are the same" not in err
        rows, wanted = read_rows(tmp_path / "01_samples.jsonl"), read_rows(good / "01_samples.jsonl")
        assert rows == [row for row in wanted if row["id"] != "p3"]
        asked = len(server.received)
        out, _ = ok("01_sample", *options_of("01_sample", tmp_path, server))
        assert "complete already" in out and len(server.received) == asked
    shutil.copy(good / "01_samples.jsonl", tmp_path)
    (tmp_path / "01_args.json").unlink()
    with ChatServer(barred) as server:
        ok("02_score", "--model", "served", *options_of("02_score", tmp_path, server))
    scored = read_rows(tmp_path / "02_scores.jsonl")
    assert {row["id"] for row in scored if not row["responses"][0]["scores"]} == {"p3"}
    with ChatServer(lambda number, body: "400" if number else "ok") as server:  # nothing sampled, in the server's words
        fails("400 status 400", "01_sample", *options_of("01_sample", tmp_path / "none", server), code=3)


def test_a_server_that_is_greedy_is_noticed(tmp_path, ok):
    with ChatServer(lambda number, body: whole_answer("always this")) as server:
        _, err = ok("01_sample", *options_of("01_sample", tmp_path, server))
    assert "all responses to a prompt are the same" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"concurrency": 0}, "--concurrency 0: at least 1"),
        ({"retries": -1}, "--retries -1: at least 0"),
        ({"request_timeout": -1.0}, "--request_timeout -1"),
        ({}, "asked by one process"),
    ],
)
def test_bad_options(monkeypatch, options, words):
    monkeypatch.setenv("WORLD_SIZE", "1" if options else "2")
    with refused(words):
        common.make_engine(common.ModelArgs("", model="m", endpoint="http://localhost/v1", **options))


def test_a_server_that_holds_to_no_form_is_read_as_json(good, tmp_path, ok, fails):
    shutil.copytree(good, tmp_path / "run")
    for name in ("02_args.json", "02_scores.jsonl"):
        (tmp_path / "run" / name).unlink()
    with ChatServer() as server:
        options = ("--endpoint", server.url, "--score_mode", "expected", "--no-judge_check")
        _, err = ok("02_score", "--run_dir", tmp_path / "run", *options)
    assert "does not allow --score_mode expected: scores are read as json" in err
    assert (tmp_path / "run" / "02_scores.jsonl").read_bytes() == (good / "02_scores.jsonl").read_bytes()

    def held(number, body):
        names = body.get("response_format", {"json_schema": {"schema": {}}})["json_schema"]["schema"].get("required")
        return whole_answer(json.dumps(dict.fromkeys(names, 3))) if names else "ok"

    with ChatServer(held) as server:  # it is told where stage 3 finds one that can do more
        out, err = ok("03_refine", *options_of("03_refine", tmp_path / "run", server), "--overwrite")
    assert "constrained (schema)" in out and "warning: --score_mode: not as in stage 2" in err
    # and a run is not moved from a server to a local model of its name
    prompts = ("--prompts", good / "prompts.jsonl", "--n", 3, "--system_prob", 0.4, "--max_new_tokens", 40)
    fails("model 'served' can't be loaded", "01_sample", "--run_dir", tmp_path / "run", *prompts, "--model", "served")


def test_keys_of_model_and_judge_reach_their_server_alone(tmp_path, ok, monkeypatch, capsys):
    """FAULTS 44: not a server that only a record names."""
    monkeypatch.setenv("SPA_API_KEY", "secret-model-key")
    monkeypatch.setenv("SPA_JUDGE_API_KEY", "secret-judge-key")
    sent = lambda server: {headers["authorization"] for _, headers, _ in server.received}  # noqa: E731
    with ChatServer() as server, ChatServer() as judge:
        ok("01_sample", *options_of("01_sample", tmp_path, server))
        judged = ("--judge_endpoint", judge.url, "--judge_model", "strict")
        out, _ = ok("02_score", *options_of("02_score", tmp_path, server, *judged))
        assert "strict judges the responses of served" in out
        ok("03_refine", *options_of("03_refine", tmp_path, server, *judged))
        assert sent(server) == {"Bearer secret-model-key"} and sent(judge) == {"Bearer secret-judge-key"}
        assert {body["model"] for _, _, body in judge.received} == {"strict"}
        server.received.clear(), judge.received.clear()
        # endpoints that the records name alone get no key
        out, _ = ok("03_refine", "--run_dir", tmp_path, "--attempts", 2, "--max_new_tokens", 40, "--overwrite")
        assert f"endpoint {server.url}, from the run's record" in out
        assert sent(server) == {"Bearer none"} == sent(judge)
    args = common.ModelArgs()
    common.inherit(args, {"01": {"endpoint": "http://evil/\x1b[2K\rhttp://good/v1"}}, "01", "endpoint")
    assert "\\x1b[2K\\rhttp" in capsys.readouterr().out, "what is said can't hide itself"
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"secret" not in file.read_bytes()


def test_another_judge_for_a_local_model(tiny, tmp_path, ok):
    """Sampled here, judged there: it is said, and refining stays with the model of stage 1."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"id": f"p{i}", "prompt": f"question {i}"} for i in range(4)])
    ok("01_sample", "--run_dir", tmp_path, "--prompts", prompts, "--model", tiny(), "--n", 3, "--max_new_tokens", 8)
    with ChatServer() as server:
        judged = ("--judge_endpoint", server.url, "--judge_model", "strict", *JSON)
        for stage, options in (("02_score", judged), ("03_refine", ("--max_new_tokens", 8))):
            out, _ = ok(stage, "--run_dir", tmp_path, *options)
            assert f"strict judges the responses of {tiny()}" in out
        assert f"strict at {server.url}: " in out
    args = json.loads((tmp_path / "03_args.json").read_text())["args"]
    assert (args["model"], args["judge_model"], args["endpoint"]) == (tiny(), "strict", None)


def test_a_local_judge_scores_a_server_s_rows_in_batches(tiny, tmp_path, ok, monkeypatch):
    judge, sizes = common.judge, []
    with ChatServer() as server:
        for stage in ("01_sample", "02_score"):
            ok(stage, *options_of(stage, tmp_path, server))
        monkeypatch.setattr(common, "judge", lambda *a, **o: sizes.append(len(a[1])) or judge(*a, **o))
        local = ("--judge_model", tiny(), "--score_mode", "expected", "--batch_size", 10)
        ok("03_refine", *options_of("03_refine", tmp_path, server, *local))
    assert sizes == [10, 10, 4]


def test_an_interrupt_does_not_wait_for_the_server(tmp_path):
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 (ignored where tests run in the background)
    with ChatServer(lambda number, body: time.sleep(60 * (number > 6)) or "ok") as server:
        command = [sys.executable, "01_sample.py", *map(str, options_of("01_sample", tmp_path, server))]
        pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True, "preexec_fn": heard}
        process = subprocess.Popen([*command, "--concurrency", "2"], cwd=ROOT, **pipes)
        wait(lambda: len(server.received) >= 9)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "goes on where it stopped" in err and "Traceback" not in err
    assert time.monotonic() - started < 10
    assert len(read_rows(tmp_path / "01_samples.jsonl")) >= 1
