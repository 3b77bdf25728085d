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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import shared
from scipy.stats import binomtest

import common
from common import arg, check

TEMPLATE_FILE = Path(__file__).parent / "prompts" / "pairwise.txt"
PAIRWISE_TEMPLATE = TEMPLATE_FILE.read_text(encoding="utf-8").rstrip("\n")
OPTIONS = ("A", "B", "tie")
FORM = ('{"better": "', '"}')  # around the option


@dataclass
class Args(shared.JudgeArgs):
    runs: list[str] = arg(None, f"{shared.RUN_HELP}; each is compared with the first", free=True)
    score_mode: str | None = arg(None, "constrained or expected: only A, B or tie can be chosen; json: free text; "
        "default: as the runs were scored", ("constrained", "expected", "json"))  # fmt: skip


def pairwise_prompt(objective: list[str], prompt: str | list[dict], a: str, b: str) -> str:
    """The question about one dimension. `str.format` fills once, so braces in answers stay as they are."""
    name, definition = objective
    return PAIRWISE_TEMPLATE.format(name=name, definition=definition, instruction=common.plain_text(prompt), a=a, b=b)


def parse_verdict(text: str) -> int | None:
    """0 (A), 1 (B) or 2 (tie) in a free answer; None without one, or if several are named."""
    objects, (mentions,) = common.read_fields(text, ["better"], rf"(?:response\s+)?({'|'.join(OPTIONS)})\b")
    read = [one for (one,) in objects] or mentions[-1:]
    named = {one and one.lower() for one in [*read, *filter(None, mentions)]}
    return {"a": 0, "b": 1, "tie": 2}.get(named.pop()) if len(named) == 1 else None


def ask_verdicts(args: Args, judge: common.Engine, texts: list[str], seeds: list[int]) -> list[int | None]:
    """The option of each question: the likeliest inside the given form, or read from a free answer; None: neither."""
    chats, longest = [common.as_messages(text) for text in texts], args.judge_max_new_tokens
    if args.score_mode == "json":
        return [verdict for verdict, *_ in shared.ask(judge, chats, seeds, parse_verdict, longest)]
    verdicts: list[int | None] = [None] * len(texts)
    todo = [i for i, chat in enumerate(chats) if not common.too_long(judge, chat, judge.context - longest)]
    answers = judge.choose([chats[i] for i in todo], list(FORM), list(OPTIONS)) if todo else []
    for i, answer in zip(todo, answers, strict=True):
        verdicts[i] = answer[0].index if answer else None
    return verdicts


def score_verdicts(scorer: common.Scorer, rows: list[dict], k: int) -> list[list[list[int]]]:
    """Both orders' options of each row and objective: a function's higher score wins, in any order."""
    scores = scorer.score([(row["prompt"], row[side]) for row in rows for side in ("a", "b")], k)
    ways = {1: [0, 1], -1: [1, 0], 0: [2, 2]}
    pairs = zip(scores[::2], scores[1::2], strict=True)
    return [[ways[(x > y) - (x < y)] for x, y in zip(*pair, strict=True)] for pair in pairs]


def outcome(in_order: int | None, swapped: int | None) -> tuple[str | None, bool]:
    """(win, tie or lose of the system, which is A in order and B swapped; whether the two orders differ in it).

    None where an order's verdict is not read.
    """
    if in_order is None or swapped is None:
        return None, False
    views = ("win", "lose", "tie")[in_order], ("lose", "win", "tie")[swapped]
    return (views[0], False) if views[0] == views[1] else ("tie", True)


def summarize(rows: list[dict], run: shared.Run, dimension: str, seed: int) -> dict:
    """Counts, net wins with their interval, flips, p-value and lengths in words of one system and dimension."""
    rows = [row for row in rows if (row["test_set"], row["system"]) == (run.test_set, run.name)]
    found = [(*outcome(*row["verdicts"][dimension]), row) for row in rows]
    outcomes = [result for result, *_ in found]
    counts = {name: outcomes.count(name) for name in ("win", "tie", "lose")}
    net = [{"win": 1, "tie": 0, "lose": -1}[result] for result in outcomes if result]
    flips = [flip for result, flip, row in found if result and not row["equal"]]
    # words of (the system, the base) become those of (the winner, the loser)
    words = [row["words"][:: 1 if result == "win" else -1] for result, _, row in found if result in ("win", "lose")]
    winner, loser = np.mean(words, axis=0).tolist() if words else (math.nan, math.nan)
    decided = counts["win"] + counts["lose"]
    about = {"test_set": run.test_set, "system": run.name, "dimension": dimension, "prompts": len(net)}
    about |= {"unread": outcomes.count(None), "equal": sum(row["equal"] for row in rows)}
    about |= counts | shared.estimate(net, "net", seed)
    about["flip_rate"] = float(np.mean(flips)) if flips else math.nan
    about["sign_test_p"] = float(binomtest(counts["win"], decided).pvalue) if decided else 1.0
    return about | {"winner_words": winner, "loser_words": loser}


def draw(path: Path, summaries: list[dict], base: str) -> None:
    """Stacked bars of win, tie and lose, a bar per system and dimension."""
    labels = [f"{row['test_set']} {row['system']}: {row['dimension']}".strip() for row in summaries]
    counts = pd.DataFrame(summaries, index=labels)[["win", "tie", "lose"]]
    shares = 100 * counts.div(counts.sum(axis="columns").clip(lower=1), axis="index")
    with shared.figure(path, height=1.4 + 0.45 * len(labels)) as axes:
        shares.plot.barh(ax=axes, stacked=True, width=0.8, color=[shared.COLOURS[0], "0.75", shared.COLOURS[1]])
        for bars in axes.containers:
            texts = [f"{share:.0f}" if share >= 5 else "" for share in bars.datavalues]
            axes.bar_label(bars, texts, label_type="center")
        axes.invert_yaxis()
        axes.set(xlabel=f"per cent of prompts, against {base}", xlim=(0, 100))
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def compare(args: Args, judge: common.Engine, objectives: list[list[str]], rows: list[dict]) -> list[dict]:
    """The finished rows of some prompts: both orders' verdicts on each objective."""
    names, todo = [name for name, _ in objectives], [row for row in rows if row["a"] != row["b"]]
    if isinstance(judge, common.Scorer):
        found = score_verdicts(judge, todo, len(names)) if todo else []
    else:
        asked = [(row, objective, order) for row in todo for objective in objectives for order in (0, 1)]
        texts = [pairwise_prompt(of, row["prompt"], row["ab"[order]], row["ba"[order]]) for row, of, order in asked]
        seeds = [common.derive_seed(args.seed, row["id"], name, order) for row, (name, _), order in asked]
        verdicts = np.array(ask_verdicts(args, judge, texts, seeds), dtype=object)
        found = verdicts.reshape(len(todo), len(names), 2).tolist()
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
    others, rows, bases = [], [], {}
    for test_set, (base, *rest) in shared.by_test_set(runs).items():
        others, bases = others + rest, bases | ({test_set: base.name} if rest else {})
        theirs = {row["id"]: row["responses"][0]["text"] for row in base.rows}
        for run in rest:
            mine = {row["id"]: row for row in run.rows}
            for id in shared.shared_ids(run, base):
                about = {"id": f"{test_set}:{run.name}/{id}", "test_set": test_set, "system": run.name}
                answers = {"a": mine[id]["responses"][0]["text"], "b": theirs[id]}
                rows.append(about | {"prompt": mine[id]["prompt"]} | answers)
    check(rows, "these runs have no prompt in common, or no test set has two")

    output = shared.output_path(args.output_dir, "pairwise_verdicts.jsonl")
    inputs = {"--runs": str(common.derive_seed(rows))}  # the answers themselves, wherever they lie
    record, judge, objectives = shared.open_judge(args, runs[0], "eval/pairwise", output, **inputs)
    common.announce("pairwise", judge.title, f"{len(rows)} pairs of answers", args.score_mode)
    sizes = []
    for row in rows:
        tokens = common.text_size(common.as_messages(row["prompt"])) + args.judge_max_new_tokens
        tokens += (len(row["a"].encode()) + len(row["b"].encode())) // 3
        sizes.append((tokens, 2 * len(objectives) * (row["a"] != row["b"])))
    work = functools.partial(compare, args, judge, objectives)
    done = common.map_rows(work, rows, sizes, record, output, judge, "pairwise")
    if done is None:
        return
    common.finish(record, len(done))

    summaries = [summarize(done, run, name, args.seed) for run in others for name, _ in objectives]
    text = shared.render_page("pairwise.md", rows=summaries, bases=bases, judge=judge.title)
    path = shared.write_table(args.output_dir, "pairwise", text, summaries)
    draw(path, summaries, " or ".join(dict.fromkeys(bases.values())))
    print(f"\n{text}")
    common.show_tokens(judge)
    print(f"wrote {output}, {path}, .csv, .png and .pdf")


if __name__ == "__main__":
    common.run_stage(main, Args)
