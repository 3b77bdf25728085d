"""Which of two answers is better? Pairwise comparison per dimension: the paper's Figure 4.

A judge sees the prompt and both answers in both orders; if it prefers the same answer twice that system wins,
any disagreement is a tie (the paper prints no prompt; this one and the rule are ours). Also: how often the
order decides (flip rate), the lengths of winner and loser, and a sign test of wins against losses. Equal answers
are ties, and nobody is asked about them. With --scorer the higher score wins.

    reads   run directories with 02_scores.jsonl (01_sample.py --temperature 0 --n 1, test prompts); the
            first answer of each prompt; the first run of a test set is the one that its others are compared with
    writes  OUTPUT_DIR/pairwise_verdicts.jsonl (resumed), pairwise.md, .csv, .png and .pdf
    run     python eval/pairwise.py --runs Vanilla=runs/x/test_base SPA=runs/x/test_trained
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shared

import common
from common import arg, check

PAIRWISE_TEMPLATE = """\
You are an impartial AI judge. Two responses to the same instruction are to be compared on one dimension only:
{name}: {definition}

Decide which response is better on this dimension. The order and the length of the responses do not count.

Format your response strictly as:
{{"better": "A"}} or {{"better": "B"}}, or {{"better": "tie"}} if neither is better on this dimension

### Instruction:
{instruction}

### Response A:
{a}

### Response B:
{b}"""
OPTIONS = ("A", "B", "tie")
FORM = ('{"better": "', '"}')  # around the option


@dataclass
class Args(shared.JudgeArgs):
    runs: list[str] = arg(None, f"{shared.RUN_HELP}; each is compared with the first", free=True)
    score_mode: str | None = arg(
        None,
        "constrained or expected: only A, B or tie can be chosen; json: free text; default: as the runs were scored",
        ("constrained", "expected", "json"),
    )


def pairwise_prompt(objective: list[str], prompt: str | list[dict], a: str, b: str) -> str:
    """The question about one dimension. `str.format` fills once, so braces in answers stay as they are."""
    name, definition = objective
    return PAIRWISE_TEMPLATE.format(name=name, definition=definition, instruction=common.plain_text(prompt), a=a, b=b)


VERDICT = re.compile(
    r"better[\"'*\s]*[:=]\s*[\"'*]*\s*(?:response\s+)?(A|B|tie)\b(?!\s*(?:[/|&]|(?:or|and)\b|,\s*(?:A|B|tie)\b))",
    re.IGNORECASE,
)


def parse_verdict(text: str) -> int | None:
    """0 (A), 1 (B) or 2 (tie) in a free answer behind its last </think>; None without one, or if several are named."""
    found = {verdict.lower() for verdict in VERDICT.findall(text.rpartition("</think>")[2])}
    return [option.lower() for option in OPTIONS].index(found.pop()) if len(found) == 1 else None


def ask_verdicts(args: Args, judge: common.Engine, texts: list[str], seeds: list[int]) -> list[int | None]:
    """The option of each question: the likeliest inside the given form, or read from a free answer.

    A free answer that can't be read is asked again with sampling, twice; None where nothing helps, or no room is.
    """
    verdicts: list[int | None] = [None] * len(texts)
    chats = [common.as_messages(text) for text in texts]
    todo = [i for i, c in enumerate(chats) if not common.too_long(judge, c, judge.context - args.judge_max_new_tokens)]
    if args.score_mode != "json":
        answers = judge.choose([chats[i] for i in todo], list(FORM), list(OPTIONS)) if todo else []
        for i, answer in zip(todo, answers, strict=True):
            verdicts[i] = answer[0].index if answer else None
        return verdicts
    for attempt in range(1 + common.JSON_RETRIES):
        tries = [common.derive_seed(seeds[i], attempt) for i in todo]
        sampling = {"temperature": 1.0 if attempt else 0.0, "max_new_tokens": args.judge_max_new_tokens}
        answers = judge.complete([chats[i] for i in todo], tries, **sampling) if todo else []
        for i, answer in zip(todo, answers, strict=True):
            verdicts[i] = parse_verdict(answer.text) if answer else None
        todo = [i for i, answer in zip(todo, answers, strict=True) if answer and verdicts[i] is None]
    return verdicts


def score_verdicts(scorer: common.Scorer, rows: list[dict], k: int) -> list[list[list[int]]]:
    """Both orders' options of each row and objective: a function's higher score wins, in any order."""
    scores = scorer.score([(row["prompt"], row[side]) for row in rows for side in ("a", "b")], k)
    pairs = zip(scores[::2], scores[1::2], strict=True)
    ways = [[0 if x > y else 1 if x < y else 2 for x, y in zip(*pair, strict=True)] for pair in pairs]
    return [[[way, (1, 0, 2)[way]] for way in row] for row in ways]


def outcome(in_order: int | None, swapped: int | None) -> str | None:
    """win, tie or lose of the system, which is A in order and B swapped; None where one is not read."""
    if in_order is None or swapped is None:
        return None
    views = ("win", "lose", "tie")[in_order], ("lose", "win", "tie")[swapped]
    return views[0] if views[0] == views[1] else "tie"


def is_flip(in_order: int | None, swapped: int | None) -> bool:
    """Whether the two orders name different answers (a tie in one of them counts as different)."""
    return None not in (in_order, swapped) and (in_order, swapped) not in ((0, 1), (1, 0), (2, 2))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact binomial p-value of wins against losses at even odds; ties are left out."""
    n, k = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def summarize(rows: list[dict], run: shared.Run, dimension: str, seed: int) -> dict:
    """Counts, shares with their interval, flips, p-value and lengths in words of one system and dimension."""
    rows = [row for row in rows if (row["test_set"], row["system"]) == (run.test_set, run.name)]
    verdicts = [row["verdicts"][dimension] for row in rows]
    lengths = [row["words"] for row in rows]
    outcomes = [outcome(*pair) for pair in verdicts]
    counts = {name: outcomes.count(name) for name in ("win", "tie", "lose")}
    read = [o for o in outcomes if o is not None]
    net = [{"win": 1, "tie": 0, "lose": -1}[o] for o in read]
    low, high = shared.bootstrap_interval(net, seed=seed)
    decided = [(o, words) for o, words in zip(outcomes, lengths, strict=True) if o in ("win", "lose")]
    winner = [words[0] if o == "win" else words[1] for o, words in decided]
    loser = [words[1] if o == "win" else words[0] for o, words in decided]
    asked = [pair for pair, row in zip(verdicts, rows, strict=True) if None not in pair and not row["equal"]]
    return {
        "test_set": run.test_set,
        "system": run.name,
        "dimension": dimension,
        "prompts": len(read),
        "unread": outcomes.count(None),
        "equal": sum(row["equal"] for row in rows),
        **counts,
        "net": float(np.mean(net)) if net else math.nan,
        "net_low": low,
        "net_high": high,
        "flip_rate": float(np.mean([is_flip(*pair) for pair in asked])) if asked else math.nan,
        "sign_test_p": sign_test(counts["win"], counts["lose"]),
        "winner_words": float(np.mean(winner)) if winner else math.nan,
        "loser_words": float(np.mean(loser)) if loser else math.nan,
    }


def draw(path: Path, summaries: list[dict], base: str) -> None:
    """Stacked bars of win, tie and lose, a bar per system and dimension."""
    labels = [f"{row['test_set']} {row['system']}: {row['dimension']}".strip() for row in summaries]
    with shared.figure(path, height=1.4 + 0.45 * len(labels)) as axes:
        left = np.zeros(len(labels))
        for name, colour in (("win", shared.COLOURS[0]), ("tie", "0.75"), ("lose", shared.COLOURS[1])):
            share = np.array([100 * row[name] / max(1, row["prompts"]) for row in summaries])
            bars = axes.barh(labels, share, left=left, color=colour, label=name)
            texts = [f"{value:.0f}" if value >= 5 else "" for value in share]
            axes.bar_label(bars, texts, label_type="center", color="black" if name == "tie" else "white")
            left += share
        axes.invert_yaxis()
        axes.set(xlabel=f"per cent of prompts, against {base}", xlim=(0, 100))
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def compare(args: Args, judge: common.Engine, objectives: list[list[str]], rows: list[dict]) -> list[dict]:
    """The finished rows of some prompts: both orders' verdicts on each objective."""
    names, todo = [name for name, _ in objectives], [row for row in rows if row["a"] != row["b"]]
    if isinstance(judge, common.Scorer):
        found = score_verdicts(judge, todo, len(names)) if todo else []
    else:
        texts, seeds = [], []
        for row in todo:
            for objective in objectives:
                pairs = (row["a"], row["b"]), (row["b"], row["a"])
                texts += [pairwise_prompt(objective, row["prompt"], *pair) for pair in pairs]
                seeds += [common.derive_seed(args.seed, row["id"], objective[0], order) for order in (0, 1)]
        verdicts = iter(ask_verdicts(args, judge, texts, seeds))
        found = [[[next(verdicts), next(verdicts)] for _ in names] for _ in todo]
    found, done = iter(found), []
    for row in rows:
        equal = row["a"] == row["b"]  # a tie on everything; the order can't decide
        verdicts = dict(zip(names, [[2, 2] for _ in names] if equal else next(found), strict=True))
        about = {key: row[key] for key in ("id", "test_set", "system", "prompt")}
        words = [len(row["a"].split()), len(row["b"].split())]
        done.append(about | {"equal": equal, "verdicts": verdicts, "words": words})
    return done


def main(args: Args) -> None:
    runs = shared.read_runs(args.runs, least=2)
    others, rows = [], []
    for base, *rest in shared.by_test_set(runs).values():
        others += rest
        theirs = {row["id"]: row["responses"][0]["text"] for row in base.rows}
        for run in rest:
            mine = {row["id"]: row for row in run.rows}
            for id in shared.shared_ids(run, base):
                about = {"id": f"{run.test_set}:{run.name}/{id}", "test_set": run.test_set, "system": run.name}
                sides = {"a": mine[id]["responses"][0]["text"], "b": theirs[id]}
                rows.append(about | {"prompt": mine[id]["prompt"]} | sides)
    check(rows, "these runs have no prompt in common, or no test set has two")

    output = shared.output_path(args.output_dir, "pairwise_verdicts.jsonl")
    base = runs[0]
    inputs = {"--runs": str(common.derive_seed(rows))}  # the answers themselves, wherever they lie
    record, judge, objectives = shared.open_judge(args, base, "eval/pairwise", output, **inputs)
    common.announce("pairwise", judge.title, f"{len(rows)} pairs of answers", args.score_mode)
    longest = [len(row["a"].encode()) + len(row["b"].encode()) for row in rows]
    sizes = [
        (common.text_size(common.as_messages(row["prompt"])) + length // 3 + args.judge_max_new_tokens, count)
        for row, length in zip(rows, longest, strict=True)
        for count in [2 * len(objectives) * (row["a"] != row["b"])]
    ]
    work = functools.partial(compare, args, judge, objectives)
    done = common.map_rows(work, rows, sizes, record, output, judge, "pairwise")
    if done is None:
        return
    common.finish(record, len(done))

    summaries = [summarize(done, run, name, args.seed) for run in others for name, _ in objectives]
    shown = shared.round_half_up
    header = ["system", "dimension", "prompts", "unread", "equal", "win", "tie", "lose", "net", "flips", "sign test p"]
    header += ["words, winner", "words, loser"]
    table = []
    for row in summaries:
        counts = [str(row[key]) for key in ("prompts", "unread", "equal", "win", "tie", "lose")]
        net = f"{shown(row['net'])} [{shown(row['net_low'])}, {shown(row['net_high'])}]"
        words = [shown(row[key], 1) for key in ("winner_words", "loser_words")]
        p, name = shown(row["sign_test_p"], 4), f"{row['test_set']} {row['system']}".strip()
        table.append([name, row["dimension"], *counts, net, shown(row["flip_rate"]), p, *words])
    path = shared.output_path(args.output_dir, "pairwise.csv")
    text = shared.markdown_table(header, table)
    shared.write_csv(path, summaries)
    shared.write_text(path.with_suffix(".md"), text)
    draw(path, summaries, base.name)
    print(f"\nagainst {base.name}, judged by {judge.title}; net: (wins − losses) / prompts, bootstrap 95 %")
    print(f"\n{text}")
    common.show_tokens(judge)
    print(f"wrote {output}, {path}, .md, .png and .pdf")


if __name__ == "__main__":
    common.run_stage(main, Args)
