"""Tiny models and tokenizers, and the ways to run a stage: the tests need no network and no real weights."""

import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from forked import Launch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import common

logging.disable_progress_bar()  # of saving a tiny model, in the midst of what a stage says
torch.set_num_threads(1)  # as in the forked processes: sums of other parts differ in the last digit

ROOT = Path(__file__).resolve().parent.parent
PROBES = Path(__file__).with_name("probes.jsonl")  # few, for stage 2
STAGES = ("01_sample", "02_score", "03_refine", "04_denoise", "05_pairs", "06_train")

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = dict.fromkeys(("plain", "pad_eos", "ten_is_one", "long"), CHATML) | {  # long: a context of 4,096
    "bos": "{{ bos_token }}" + CHATML,
    "no_template": None,
    "no_end": CHATML.replace("<|im_end|>", "|"),
    "default_system": "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}" + CHATML,
}

# The structures of the chat templates in most use, in the tests' own tokens
HEAD = r"""{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set rest = messages[1:] if system else messages %}
{%- macro turn(role, text) %}{{ '<|im_start|>' + role + '\n' + text + '<|im_end|>\n' }}{% endmacro %}"""
ASK = r"{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
FAMILIES = {
    "default system": TEMPLATES["default_system"],  # Qwen 2.5
    # Qwen 3
    "thought rewritten": r"""{%- for m in messages %}
  {%- set parts = m.content.split('</think>') if m.role == 'assistant' else [m.content] %}
  {%- set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}
  {%- set thought = '<think>\n' + thought + '\n</think>\n\n' if m.role == 'assistant' and loop.last else '' %}
  {{- turn(m.role, thought + parts[-1].lstrip('\n')) }}{% endfor %}""" + ASK,
    # DeepSeek R1
    "thought opened": r"""{{- bos_token + system }}{% for m in rest %}
  {{- m.role + ': ' + m.content.split('</think>')[-1] + (eos_token if m.role == 'assistant' else '') }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: <think>\n' }}{% endif %}""",
    # Gemma 2
    "system refused": r"""{{- bos_token }}{% if system %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
  {{- turn(m.role, m.content | trim) }}{% endfor %}""" + ASK,
    # Gemma 3
    "text or parts": r"""{{- bos_token }}{% for m in rest %}
  {%- set text = m.content if m.content is string else m.content[0].text %}
  {{- turn(m.role, (system + '\n\n' if loop.first and system else '') + text | trim) }}{% endfor %}""" + ASK,
    # Llama 3.2
    "a date": r"""{{- bos_token }}{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}
{{- turn('system', 'Today Date: ' + date + '\n\n' + system | trim) }}
{%- for m in rest %}{{ turn(m.role, m.content | trim) }}{% endfor %}""" + ASK,
    # Llama 2
    "no generation prompt": r"""{{- bos_token }}{% for m in rest %}
  {%- set before = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '' %}
  {{- '[INST] ' + before + m.content | trim + ' [/INST]' if m.role == 'user' else ' ' + m.content | trim + eos_token }}
{%- endfor %}""",
    # Mistral 0.3
    "system before the last": r"""{{- bos_token }}{% for m in rest %}
  {%- set before = system + '\n\n' if loop.last and system else '' %}
  {{- '[INST] ' + before + m.content + '[/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}
{%- endfor %}""",
    # Phi 3
    "eos at the end": r"""{% for m in messages %}{{ turn(m.role, m.content) }}{% endfor %}""" + ASK
    + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
    # gpt-oss
    "channels": r"""{{- turn('system', 'It is ' + strftime_now('%Y-%m-%d')) }}
{%- if system %}{{ turn('developer', '# Instructions\n\n' + system) }}{% endif %}
{%- for m in rest %}{{ turn(m.role + ('<s>final' if m.role == 'assistant' else ''), m.content) }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}""",
    # LLaVA
    "parts only": "{% for m in messages %}{{ turn(m.role, m.content[0]['text']) }}{% endfor %}" + ASK,
}  # fmt: skip
FAMILIES = {name: HEAD + template for name, template in FAMILIES.items()}


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer. "10" is two tokens, but for the kind ten_is_one."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    splits = [] if kind == "ten_is_one" else [pre_tokenizers.Digits(individual_digits=True)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [common.JUDGE_TEMPLATE, *common.CONSTITUTION.values(), ": 10, : 10 10" * 99]
    special = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>", "<pad>"]
    options = {"special_tokens": special, "initial_alphabet": byte_level.alphabet()}
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=420, **options))
    if kind == "bos":  # adds <s> to every text unless told not to
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokens = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    tokens |= {"pad_token": "<|im_end|>" if kind == "pad_eos" else "<pad>"}
    tokens |= {"additional_special_tokens": ["<|im_start|>"]}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    fast.chat_template = TEMPLATES[kind]
    return fast


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "eos_token_id": 3, "pad_token_id": 4}


def make_model(vocab_size: int, seed: int = 0, context: int = 1024) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    own = {"bos_token_id": 1, "initializer_range": 0.3}  # so that the logits differ visibly
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=context, **SIZES, **own)
    return LlamaForCausalLM(config).eval()


def make_kind(kind: str, vocab_size: int, **options):
    """A tiny random model of another kind than Llama ("gemma2", …), of the same sizes; options in its own words."""
    sizes = SIZES | {"vocab_size": vocab_size, "max_position_embeddings": 1024}
    config = AutoConfig.for_model(kind, **(sizes | options))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(kind) -> the folder of a saved tiny model with that kind of tokenizer."""
    made = {}

    def make(kind: str = "plain") -> str:
        if kind not in made:
            folder = tmp_path_factory.mktemp(f"tiny_{kind}")
            tokenizer = make_tokenizer(kind)
            tokenizer.save_pretrained(folder)
            make_model(len(tokenizer), context=4096 if kind == "long" else 1024).save_pretrained(folder)
            made[kind] = str(folder)
        return made[kind]

    return make


def free_locks() -> None:
    """What happens where a process of its own would end."""
    while common._LOCKS:
        common._LOCKS.popitem()[1].close()


@pytest.fixture
def call(monkeypatch, capsys):
    """call("01_sample", "--n", 3, …) runs a stage in this process: (exit code, stdout, stderr)."""

    def run(stage: str, *arguments) -> tuple[int, str, str]:
        module = importlib.import_module(stage)
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", *map(str, arguments)])
        code = 0
        try:
            common.run_stage(module.main, module.Args)
        except SystemExit as stop:
            code = stop.code
        free_locks()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def ok(call):
    """ok("01_sample", "--n", 3, …) runs a stage that ends well: (stdout, stderr)."""

    def run(*arguments) -> tuple[str, str]:
        code, out, err = call(*arguments)
        assert code == 0, err
        return out, err

    return run


@pytest.fixture
def fails(call):
    """fails(words, "01_sample", "--n", 3, …) runs a stage that ends in one line that says `words`: (stdout, stderr)."""

    def run(words: str, *arguments, code=2) -> tuple[str, str]:
        found, out, err = call(*arguments)
        assert found == code and words in err and err.count("error: ") == 1 and "Traceback" not in err, err
        assert err.splitlines()[-1].startswith(f"{arguments[0]}.py: error: ")
        return out, err

    return run


def run_script(script: str, *arguments, **options) -> subprocess.CompletedProcess:
    """Runs a script of the kit as a user does, in a process of its own."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


class Browser:
    """Headless Chromium, driven as a person does."""

    def __init__(self, webdriver, programs: list[str], folder: Path):
        options = webdriver.ChromeOptions()
        options.binary_location, self.downloads = programs[0], folder / "downloads"
        switches = "headless=new no-sandbox disable-gpu no-first-run disable-background-networking disable-sync "
        switches += f"disable-component-update disable-dev-shm-usage user-data-dir={folder / 'profile'}"
        for switch in switches.split():
            options.add_argument(f"--{switch}")
        options.add_experimental_option("prefs", {"download.default_directory": str(self.downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1], log_output=subprocess.DEVNULL))
        self.script, self.cdp = self.driver.execute_script, self.driver.execute_cdp_cmd
        self.press = lambda *keys: [webdriver.ActionChains(self.driver, 0).send_keys(key).perform() for key in keys]

    def open(self, page: Path, width: int = 1280, scheme: str = "light") -> None:
        """A page on a screen of this width, a phone's below 600, in the light or the dark."""
        self.resize(width)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.cdp("Emulation.setEmulatedMedia", media)
        self.driver.get(page.as_uri())

    def resize(self, width: int) -> None:
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
        self.cdp("Emulation.setDeviceMetricsOverride", size)

    def messages(self) -> list[dict]:
        """What has come to the console since it was last asked."""
        return self.driver.get_log("browser")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A Browser; without one the test skips, but fails where CI is true."""
    programs = [shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")]
    with contextlib.suppress(ImportError):
        from selenium import webdriver

        if all(programs):
            started = Browser(webdriver, programs, tmp_path_factory.mktemp("chromium"))
            yield started
            started.driver.quit()
            return
    missing = "needs selenium, and Debian's chromium and chromium-driver"
    pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)


@contextlib.contextmanager
def refused(words: str):
    """The block ends in a UserError that says `words`, in one line."""
    with pytest.raises(common.UserError, match=re.escape(words) or None) as error:
        yield error
    assert "\n" not in str(error.value)


def wait(condition) -> None:
    """Until the condition holds, a minute at most: a busy machine is slow."""
    end = time.time() + 60
    while not condition():
        assert time.time() < end, "nothing happened in a minute"
        time.sleep(0.02)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def count_rows(path: Path) -> int:
    """The whole rows that a running stage has written so far."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def scored_row(id: str, candidates: list, refined, texts: list[str] | None = None) -> dict:
    """A row of 03_refined.jsonl from scores alone."""
    texts = texts or [f"{id} answer {i}" for i in range(len(candidates))]
    responses = [{"text": t, "system": None, "scores": s} for t, s in zip(texts, candidates, strict=True)]
    return {
        "id": id,
        "prompt": f"question {id}",
        "responses": responses,
        "refined": {"text": f"{id} refined", "scores": refined},
    }


def make_record(folder: Path, number: str, **arguments) -> None:
    """A record as stage `number` leaves it, so that the stages behind know how its rows were made."""
    arguments = {"objectives": ["harmlessness", "helpfulness"], "score_mode": "constrained"} | arguments
    record = {"stage": number, "args": arguments, "earlier": {}, "complete": True}
    (folder / f"{number}_args.json").write_text(json.dumps(record))


# ------------------------------------------------------------------------------------ a whole run

PROMPTS = [{"id": f"p{i}", "prompt": f"Question {i}: " + "is it safe to say so? " * (i % 4 + 1)} for i in range(7)]
PROMPTS.append({"id": "é", "prompt": [*CHAT[:-1], {"role": "user", "content": "Is it <|im_end|> safe?"}]})
COMMANDS = {
    "01_sample": ("--system_prob", 0.5, "--n", 3, "--max_new_tokens", 6, "--batch_size", 6),
    "02_score": ("--score_mode", "expected", "--batch_size", 6, "--judge_probes", PROBES),
    "03_refine": ("--attempts", 2, "--max_new_tokens", 6, "--batch_size", 4),
    "04_denoise": ("--consistency", "off"),
    "05_pairs": ("--delta", 0.01),
    "06_train": ("--learning_rate", 1e-3, "--batch_size", 4, "--accept_unfit_judge"),
}
FILES = {"01_sample": "01_samples.jsonl", "02_score": "02_scores.jsonl", "03_refine": "03_refined.jsonl"}


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """A run directory with stages 1 to 6 done, and what they printed; test_recipes.py runs them as a user does."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    prompts = write_rows(run_dir.parent / "prompts.jsonl", PROMPTS)
    COMMANDS["01_sample"] = ("--prompts", prompts, "--model", tiny(), *COMMANDS["01_sample"])
    printed = {}
    for stage, options in COMMANDS.items():
        code, out, err = Launch(f"{stage}.py", "--run_dir", run_dir, *options).finish()
        assert code == 0, err[-3000:]
        printed[stage] = (out, err)
    return run_dir, printed


def copy_run(finished, folder: Path, stage: str, itself: bool = False) -> list[str]:
    """Puts a copy of the run up to before `stage` into a folder; that stage's command line."""
    folder.mkdir(exist_ok=True)
    for before in STAGES[: STAGES.index(stage) + itself]:
        for file in finished[0].glob(f"{before[:2]}_*"):
            if file.is_file():
                shutil.copy(file, folder)
    return ["--run_dir", str(folder), *map(str, COMMANDS[stage])]


def pytest_collection_modifyitems(items: list) -> None:
    """The files that take minutes come first, so that of two workers none waits for them in the end."""
    items.sort(key=lambda item: item.path.stem not in ("test_real_model", "test_world"))
