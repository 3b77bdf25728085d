"""Stage 2, self-evaluation (SPA section 3.1 step 2; Figure 9).

The model judges each of its own responses, from 1 to 10, on objectives in order of priority: the paper's are
harmlessness or honesty, then helpfulness. The constitution, Figure 9's prompt and its readers stand in common.py,
section "Judging", since 03 and the evaluation score in the same way.

    reads   RUN_DIR/01_samples.jsonl
    writes  RUN_DIR/02_scores.jsonl, the same rows, each response with its scores in order of priority:
            {"id": "…", "prompt": "…", "responses": [{"text": "…", "system": null, "scores": [9, 6]}, …]}
            or null: blank responses, answers that could not be read
            RUN_DIR/02_judge_check.jsonl, the judge's scores of probes whose right order is known: does it tell good
            from bad at all? Where it does not, stage 6 refuses to train on what it says
    run     python 02_score.py --objectives harmlessness helpfulness --run_dir runs/default
    next    python 03_refine.py --run_dir runs/default

Hardware: as stage 1; it reads each response once and, but for `--score_mode json`, generates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import common
from common import arg, check


@dataclass
class Args(common.JudgeArgs):
    judge_check: bool = arg(True, "score probes whose right order is known first (ours)")
    judge_probes: str = arg("data/judge_probes.jsonl", "file of these probes; of its splits, if any, test counts")


def main(args: Args) -> None:
    source, output = Path(args.run_dir) / "01_samples.jsonl", Path(args.run_dir) / "02_scores.jsonl"
    rows = list(common.read_rows(source))
    check(rows, f"{source} has no rows")
    common.read_files(args)
    made = common.made_by(source)
    if args.model and (author := made.get("01", {}).get("model", args.model)) != args.model:
        common.warn(f"--model {args.model} scores what {author} wrote, which stage 3 asks: a judge is --judge_model")
    common.inherit(args, made, "01", "model", "endpoint", "chat_template")
    who = args.model or args.scorer or args.judge_model
    check(who, f"nothing beside {source} says which model wrote these responses: pass --model")
    objectives, inputs = common.judge_defaults(args)
    probes, probes_output = [], output.with_name("02_judge_check.jsonl")
    if args.judge_check:
        probes_file = common.find_path(args.judge_probes)
        check(probes_file.is_file(), f"--judge_probes {args.judge_probes}: no such file")
        probes, inputs = common.read_probes(probes_file, objectives), {**inputs, "--judge_probes": probes_file}
    outputs = [output, probes_output] if probes else [output]
    judge = common.make_judge(args)  # a wrong name ends here, before --overwrite has cost anything
    record = common.begin(args, "02_score", outputs, made, source=source, **inputs)

    if not record["complete"]:
        judge.open()
        common.settle_score_mode(args, judge, record)
    names = [name for name, _ in objectives]
    if 1 < max(len(row["responses"]) for row in rows) <= len(names):  # one each are answers to be evaluated
        enough = f"sample with --n {len(names) + 1} or more, or 04 will want --no-informativeness"
        common.warn(f"det Σ of {len(names)} objectives is 0 with so few responses a prompt: {enough}")
    what = f"{sum(len(row['responses']) for row in rows)} responses of {len(rows)} prompts"
    common.announce("02 score", judge.title, what, "own scorer" if args.scorer else args.score_mode, " > ".join(names))
    if probes:
        checked = common.check_judge(judge, args, objectives, probes, record, probes_output)
        record["checked"] = common.sum_up_check(checked or [])
        for line in common.check_lines({"02": common.facts_of(record)}):  # none but on the first of several processes
            print(line, flush=True)
    read = {True: 0, False: 0}

    def score(some: list[dict]) -> list[dict]:
        responses = [response for row in some for response in row["responses"]]
        items = [(row["prompt"], response["text"]) for row in some for response in row["responses"]]
        seeds = [common.derive_seed(args.seed, row["id"], j) for row in some for j in range(len(row["responses"]))]
        for response, own in zip(responses, common.judge(judge, items, args, seeds), strict=True):
            response["scores"] = own
        # a judge that never answers in the form must not be asked for all rows
        common.check_readable([r["scores"] for r in responses if r["text"].strip()], read, judge)
        return some

    def length(row: dict) -> int:
        own = (args.with_instruction, args.judge_template)
        prompts = (common.judge_prompt(objectives, row["prompt"], r["text"], *own) for r in row["responses"])
        return max(common.text_size(common.as_messages(text)) for text in prompts)

    sizes = [(length(row) + args.judge_max_new_tokens, len(row["responses"])) for row in rows]
    done = common.map_rows(score, rows, sizes, record, output, judge, "02 score")
    if done is None:  # the first of several processes reports
        return
    common.finish(record, len(done))

    groups = [[response["scores"] for response in row["responses"]] for row in done]
    scores = [own for group in groups for own in group]
    blank = sum(not response["text"].strip() for row in done for response in row["responses"])
    texts = [[common.plain_text(row["prompt"]), r["text"]] for row in done for r in row["responses"]]
    bought = sum(any(common.without_scores(text, names) != text for text in pair) for pair in texts)
    if bought and not args.scorer:
        common.warn(f"{bought} responses, or prompts, give {' or '.join(names)} a number: the judge saw […] there")
    dropped = {"blank (null)": blank, "not readable, or too long for the judge (null)": scores.count(None) - blank}
    common.show_funnel("02 score", ("responses in", len(scores)), dropped, "responses scored")
    common.ScoreHistogram(scores).show(names, "responses")
    common.show_ties(groups, "pairs of a prompt's responses")
    common.show_tokens(judge)
    if args.judge_check and (verdict := common.judge_verdict({"02": common.facts_of(record)}, names)[1]):
        common.warn(verdict)  # who has switched the check off knows; stage 6 says it again
    print(f"wrote {output}")
    if scores.count(None) == len(scores):
        raise common.EmptyResult("no response has scores: pass --score_mode constrained or expected, or another judge")
    print(f"next: python 03_refine.py --run_dir {args.run_dir}")


if __name__ == "__main__":
    common.run_stage(main, Args)
