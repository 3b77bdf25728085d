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
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import shared

import common
from common import arg, check

# Figure 9 as the paper has it, then in other words; a further file there is a further paraphrase
FILES = sorted((Path(__file__).parent / "prompts").glob("paraphrase_*.txt"))
PARAPHRASES = [common.JUDGE_TEMPLATE, *(path.read_text(encoding="utf-8").rstrip("\n") for path in FILES)]


@dataclass
class Args(shared.JudgeArgs):
    runs: list[str] = arg(None, shared.RUN_HELP, free=True)
    others: list[str] | None = arg(None, "as many, with another judge's scores of the same responses", free=True)
    how: str = arg("paraphrases", "paraphrases: k wordings of the template, read as in stage 2; sampled: k free "
        "answers, temperature 1", ("paraphrases", "sampled"))  # fmt: skip
    k: int = arg(4, "times that each response is judged")
    rho: float | None = arg(None, "ρ of 04_denoise.py; default: that of each run, else its default", free=True)


def judge_again(args: Args, judge: common.Engine, objectives: list[list[str]], some: list[dict]) -> list[dict]:
    """The finished rows of some prompts: k times the scores of every response, None where they can't be read."""
    places = [(row, j) for row in some for j in range(len(row["responses"]))]
    items = [(row["prompt"], row["responses"][j]["text"]) for row, j in places]
    times = []
    for turn in range(args.k):
        seeds = [common.derive_seed(args.seed, row["id"], j, turn) for row, j in places]
        again = turn > 0 and args.how == "paraphrases"  # the run's own words come first
        worded = dataclasses.replace(args, judge_template=PARAPHRASES[turn] if again else args.judge_template)
        times.append(common.judge(judge, items, worded, seeds, objectives))
    found = iter(zip(*times, strict=True))
    return [{"id": row["id"], "times": [list(next(found)) for _ in row["responses"]]} for row in some]


def repeated_scores(args: Args, run: shared.Run, label: str) -> tuple[list[dict] | None, str]:
    """(`judge_again` of all prompts of a run, None but on the first of several processes; its judge's name)."""
    own = dataclasses.replace(args)  # what this run's record fills in is not the next one's
    other = own.judge_model or own.judge_endpoint
    check(not own.scorer and (other or not run.args.get("scorer")), "a function has no wording: pass --judge_model")
    if args.how == "sampled":
        own.score_mode = "json"
    elif (own.score_mode or run.args.get("score_mode")) == "choice":
        common.warn(f"{label}: --score_mode choice has no judge prompt to put in other words; read as expected here")
        own.score_mode = "expected"
    output = shared.output_path(args.output_dir, f"reliability_{label}.jsonl")
    record, judge, objectives = shared.open_judge(own, run, "eval/reliability", output, scores=run.path)
    if args.how == "sampled":  # already the first answer
        greedy = judge.complete
        judge.complete = lambda *asked, **given: greedy(*asked, **(given | {"temperature": 1.0}))
    count = sum(len(row["responses"]) for row in run.rows)
    common.announce("reliability", judge.title, f"{count} responses of {label}, {args.k} times", args.how)
    sizes = []
    for row in run.rows:
        longest = max((response["text"] for response in row["responses"]), key=len)
        chat = common.as_messages(common.judge_prompt(objectives, row["prompt"], longest, True))
        sizes.append((common.text_size(chat) + own.judge_max_new_tokens, len(row["responses"])))
    work = functools.partial(judge_again, own, judge, objectives)
    rows = common.map_rows(work, run.rows, sizes, record, output, judge, f"reliability of {label}")
    if rows is not None:
        common.finish(record, len(rows))
        common.show_tokens(judge)
    return rows, judge.title


def bounds_and_dets(run: shared.Run, rho: float | None) -> tuple[float, float, dict[str, float]]:
    """(det_min, ρ, id -> det Σ): stage 4's own where it has run beside these scores, else by its defaults."""
    record, filtered, least = common.read_record(run.path.with_name("04_args.json")), [], 0.0
    if record.get("complete"):
        least, rho = record["args"]["det_min"], record["args"]["rho"] if rho is None else rho
        for name in ("03_refined.jsonl", "04_denoised.jsonl"):  # refuses det Σ of scores that are no longer there
            if common.record_file_of(run.path.with_name(name)).is_file():
                common.made_by(run.path.with_name(name))
        for name in ("04_denoised.jsonl", "04_dropped.jsonl"):
            filtered += common.read_rows(run.path.with_name(name), scored=True)
    several = {id: group for id, group in run.groups.items() if len(shared.read_scores(group)) > 1}
    return least, 30.0 if rho is None else rho, shared.dets_of(several, filtered)


def variance_rows(run: shared.Run, again: list[dict], least: float, rho: float, dets: dict) -> pd.DataFrame:
    """A row per response that was read at least twice: its prompt's det Σ, kept or not, the variance by axis."""
    rows = []
    for repeated in again:
        for number, times in enumerate(repeated["times"], 1):
            read, det = shared.read_scores(times), dets.get(str(repeated["id"]))
            if len(read) > 1 and det is not None:
                by_axis = np.var(read, axis=0)  # population variance
                rows.append([repeated["id"], number, det, least < det <= rho, by_axis.sum(), *by_axis])
    keys = ["id", "response", "det", "kept", "variance", *(f"variance_{name}" for name in run.objectives)]
    return pd.DataFrame(rows, columns=keys)


def agreement(run: shared.Run, other: shared.Run) -> dict:
    """Two judges of the same responses: RV over all axes, and per axis Spearman, equal, and within 1."""
    pairs = [pair for of_prompt in shared.scored_by_both(run, other).values() for pair in of_prompt]
    check(len(pairs) > 1, f"{run.path} and {other.path} have no two responses that both judges scored")
    mine, theirs = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))  # (N, k) each
    gaps, axes = np.abs(mine - theirs), {}
    for axis, name in enumerate(run.objectives):
        alike = [float(np.mean(gaps[:, axis] <= most)) for most in (1e-9, 1)]
        axes[name] = [shared.spearman(mine[:, axis], theirs[:, axis]), *alike]
    return {"rv": shared.rv_coefficient(mine, theirs), "axes": axes, "responses": len(pairs)}


def draw(path, by_run: dict[str, pd.DataFrame]) -> None:
    """det against variance, a point per response, a panel per run."""
    with shared.figure(path, columns=len(by_run), width=2 + 4.4 * len(by_run)) as panels:
        for axes, (name, rows) in zip(np.atleast_1d(panels), by_run.items(), strict=True):
            for kept, label, marker in ((True, "kept", "o"), (False, "dropped", "s")):
                points = rows[rows["kept"] == kept]
                axes.scatter(points["det"], points["variance"], s=18, alpha=0.6, label=label, marker=marker)
            positive = rows["det"][rows["det"] > 0]
            axes.set_xscale("symlog", linthresh=positive.min() if len(positive) else 1.0)
            axes.set(title=name, xlabel="det Σ of the prompt's scores (0, then log scale)")
            axes.set_ylabel("variance of the response's scores, judged again")
            axes.legend(title="by det_min < det ≤ ρ")


def main(args: Args) -> None:
    common.check_at_least(args, 2, "k")
    few = f"--k {args.k}: there are {len(PARAPHRASES)} paraphrases; add more to eval/prompts"
    check(args.how == "sampled" or args.k <= len(PARAPHRASES), few)
    runs = shared.read_runs(args.runs)
    labels = ["_".join(filter(None, (run.test_set, run.name))) for run in runs]
    plain = all(re.fullmatch(r"[\w.+-]+", label) for label in labels)
    check(plain, "--runs: names of letters, digits, . + - and _ only; files are named after them")
    others = [shared.read_run(spec) for spec in args.others or []]
    check(len(others) in (0, len(runs)), f"--others: {len(others)} for {len(runs)} runs; give one for each")
    for run, other in zip(runs, others, strict=False):
        shared.check_objectives(other, run)

    repeated = [repeated_scores(args, run, label) for run, label in zip(runs, labels, strict=True)]
    if common.processes()[0] > 0:  # the first of several reports
        return
    by_prompt, by_response, found = {}, {}, {}
    for i, (run, label, (again, judge)) in enumerate(zip(runs, labels, repeated, strict=True)):
        least, rho, dets = bounds_and_dets(run, args.rho)
        rows = by_response[label] = variance_rows(run, again, least, rho, dets)
        prompts = rows.drop(columns="response").groupby(["id", "det", "kept"], sort=False).mean().reset_index()
        check(len(prompts) > 1, f"{label}: fewer than two prompts have scores to compare; nothing to show")
        by_prompt[label] = prompts
        rank = lambda sample: shared.spearman(*sample.T)  # noqa: E731
        both = prompts[["det", "variance"]].to_numpy()
        low, high = shared.bootstrap_interval(both, rank, draws=2000, seed=args.seed)
        scores = [own for row in again for times in row["times"] for own in times]
        groups = {f"kept, {least:g} < det ≤ {rho:g}": prompts[prompts["kept"]], "dropped": prompts[~prompts["kept"]]}
        found[label] = {"names": run.objectives, "groups": {"all": prompts} | groups, "judge": judge}
        found[label] |= {"rank": {"mean": rank(both), "low": low, "high": high}, "scores": scores}
        found[label] |= {"other": agreement(run, others[i]) if others else None}
    text = shared.render_page("reliability.md", runs=found, k=args.k, how=args.how)
    for suffix, of_runs in (("_responses", by_response), ("", by_prompt)):
        tables = [table.assign(run=name) for name, table in of_runs.items()]
        lines = pd.concat(tables, ignore_index=True)
        path = shared.output_path(args.output_dir, f"reliability{suffix}.csv")
        shared.write_csv(path, lines[["run", *lines.columns.drop("run")]])
    shared.write_text(path.with_suffix(".md"), text)
    draw(path, by_response)
    print(f"\n{text}\n\nwrote {path}, reliability_responses.csv, .md, .png and .pdf, and the scores beside them")


if __name__ == "__main__":
    common.run_stage(main, Args)
