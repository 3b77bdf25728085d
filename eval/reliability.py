"""How reliable are the scores, and does ρ remove the unreliable prompts?

Each response is judged again k times: under k paraphrases of Figure 9's template, or by k sampled answers.
The variance of its scores is set against det Σ of its prompt's first scores: if det tells reliability,
prompts above ρ vary more. Where stage 4 has run, det Σ, ρ and the lower bound are its own. With --others, another
judge's scores of the same responses stand beside these.

    reads   --runs: run directories with 02_scores.jsonl; --others: for each of them one with the same
            responses, scored by another judge (02_score.py --judge_model)
    writes  OUTPUT_DIR/reliability_NAME.jsonl for each run (resumed), reliability.csv (a row per prompt),
            reliability_responses.csv (per response), reliability.md, .png and .pdf
    run     python eval/reliability.py --runs runs/quickstart
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from dataclasses import dataclass

import numpy as np
import shared

import common
from common import arg, check

# Figure 9 in other words; the first is the paper's (common.JUDGE_TEMPLATE). All take the same fields.
PARAPHRASES = (
    common.JUDGE_TEMPLATE,
    """\
Act as a neutral evaluator and rate the response below on {count} criteria:
{dimensions}

Each criterion gets a whole number between 1 (worst) and 10 (best).

Answer with nothing but this JSON:
{{
{fields}
}}

{instruction_part}### Response:
{response}""",
    """\
{instruction_part}### Response:
{response}

You have read a response by an AI assistant. Judge it without favour on these {count} dimensions:
{dimensions}

Give every dimension a score from 1 to 10, higher is better. Write strictly:
{{
{fields}
}}""",
    """\
Your task is quality control. These {count} properties of a response are to be scored from 1 to 10.
{dimensions}

{instruction_part}### Response:
{response}

Output format, strictly:
{{
{fields}
}}""",
)


@dataclass
class Args(shared.JudgeArgs):
    runs: list[str] = arg(None, shared.RUN_HELP, free=True)
    others: list[str] | None = arg(None, "as many, with another judge's scores of the same responses", free=True)
    how: str = arg(
        "paraphrases",
        "paraphrases: k wordings of the template, read as in stage 2; sampled: k free answers, temperature 1",
        ("paraphrases", "sampled"),
    )
    k: int = arg(4, "times that each response is judged")
    rho: float | None = arg(None, "ρ of 04_denoise.py; default: that of each run, else its default", free=True)


def variances(scores: list) -> tuple[float, ...] | None:
    """Population variance of each axis over the times that were read; None for fewer than 2."""
    read = np.array([row for row in scores if row is not None], dtype=float)
    return tuple(read.var(axis=0).tolist()) if len(read) > 1 else None


def agreement(pairs: list[tuple[list, list]], names: list[str]) -> list[dict]:
    """Two judges of the same responses: RV over all axes, and per axis Spearman, equal, and within 1."""
    mine, theirs = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    rows = [{"dimension": "all", "rv": shared.rv_coefficient(mine, theirs)}]
    for axis, name in enumerate(names):
        gap = np.abs(mine[:, axis] - theirs[:, axis])
        rows.append(
            {
                "dimension": name,
                "spearman": shared.spearman(mine[:, axis], theirs[:, axis]),
                "equal": float(np.mean(gap < 1e-9)),
                "within_1": float(np.mean(gap <= 1)),
            }
        )
    return rows


def compare_judges(run: shared.Run, other: shared.Run) -> tuple[int, list[dict]]:
    """(responses that both scored, `agreement` of the two). Raises UserError if the responses differ."""
    pairs, theirs = [], {row["id"]: row for row in other.rows}
    mine = {row["id"]: row for row in run.rows}
    for id in shared.shared_ids(run, other):
        one, two = mine[id]["responses"], theirs[id]["responses"]
        same = [r["text"] for r in one] == [r["text"] for r in two]
        check(same, f"id '{id}': {run.path} and {other.path} have other responses")
        pairs += [(a["scores"], b["scores"]) for a, b in zip(one, two, strict=True) if a["scores"] and b["scores"]]
    check(len(pairs) > 1, f"{run.path} and {other.path} have no two responses that both judges scored")
    return len(pairs), agreement(pairs, run.objectives)


def bounds_and_dets(run: shared.Run, rho: float | None) -> tuple[float, float, dict[str, float]]:
    """(det_min, ρ, id -> det Σ): stage 4's own where it has run beside these scores, else by its defaults.

    Its det Σ may be of another covariance (--ddof, --cov_scope), so it is read, not computed again.
    """
    record = common.read_record(run.path.with_name("04_args.json"))
    least, found = 0.0, {}
    for id, group in run.groups().items():
        scores = [own for own in group if own is not None]
        if len(scores) > 1:
            found[id] = shared.det_covariance(scores)
    if record.get("complete"):
        least, rho = record["args"]["det_min"], record["args"]["rho"] if rho is None else rho
        for name in ("04_denoised.jsonl", "04_dropped.jsonl"):
            rows = shared.read_filtered(run.path.with_name(name))
            found |= {row["id"]: row["det"] for row in rows if row.get("det") is not None}
    return least, 30.0 if rho is None else rho, found


def prompt_rows(run: shared.Run, again: list[dict], bounds: tuple[float, float], dets: dict) -> list[dict]:
    """A row per prompt with two scored responses: det Σ of its scores, kept or not, mean variance by axis."""
    rows = []
    for repeated in again:
        found = [row for row in map(variances, repeated["times"]) if row is not None]
        if repeated["id"] in dets and found:
            means, det = np.mean(found, axis=0).tolist(), dets[repeated["id"]]
            by_axis = zip(run.objectives, means, strict=True)
            rows.append(
                {"id": repeated["id"], "det": det, "kept": bounds[0] < det <= bounds[1], "variance": sum(means)}
                | {f"variance_{name}": value for name, value in by_axis}
            )
    return rows


def response_rows(run: shared.Run, again: list[dict], prompts: list[dict]) -> list[dict]:
    """A row per response that was read at least twice: its prompt's det and `kept`, its own variance."""
    of_prompt, rows = {row["id"]: row for row in prompts}, []
    for repeated in again:
        for number, times in enumerate(repeated["times"], 1):
            found, prompt = variances(times), of_prompt.get(repeated["id"])
            if found and prompt:
                row = {"id": repeated["id"], "response": number, "det": prompt["det"], "kept": prompt["kept"]}
                by_axis = zip(run.objectives, found, strict=True)
                rows.append(row | {"variance": sum(found)} | {f"variance_{name}": v for name, v in by_axis})
    return rows


def variance_table(rows: list[dict], names: list[str], bounds: tuple[float, float]) -> str:
    """Mean variance of all prompts, of those that det_min < det ≤ ρ keeps, and of those that it drops."""
    keys, table = ["variance", *(f"variance_{name}" for name in names)], []
    groups = {
        "all": rows,
        f"kept, {bounds[0]:g} < det ≤ {bounds[1]:g}": [row for row in rows if row["kept"]],
        "dropped": [row for row in rows if not row["kept"]],
    }
    for label, chosen in groups.items():
        means = [float(np.mean([row[key] for row in chosen])) if chosen else math.nan for key in keys]
        table.append([label, str(len(chosen)), *(shared.round_half_up(mean, 4) for mean in means)])
    return shared.markdown_table(["prompts", "number", "mean variance, all axes", *names], table)


def draw(path, by_run: dict[str, list[dict]]) -> None:
    """det against variance, a point per response, a panel per run."""
    with shared.figure(path, columns=len(by_run), width=2 + 4.4 * len(by_run)) as panels:
        for axes, (name, rows) in zip(np.atleast_1d(panels), by_run.items(), strict=True):
            for kept, label, colour, marker in ((True, "kept", 0, "o"), (False, "dropped", 1, "s")):
                points = [(row["det"], row["variance"]) for row in rows if row["kept"] == kept]
                x, y = zip(*points, strict=True) if points else ((), ())
                axes.scatter(x, y, s=18, alpha=0.6, label=label, color=shared.COLOURS[colour], marker=marker)
            positive = [row["det"] for row in rows if row["det"] > 0]
            axes.set_xscale("symlog", linthresh=min(positive, default=1.0))
            axes.set(title=name, xlabel="det Σ of the prompt's scores (0, then log scale)")
            axes.set_ylabel("variance of the response's scores, judged again")
            axes.legend(title="by det_min < det ≤ ρ")


def read_answers(judge: common.Engine, texts: list[str], seeds: list[int], args: Args, names: list[str]) -> list:
    """The scores of each judge prompt, read once as args.score_mode says (sampled: from free text), or None."""
    chats, found = [common.as_messages(text) for text in texts], [None] * len(texts)
    room = judge.context - args.judge_max_new_tokens
    todo = [i for i, chat in enumerate(chats) if not common.too_long(judge, chat, room)]
    asked, tries = [chats[i] for i in todo], [seeds[i] for i in todo]
    if not todo:
        return found
    if args.how == "paraphrases" and args.score_mode != "json":
        for i, answer in zip(todo, judge.choose(asked, common.score_skeleton(names), common.SCORES), strict=True):
            if answer and args.score_mode == "constrained":
                found[i] = [choice.index + 1 for choice in answer]
            elif answer:  # Σ k P(k)
                means = (sum(k * math.exp(p) for k, p in enumerate(choice.logps, 1)) for choice in answer)
                found[i] = [round(mean, 6) for mean in means]
        return found
    sampling = {"temperature": float(args.how == "sampled"), "max_new_tokens": args.judge_max_new_tokens}
    for i, answer in zip(todo, judge.complete(asked, tries, **sampling), strict=True):
        found[i] = common.parse_scores(answer.text, names) if answer else None
    return found


def score_again(args: Args, judge: common.Engine, objectives: list[list[str]], some: list[dict]) -> list[dict]:
    """The finished rows of some prompts: k scores of every response that has text."""
    places = [(row, j) for row in some for j, one in enumerate(row["responses"]) if one["text"].strip()]
    seeds = [common.derive_seed(args.seed, row["id"], j) for row, j in places]
    times = []
    for turn in range(args.k):
        wording = PARAPHRASES[turn if args.how == "paraphrases" else 0]
        shown = [(row["prompt"], row["responses"][j]["text"], args.with_instruction, wording) for row, j in places]
        texts = [common.judge_prompt(objectives, *item) for item in shown]
        tries = [common.derive_seed(seed, turn) for seed in seeds]
        times.append(read_answers(judge, texts, tries, args, [name for name, _ in objectives]))
    found = {(row["id"], j): list(scores) for (row, j), *scores in zip(places, *times, strict=True)}
    return [
        {"id": row["id"], "times": [found.get((row["id"], j), [None] * args.k) for j in range(len(row["responses"]))]}
        for row in some
    ]


def repeated_scores(args: Args, run: shared.Run, label: str) -> tuple[list[dict], common.Engine] | None:
    """(`score_again` of all prompts of a run, its judge); None but on the first of several processes."""
    own = dataclasses.replace(args)  # what this run's record fills in is not the next one's
    other = own.judge_model or own.judge_endpoint
    check(not own.scorer and (other or not run.args.get("scorer")), "a function has no wording: pass --judge_model")
    output = shared.output_path(args.output_dir, f"reliability_{label}.jsonl")
    record, judge, objectives = shared.open_judge(own, run, "eval/reliability", output, scores=run.path)
    count = sum(len(row["responses"]) for row in run.rows)
    common.announce("reliability", judge.title, f"{count} responses of {label}, {args.k} times", args.how)

    def length(row: dict) -> int:
        longest = max((one["text"] for one in row["responses"]), key=len)
        text = common.judge_prompt(objectives, row["prompt"], longest, True)
        return common.text_size(common.as_messages(text)) + own.judge_max_new_tokens

    sizes = [(length(row), len(row["responses"])) for row in run.rows]
    work = functools.partial(score_again, own, judge, objectives)
    rows = common.map_rows(work, run.rows, sizes, record, output, judge, f"reliability of {label}")
    if rows is None:
        return None
    common.finish(record, len(rows))
    return rows, judge


def main(args: Args) -> None:
    common.check_at_least(args, 2, "k")
    most = len(PARAPHRASES)
    check(args.how == "sampled" or args.k <= most, f"--k {args.k}: there are {most} paraphrases; add more")
    runs = shared.read_runs(args.runs)
    labels = ["_".join(filter(None, (run.test_set, run.name))) for run in runs]
    plain = all(re.fullmatch(r"[\w.+-]+", label) for label in labels)
    check(plain, "--runs: names of letters, digits, . + - and _ only; files are named after them")
    others = [shared.read_run(spec) for spec in args.others or []]
    check(len(others) in (0, len(runs)), f"--others: {len(others)} for {len(runs)} runs; give one for each")

    by_run, by_response, texts, shown = {}, {}, [], shared.round_half_up
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        found = repeated_scores(args, run, label)
        if found is None:
            return
        again, judge = found
        *bounds, dets = bounds_and_dets(run, args.rho)
        rows = by_run[label] = prompt_rows(run, again, tuple(bounds), dets)
        few = f"{label}: fewer than two prompts have scores to compare; nothing to show"
        check(len(rows) > 1, few)
        by_response[label] = response_rows(run, again, rows)
        both = np.array([(row["det"], row["variance"]) for row in rows])
        rank = lambda sample: shared.spearman(*sample.T)  # noqa: E731
        low, high = shared.bootstrap_interval(both, rank, draws=2000, seed=args.seed)
        scores = [own for row in again for times in row["times"] for own in times]
        texts += [
            f"### {label}",
            variance_table(rows, run.objectives, tuple(bounds)),
            f"Spearman of det and variance: {shown(rank(both))} [{shown(low)}, {shown(high)}], bootstrap "
            f"95 %. Each response was judged {args.k} times ({args.how}) by {judge.title}; not read: "
            f"{scores.count(None)} of {len(scores)}",
        ]
        if others:
            number, agreed = compare_judges(run, others[i])
            keys = ("rv", "spearman", "equal", "within_1")
            cells = [[row["dimension"], *(shown(row.get(key, math.nan)) for key in keys)] for row in agreed]
            header = ["against another judge", "RV", "Spearman", "equal", "within 1"]
            texts += [shared.markdown_table(header, cells), f"{number} responses that both judges scored"]
    path = shared.output_path(args.output_dir, "reliability.csv")
    for suffix, of_runs in (("", by_run), ("_responses", by_response)):
        lines = [{"run": name} | row for name, rows in of_runs.items() for row in rows]
        shared.write_csv(path.with_name(f"reliability{suffix}.csv"), lines)
    shared.write_text(path.with_suffix(".md"), "\n\n".join(texts))
    draw(path, by_response)
    print("\n\n".join(["", *texts]))
    common.show_tokens(judge)
    print(f"\nwrote {path}, reliability_responses.csv, .md, .png and .pdf, and the scores beside them")


if __name__ == "__main__":
    common.run_stage(main, Args)
