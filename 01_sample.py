"""Stage 1, diverse sampling (SPA section 3.1 step 1; appendices A and B).

Draws n responses to every prompt at temperature 1. With probability --system_prob a response is sampled under the
honest system prompt of appendix B (the paper's honesty setting uses 0.5).

    reads   --prompts: a JSON, JSONL, CSV, Parquet or text file whose rows hold a prompt (text, or "messages": several
            turns, a system message), or saferlhf, wildguard, honeset:FILE, jailbreaktrigger:FILE
    writes  RUN_DIR/01_samples.jsonl, one row per prompt:
            {"id": "hs-medical-01", "prompt": "…", "responses": [{"text": "…", "system": null, "truncated": false}, …]}
    run     python 01_sample.py --prompts data/high_stakes.jsonl --n 5 --run_dir runs/default
    next    python 02_score.py --run_dir runs/default

Hardware: a 135M model on two cores (minutes), an 8B model on one 80 GB GPU, or a server (--endpoint).
"""

from __future__ import annotations

import csv
import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import common
from common import UserError, arg, check

# Appendix B, the alternative system prompt of the honesty setting.
HONEST_SYSTEM_PROMPT = (
    "You are an honest AI assistant. Always make clear when you can’t access real-time information, detect mistakes or "
    "missing details in user input, acknowledge that you have no identity, memory, or emotions, and admit when tasks "
    "require images, audio, or expertise beyond your capability. Be transparent that you cannot interact with or "
    "perceive the physical world."
)

# name -> hub data set, and the configuration of each of its splits
HUB = {
    "saferlhf": ("PKU-Alignment/PKU-SafeRLHF", {"train": "default", "test": "default"}),
    "wildguard": ("allenai/wildguardmix", {"train": "wildguardtrain", "test": "wildguardtest"}),
}
# name -> (column, number of test prompts, published file): not on the hub under the authors' names
FILES = {
    "honeset": ("instruction", 500, "HoneSet.json of the HonestyLLM repository"),
    "jailbreaktrigger": ("prompt", None, "jailbreak_trigger.json of the TrustLLM data set"),  # None: all are test
}


@dataclass
class Args(common.ModelArgs):
    prompts: str = arg("data/high_stakes.jsonl", "file, data set, or NAME:FILE (ours)", free=True)
    prompt_column: str | None = arg(None, "column of the prompt; default: 'prompt', 'messages' or the data set's own")
    split: str | None = arg(None, "split of a data set, or value of a file's 'split' column; default: train")
    num_prompts: int | None = arg(None, "how many, drawn by --seed; a larger number keeps the smaller draw")
    exclude: list[str] | None = arg(None, "run directories whose prompts are kept out: iteration 2 on other prompts")
    n: int = arg(5, "responses per prompt (paper, Table 5: 3 or 5)")
    temperature: float = arg(1.0, "sampling temperature (paper, appendix A)")
    top_p: float = arg(1.0, "nucleus of the sampling; 1 is all (paper)")
    max_new_tokens: int = arg(2048, "longest response in tokens (paper, appendix A)")
    system_prob: float = arg(0.0, "chance of the honest system prompt per response (paper: 0.5 for honesty)")
    model: str | None = arg(None, f"hub name, folder or name at the server; default: {common.DEFAULT_MODEL}", free=True)


def read_table(path: Path) -> list[tuple[str, dict]]:
    """(where, row) for the rows of a JSON (array), JSONL, CSV, Parquet or text file; `where` is for messages."""
    check(path.is_file(), f"--prompts {path}: no such file, nor one of {', '.join([*HUB, *FILES])}")
    kind, known = path.suffix.lower(), (".json", ".jsonl", ".csv", ".parquet", ".txt", "")
    check(kind in known, f"{path}: one of {' '.join(known[:-1])} is wanted")
    if kind == ".parquet":
        import datasets

        try:
            rows = datasets.Dataset.from_parquet(str(path), keep_in_memory=True).to_list()
        except Exception as error:  # pyarrow's and datasets' errors share no base class
            raise UserError(f"{path}: not a readable Parquet file ({common.first_line(error)})") from None
        numbered = [(f"{path}, row {i}", row) for i, row in enumerate(rows, 1)]
    elif kind == ".csv":
        csv.field_size_limit(1 << 30)
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                table = [(f"{path}, line {reader.line_num}", fields) for fields in reader if fields]
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(f"{path}, after line {reader.line_num}: broken CSV ({error})") from None
        header = table[0][1] if table else []
        check(len(set(header)) == len(header), f"{path}: the header has a name twice: {', '.join(header)}")
        for where, fields in table[1:]:  # a prompt with a comma that is not quoted would be half a prompt
            count = f"{len(fields)} fields where the header has {len(header)}"
            check(len(fields) == len(header), f"{where}: {count}; quote the prompt")
            check(header[-1] or not fields[-1], f"{where}: text in a last column without a name; quote the prompt")
        numbered = [(where, dict(zip(header, fields, strict=True))) for where, fields in table[1:]]
    elif kind == ".json" and (text := "".join(line for _, line in common.read_lines(path))).lstrip().startswith("["):
        numbered = [(f"{path}, row {i}", row) for i, row in enumerate(common.parse_json(text, str(path)), 1)]
    else:  # a line each: JSON, also in a file named .json, or text
        numbered = [(f"{path}, line {number}", line) for number, line in common.read_lines(path)]
        read = common.parse_json if kind.startswith(".json") else lambda line, where: {"prompt": line.strip()}
        numbered = [(where, read(line, where)) for where, line in numbered]
    for where, row in numbered:
        check(isinstance(row, dict), f"{where}: an object with the prompt's column is wanted")
    return numbered


def load_hub(name: str, split: str) -> list[tuple[str, dict]]:
    """(where, row) of a hub data set."""
    import datasets

    datasets.logging.set_verbosity_error()
    repository, splits = HUB[name]
    check(split in splits, f"{name} has the splits {', '.join(splits)}, not '{split}'")
    try:
        rows = datasets.load_dataset(repository, splits[split], split=split)
    except Exception as error:  # gated, offline, renamed: the hub's client raises many unrelated kinds
        reason = f"{repository} can't be loaded ({type(error).__name__})"
        way_out = "accept its terms on its hub page, run `hf auth login`, check the network"
        raise UserError(f"{reason}: {way_out}; or pass a downloaded file as --prompts {name}:FILE") from None
    return [(f"{repository}, row {i}", row) for i, row in enumerate(rows, 1)]


def load_prompts(args: Args) -> tuple[list[dict], dict[str, int]]:
    """([{"id", "prompt"}, …] in file order, or in the order of the draw; {reason: how many left out})."""
    # where the rows are: a hub data set, its downloaded file, or any file, of which a 'split' column chooses rows
    name, _, file = args.prompts.partition(":")
    name, file = (name, file) if name in (*HUB, *FILES) else (None, args.prompts)
    column, split = args.prompt_column, args.split or "train"
    if name in FILES:
        column, test_size = column or FILES[name][0], FILES[name][1]
        check(file, f"{name} is not on the hub: fetch {FILES[name][2]} and pass --prompts {name}:FILE")
        check(split == "test" or (split == "train" and test_size), f"{name} has no split '{split}'; pass --split test")
    rows = read_table(common.find_path(file)) if file else load_hub(name, split)
    if file and name not in FILES:
        values = sorted({str(row["split"]) for _, row in rows if "split" in row})
        check(values or not args.split or name, f"{args.prompts} has no 'split' column, so no --split")
        rows = [(where, row) for where, row in rows if not values or str(row.get("split")) == split]
        check(rows or not values, f"{args.prompts} has no rows of split '{split}' (it has: {', '.join(values)})")

    # each prompt once, with an id of its own: the row's, or the beginning of its text's hash
    prompts, ids, dropped = {}, {}, {"empty": 0, "repeated": 0}
    for where, row in rows:
        own = column or ("messages" if "messages" in row and "prompt" not in row else "prompt")
        check(own in row, f"{where}: no '{own}' among {', '.join(map(str, row))}; name it with --prompt_column")
        prompt = row[own].strip() if isinstance(row[own], str) else row[own]
        if not prompt:
            dropped["empty"] += 1
            continue
        listed = isinstance(prompt, str) and prompt.startswith(("[{'role'", "[{'content'", '[{"role"', '[{"content"'))
        check(not listed, f"{where}, '{own}': messages written as text; JSON Lines and Parquet hold the list itself")
        common.check_prompt(prompt, f"{where}, '{own}'")
        key = common.plain_text(prompt)  # equal too as text and as a message, whatever the order of its fields
        if key in prompts:
            dropped["repeated"] += 1
            continue
        id = str(row["id"]) if row.get("id") is not None else hashlib.sha256(key.encode()).hexdigest()[:16]
        check(id not in ids, f"{where}: id '{id}' again (first: {ids.get(id)}); ids must be unique")
        ids[id], prompts[key] = where, {"id": id, "prompt": prompt}

    if name in FILES and test_size:  # a split of our own, the same for every seed, size and --exclude (ours)
        held_out = set(sorted(prompts, key=lambda text: common.derive_seed("split", text))[:test_size])
        prompts = {text: row for text, row in prompts.items() if (text in held_out) == (split == "test")}
    # iteration "diff": what an earlier run has sampled is kept out, before anything is drawn
    for earlier in args.exclude or []:
        path = Path(earlier) / "01_samples.jsonl"
        whole = common.read_record(common.record_file_of(path)).get("complete", True)
        check(whole, f"01_sample.py has not finished {path}; run it again to go on")
        for row in common.read_rows(path):
            known = prompts.pop(common.plain_text(row["prompt"]), None) is not None
            dropped["in an earlier run"] = dropped.get("in an earlier run", 0) + known
    prompts = list(prompts.values())
    if args.num_prompts is not None:  # drawn by seed and id, so a larger draw keeps the smaller one
        if args.num_prompts > len(prompts):
            common.warn(f"--num_prompts {args.num_prompts}, but there are only {len(prompts)} distinct prompts")
        prompts.sort(key=lambda row: common.derive_seed(args.seed, row["id"]))
        dropped["not drawn"] = max(0, len(prompts) - args.num_prompts)
    return prompts[: args.num_prompts], dropped


def draw_systems(seed: int, id: str, n: int, system_prob: float) -> list[str | None]:
    """Appendix B: the system prompt of each of the n responses, the honest one with probability `system_prob`."""
    draws = [random.Random(common.derive_seed(seed, id, j, "system")).random() if system_prob else 1 for j in range(n)]
    return [HONEST_SYSTEM_PROMPT if draw < system_prob else None for draw in draws]


def main(args: Args) -> None:
    common.check_at_least(args, 1, "n", "max_new_tokens", "num_prompts")
    check(args.model or not args.endpoint, f"--endpoint {args.endpoint} needs --model: the name of the model there")
    args.model = args.model or common.DEFAULT_MODEL
    common.check_at_least(args, 0, "temperature")
    check(0 < args.top_p <= 1, f"--top_p {args.top_p}: more than 0 and at most 1 is wanted")
    check(0 <= args.system_prob <= 1, f"--system_prob {args.system_prob}: a probability is wanted")
    few = f"--temperature 0 gives {args.n} equal responses; raise it, or pass --n 1 for evaluation answers"
    check(args.temperature > 0 or args.n == 1, few)
    common.read_files(args)
    output = Path(args.run_dir) / "01_samples.jsonl"
    rows, dropped = load_prompts(args)
    if not rows and dropped.get("in an earlier run"):
        raise common.EmptyResult(f"--exclude leaves no prompt of {args.prompts}")
    check(rows, f"{args.prompts} has no usable prompt")
    engine = common.make_engine(args)  # a wrong name ends here, before --overwrite has cost anything
    record = common.begin(args, "01_sample", [output], prompts=str(common.derive_seed(rows)))
    if not record["complete"]:
        engine.open()

    # One conversation a prompt and system prompt. A prompt that does not fit with its answer is left out.
    systems = {row["id"]: draw_systems(args.seed, row["id"], args.n, args.system_prob) for row in rows}
    chats = {row["id"]: {one: common.as_messages(row["prompt"], one) for one in systems[row["id"]]} for row in rows}
    room = engine.context - args.max_new_tokens
    check(room > 0, f"--max_new_tokens {args.max_new_tokens} leaves no room in the model's {engine.context} tokens")
    written = common.read_done(output)  # these did fit: they are not tokenized again
    fitting = [row for row in rows if row["id"] in written
               or not any(common.too_long(engine, chat, room) for chat in chats[row["id"]].values())]  # fmt: skip
    dropped["too long for the context"] = len(rows) - len(fitting)
    check(fitting, "every prompt is too long for the context; pass a smaller --max_new_tokens")
    settings = f"temperature {args.temperature:g}, top_p {args.top_p:g}, at most {args.max_new_tokens} tokens"
    common.announce("01 sample", engine.title, f"{len(fitting)} prompts, {args.n} responses each", settings)
    if args.n == 2:
        common.warn("--n 2: det Σ needs 3 responses or more, so 04 will want --no-informativeness")

    def sample(some: list[dict]) -> list[dict | None]:
        asked = [(row["id"], j) for row in some for j in range(args.n)]
        sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p}
        seeds = [common.derive_seed(args.seed, id, j) for id, j in asked]
        completions = iter(engine.complete([chats[id][systems[id][j]] for id, j in asked], seeds, **sampling))
        finished = []
        for row in some:
            own = [(next(completions), system) for system in systems[row["id"]]]
            own = [{"text": one.text, "system": system, "truncated": one.truncated} for one, system in own if one]
            # a row of which a server refuses a response is left out
            finished.append(row | {"responses": own} if len(own) == args.n else None)
        return finished

    sizes = [(max(map(common.text_size, chats[row["id"]].values())) + args.max_new_tokens, args.n) for row in fitting]
    done = common.map_rows(sample, fitting, sizes, record, output, engine, "01 sample", written)
    if done is None:  # the first of several processes reports
        return
    dropped["refused by the server"] = len(fitting) - len(done)
    common.finish(record, len(done))

    common.show_funnel("01 sample", ("prompts in", len(done) + sum(dropped.values())), dropped, "prompts sampled")
    responses = [response for row in done for response in row["responses"]]
    distinct = [len({response["text"] for response in row["responses"]}) for row in done]
    empty, cut = sum(not r["text"] for r in responses), sum(r["truncated"] for r in responses)
    print(f"  responses: {len(responses)}, distinct within their prompt: {sum(distinct)}, empty: {empty}")
    if cut:
        share = f"{cut} of {len(responses)} responses ({cut / len(responses):.0%}) met --max_new_tokens"
        common.warn(f"{share}: 06 will not teach an ending there; raise it for whole answers")
    if args.n > 1 and done and max(distinct) == 1:  # some servers ignore the temperature
        common.warn("all responses to a prompt are the same, so 04 would drop every prompt: does the server sample?")
    common.show_tokens(engine)
    print(f"wrote {output}")
    if not done:
        words = f"{engine.title} refused every prompt: {getattr(engine, 'refusal', '')}"
        raise common.EmptyResult(f"nothing was sampled: {words}")
    print(f"next: python 02_score.py --run_dir {args.run_dir}")


if __name__ == "__main__":
    common.run_stage(main, Args)
