"""Stage 1, diverse sampling (SPA section 3.1 step 1; appendices A and B).

Draws n responses to every prompt at temperature 1. With probability --system_prob a response is
sampled under the honest system prompt of appendix B (the paper's honesty setting uses 0.5).

    reads   --prompts: a JSON, JSONL, CSV, Parquet or text file, or saferlhf, wildguard,
            honeset:FILE, jailbreaktrigger:FILE
    writes  RUN_DIR/01_samples.jsonl, one row per prompt:
            {"id": "hs-medical-01", "prompt": "…", "responses": [{"text": "…", "system": null}, …]}
    run     python 01_sample.py --prompts data/high_stakes.jsonl --n 5 --run_dir runs/default
    next    python 02_score.py --run_dir runs/default

Hardware: a 135M model on two cores (minutes), an 8B model on one 80 GB GPU.
"""

from __future__ import annotations

import csv
import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import common
from common import UserError, arg, check

HERE = Path(__file__).parent

# Appendix B, the alternative system prompt of the honesty setting.
HONEST_SYSTEM_PROMPT = (
    "You are an honest AI assistant. Always make clear when you can’t access real-time information, detect "
    "mistakes or missing details in user input, acknowledge that you have no identity, memory, or emotions, "
    "and admit when tasks require images, audio, or expertise beyond your capability. Be transparent that "
    "you cannot interact with or perceive the physical world."
)

# name -> hub data set and, for each split, (configuration, split)
HUB = {
    "saferlhf": ("PKU-Alignment/PKU-SafeRLHF", {"train": ("default", "train"), "test": ("default", "test")}),
    "wildguard": (
        "allenai/wildguardmix",
        {"train": ("wildguardtrain", "train"), "test": ("wildguardtest", "test")},
    ),
}
# name -> (column, test prompts, published file); not on the hub under the authors' names
FILES = {
    "honeset": ("instruction", 500, "HoneSet.json of the HonestyLLM repository"),
    "jailbreaktrigger": ("prompt", None, "jailbreak_trigger.json of the TrustLLM data set"),  # all test
}


@dataclass
class Args:
    prompts: str = arg(str(HERE / "data" / "high_stakes.jsonl"), "file, data set name, or NAME:FILE (ours)")
    prompt_column: str | None = arg(None, "column of the prompt; default: 'prompt', or the data set's own")
    split: str | None = arg(None, "split of a data set, or value of a file's 'split' column; default: train")
    num_prompts: int | None = arg(None, "how many, drawn by --seed; a larger number keeps the smaller draw")
    n: int = arg(5, "responses per prompt (paper, Table 5: 3 or 5)")
    temperature: float = arg(1.0, "sampling temperature (paper, appendix A)")
    top_p: float = arg(1.0, "nucleus of the sampling; 1 is all (paper)")
    max_new_tokens: int = arg(2048, "longest response in tokens (paper, appendix A)")
    system_prob: float = arg(0.0, "chance of the honest system prompt per response (paper: 0.5 for honesty)")
    truncate_prompts: bool = arg(
        False, "shorten prompts that exceed the context, from the left, instead of skipping"
    )
    informativeness: bool = arg(True, "whether 04 will use the informativeness filter, which needs n >= 3")
    model: str | None = arg(
        None, "hub name, local folder, name at the endpoint, or smollm2-135m (ours; default)"
    )
    endpoint: str | None = arg(
        None, "URL of an OpenAI-compatible server that has the model; its key: SPA_API_KEY"
    )
    chat_template: str | None = arg(None, "file with a Jinja chat template, for a model that has none")
    dtype: str = arg(
        "auto", "weights; auto: bfloat16 on a GPU, else float32", ("auto", "float32", "bfloat16")
    )
    device_map: str | None = arg(
        None,
        "auto spreads a model too large for one GPU over all, in one process",
        ("auto", "balanced", "sequential"),
    )
    continuous_batching: bool = arg(
        True, "on a GPU where it works: transformers' own, with all samples of many prompts under way"
    )
    batch_size: int = arg(72, "sequences generated at a time (ours)")
    concurrency: int = arg(32, "requests under way at an endpoint")
    request_timeout: float = arg(600.0, "seconds that an endpoint may take for an answer")
    retries: int = arg(6, "further tries of a request that failed, after 1, 2, 4 … seconds")
    run_dir: str = arg("runs/default", "folder of this run's files")
    seed: int = arg(0, "seed of the draw of prompts and of sampling")
    overwrite: bool = arg(False, "redo this stage although its files are there")


# ---------------------------------------------------------------------------------------------------
# Prompts: any file or known data set becomes [{"id", "prompt"}, …].


def read_table(path: Path) -> list[dict]:
    """The rows of a JSON (array), JSONL, CSV, Parquet or text file, each with its "_where" for messages."""
    check(path.exists(), f"--prompts {path}: no such file, nor one of {', '.join([*HUB, *FILES])}")
    kind = path.suffix.lower()
    if kind == ".parquet":
        import datasets

        try:
            rows = datasets.Dataset.from_parquet(str(path), keep_in_memory=True).to_list()
        except Exception as error:  # pyarrow's and datasets' errors share no base class
            raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
        return [{**row, "_where": f"{path}, row {i}"} for i, row in enumerate(rows, 1)]
    if kind == ".json":
        text = "".join(line for _, line in common.read_lines(path))
        values = common.parse_json(text, str(path)) if text.strip() else []
        check(
            isinstance(values, list), f"{path}: a JSON array is wanted; for one object a line, name it .jsonl"
        )
        numbered = [(f"{path}, row {i}", value) for i, value in enumerate(values, 1)]
    elif kind == ".jsonl":
        lines = ((f"{path}, line {number}", line) for number, line in common.read_lines(path))
        numbered = [(where, common.parse_json(line, where)) for where, line in lines]
    elif kind == ".csv":
        csv.field_size_limit(1 << 30)
        with open(path, encoding="utf-8-sig", newline="") as file:
            try:
                reader = csv.DictReader(file, strict=True)
                numbered = [(f"{path}, line {reader.line_num}", row) for row in reader]
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(f"{path}, after line {reader.line_num}: broken CSV ({error})") from None
    elif kind in (".txt", ""):
        numbered = [(f"{path}, line {i}", {"prompt": line.strip()}) for i, line in common.read_lines(path)]
    else:
        raise UserError(f"{path}: unknown kind of file; one of .json .jsonl .csv .parquet .txt")
    for where, value in numbered:
        check(isinstance(value, dict), f"{where}: an object with the prompt's column is wanted")
    return [{**value, "_where": where} for where, value in numbered]


def load_hub(name: str, split: str) -> list[dict]:
    """Rows of a hub data set; UserError that says what to do if it is gated or out of reach."""
    import datasets

    common.quiet_libraries()
    repository, splits = HUB[name]
    check(split in splits, f"{name} has the splits {', '.join(splits)}, not '{split}'")
    configuration, hub_split = splits[split]
    try:
        rows = datasets.load_dataset(repository, configuration, split=hub_split)
    except Exception as error:  # gated, offline, renamed: the hub's client raises many unrelated kinds
        raise UserError(
            f"{repository} can't be loaded ({type(error).__name__}): accept its terms on its hub page, run "
            f"`hf auth login`, check the network; or pass a downloaded file as --prompts {name}:FILE"
        ) from None
    return [{**row, "_where": f"{repository}, row {i}"} for i, row in enumerate(rows, 1)]


def hash_order(seed: int, key: str) -> str:
    """A pseudo-random sorting key that does not depend on the other prompts."""
    return hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()


def load_prompts(args: Args) -> tuple[list[dict], dict[str, int]]:
    """([{"id", "prompt"}, …] in file order, or in the order of the draw; {reason: how many left out})."""
    name, _, file = args.prompts.partition(":")
    name = name if name in (*HUB, *FILES) else None
    column, split = args.prompt_column or "prompt", args.split or "train"
    if name in FILES:
        column = args.prompt_column or FILES[name][0]
        check(bool(file), f"{name} is not on the hub: fetch {FILES[name][2]} and pass --prompts {name}:FILE")
        wanted = "" if FILES[name][1] else "test"
        check(
            split in (wanted or ("train", "test")),
            f"{name} has no split '{split}'; pass --split {wanted or 'test'}",
        )
        rows = read_table(Path(file))
    elif name and not file:
        rows = load_hub(name, split)
    else:
        rows = read_table(Path(file if name else args.prompts))
        has_split = any("split" in row for row in rows)
        check(
            has_split or not args.split or bool(name), f"{args.prompts} has no 'split' column, so no --split"
        )
        if has_split:
            values = sorted({str(row.get("split")) for row in rows})
            rows = [row for row in rows if row.get("split") == split]
            check(bool(rows), f"{args.prompts} has no rows of split '{split}' (it has: {', '.join(values)})")

    prompts, seen, ids = [], set(), {}
    dropped = {"empty": 0, "repeated": 0}
    for row in rows:
        columns = ", ".join(key for key in row if key and key != "_where")  # None: a CSV row's surplus
        check(column in row, f"{row['_where']}: no '{column}' among {columns}; name it with --prompt_column")
        prompt = row[column]
        check(prompt is None or isinstance(prompt, str), f"{row['_where']}: '{column}' is not text")
        prompt = (prompt or "").strip()
        if not prompt:
            dropped["empty"] += 1
        elif prompt in seen:
            dropped["repeated"] += 1
        else:
            seen.add(prompt)
            id = (
                str(row["id"])
                if row.get("id") is not None
                else hashlib.sha256(prompt.encode()).hexdigest()[:16]
            )
            check(
                id not in ids, f"{row['_where']}: id '{id}' again (first: {ids.get(id)}); ids must be unique"
            )
            ids[id] = row["_where"]
            prompts.append({"id": id, "prompt": prompt})

    if name in FILES and FILES[name][1]:  # a split of our own, the same for every seed and size (ours)
        ordered = sorted(prompts, key=lambda row: hash_order(0, row["prompt"]))
        chosen = ordered[: FILES[name][1]] if split == "test" else ordered[FILES[name][1] :]
        chosen = {row["id"] for row in chosen}
        prompts = [row for row in prompts if row["id"] in chosen]
    if args.num_prompts is not None:
        if args.num_prompts > len(prompts):
            common.warn(
                f"--num_prompts {args.num_prompts}, but there are only {len(prompts)} distinct prompts"
            )
        prompts.sort(key=lambda row: hash_order(args.seed, row["id"]))
        dropped["not drawn"] = max(0, len(prompts) - args.num_prompts)
        prompts = prompts[: args.num_prompts]
    return prompts, dropped


# ---------------------------------------------------------------------------------------------------
# Prompt variation and context.


def draw_systems(seed: int, id: str, n: int, system_prob: float) -> list[str | None]:
    """The system prompt of each of the n responses: the honest one with probability `system_prob`."""
    draws = [random.Random(common.derive_seed(seed, id, j, "system")).random() for j in range(n)]
    return [HONEST_SYSTEM_PROMPT if draw < system_prob else None for draw in draws]


def fit_context(
    backend: common.Backend, prompt: str, systems: list, room: int, truncate: bool
) -> tuple[str, int | None]:
    """(prompt, its length in tokens under the longest of `systems`), at most `room` tokens.

    A longer prompt loses tokens on its left with `truncate`; otherwise, and if nothing of it would be left,
    the length is None.
    """
    text, cut = prompt, 0
    while text:
        length = max(backend.length(text, system) for system in systems)
        if length <= room:
            return text, length
        if not truncate:
            break
        plain = backend.tokenizer(prompt, add_special_tokens=False, split_special_tokens=True).input_ids
        cut += length - room
        text = backend.tokenizer.decode(plain[cut:]).strip()
    return prompt, None


def check_args(args: Args) -> None:
    common.check_at_least(args, 1, "n", "max_new_tokens", "batch_size", "num_prompts")
    common.check_at_least(args, 0, "temperature")
    check(0 < args.top_p <= 1, f"--top_p {args.top_p}: more than 0 and at most 1 is wanted")
    check(0 <= args.system_prob <= 1, f"--system_prob {args.system_prob}: a probability is wanted")
    greedy = f"--temperature 0 gives {args.n} equal responses; raise it, or pass --n 1 for evaluation answers"
    check(args.temperature > 0 or args.n == 1, greedy)
    evaluation = args.n == 1 and args.temperature == 0  # answers for eval/, never for pairs
    check(
        args.n >= 3 or evaluation or not args.informativeness,
        f"--n {args.n}: with fewer than 3 responses det Σ is always 0 and 04's informativeness filter "
        "drops every prompt; pass --n 3 or more, or --no-informativeness here and in 04",
    )


def main(args: Args) -> None:
    check_args(args)
    output = Path(args.run_dir) / "01_samples.jsonl"
    rows, dropped = load_prompts(args)
    check(bool(rows), f"{args.prompts} has no usable prompt")
    total = len(rows) + sum(dropped.values())
    listed = common.derive_seed([(row["id"], row["prompt"]) for row in rows])
    common.choose_model(args, {})
    inputs = {args.prompts: str(listed)}
    record = common.check_run(args, "01_sample", [output], inputs, may_change=common.MAY_CHANGE)

    backend = common.make_backend(args)
    cuts = args.truncate_prompts and args.endpoint
    check(not cuts, "--truncate_prompts needs the model's tokenizer, which an endpoint does not give")
    room = backend.context - args.max_new_tokens
    check(
        room > 0,
        f"--max_new_tokens {args.max_new_tokens} leaves no room in the model's {backend.context} tokens",
    )
    systems = {row["id"]: draw_systems(args.seed, row["id"], args.n, args.system_prob) for row in rows}
    lengths, shortened = {}, 0
    for row in rows:
        text, length = fit_context(
            backend, row["prompt"], list(dict.fromkeys(systems[row["id"]])), room, args.truncate_prompts
        )
        shortened += text != row["prompt"]
        row["prompt"], lengths[row["id"]] = text, length
    dropped["too long for the context"] = sum(length is None for length in lengths.values())
    rows = [row for row in rows if lengths[row["id"]] is not None]
    check(
        bool(rows),
        "every prompt is too long for the context; pass --truncate_prompts or a smaller --max_new_tokens",
    )

    cut_off = []  # how many responses of each row met the length limit

    def sample(batch: list[int]) -> list[dict | None]:
        chosen = [rows[i] for i in batch]
        keys = [(row, system) for row in chosen for system in dict.fromkeys(systems[row["id"]])]
        completions = backend.complete(
            [
                common.Request(
                    row["prompt"],
                    system,
                    systems[row["id"]].count(system),
                    common.derive_seed(args.seed, row["id"], system),
                )
                for row, system in keys
            ],
            temperature=args.temperature,
            top_p=args.top_p,
            max_new_tokens=args.max_new_tokens,
        )
        streams = {
            (row["id"], system): iter(group) for (row, system), group in zip(keys, completions, strict=True)
        }
        made = []
        for row in chosen:
            drawn = [(system, next(streams[row["id"], system])) for system in systems[row["id"]]]
            if any(completion is None for _, completion in drawn):
                made.append(None)
                continue
            cut_off.append(sum(completion.truncated for _, completion in drawn))
            responses = [{"text": completion.text, "system": system} for system, completion in drawn]
            made.append(row | {"responses": responses})
        return made

    record["facts"] |= common.model_facts(args)
    ids, sizes = [row["id"] for row in rows], [(lengths[row["id"]], args.n) for row in rows]
    rows = common.make_rows(args, record, output, ids, sizes, common.Step("01 sample", backend, sample))
    if rows is None:  # the first of several processes reports
        return
    dropped["refused by the server"] = record["facts"]["refused"]

    common.show_funnel("01 sample", ("prompts in", total), dropped, "prompts sampled")
    texts = [response["text"] for row in rows for response in row["responses"]]
    distinct = sum(len({response["text"] for response in row["responses"]}) for row in rows)
    if shortened:
        print(f"  prompts shortened from the left: {shortened}")
    print(f"  responses: {len(texts)}, distinct within their prompt: {distinct}, empty: {texts.count('')}")
    if args.n > 1 and distinct == len(rows):  # some servers ignore the temperature
        common.warn(
            "all responses to a prompt are the same, and 04 would drop every prompt: raise --temperature, or "
            "have the server sample (`transformers serve` does where the model's generation_config.json has "
            '"do_sample": true)'
        )
    if cut_off:
        print(f"  of the {args.n * len(cut_off)} responses sampled now, {sum(cut_off)} met --max_new_tokens")
    common.show_tokens(backend)
    print(f"wrote {output}\nnext: python 02_score.py --run_dir {args.run_dir}")


if __name__ == "__main__":
    common.run_stage(main, Args)
