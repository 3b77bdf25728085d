"""Stage 2, self-evaluation (SPA section 3.1 step 2; Figure 9).

The model judges each of its own responses, from 1 to 10, on objectives in order of priority: the paper's are
harmlessness or honesty, then helpfulness. The constitution, Figure 9's prompt and its readers stand in common.py,
section "Judging", since 03 and the evaluation score in the same way.

    reads   RUN_DIR/01_samples.jsonl
    writes  RUN_DIR/02_scores.jsonl, the same rows, each response with its scores in order of priority:
            {"id": "…", "prompt": "…", "responses": [{"text": "…", "system": null, "scores": [9, 6]}, …]}
            or null: blank responses, answers that could not be read
    run     python 02_score.py --objectives harmlessness helpfulness --run_dir runs/default
    next    python 03_refine.py --run_dir runs/default

Hardware: as stage 1; it reads each response once and, but for `--score_mode json`, generates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import common
from common import check

GIVE_UP_AFTER = 48  # responses of which none could be read: then the rest would not be either


@dataclass
class Args(common.JudgeArgs):
    pass  # a judge's options are those of 03 and of the evaluation too: they stand in common.py


def main(args: Args) -> None:
    source, output = Path(args.run_dir) / "01_samples.jsonl", Path(args.run_dir) / "02_scores.jsonl"
    rows = list(common.read_rows(source))
    check(rows, f"{source} has no rows")
    common.read_files(args)
    made = common.made_by(source)
    common.inherit(args, made, "01", "model", "endpoint", "chat_template")
    objectives, inputs = common.judge_defaults(args)
    record = common.begin(args, "02_score", [output], made, source=source, **inputs)

    judge = common.make_judge(args)
    if not record["complete"]:
        judge.open()
        common.settle_score_mode(args, judge, record)
    names = [name for name, _ in objectives]
    count = sum(len(row["responses"]) for row in rows)
    what = f"{count} responses of {len(rows)} prompts"
    common.announce("02 score", judge.title, what, args.score_mode, " > ".join(names))
    read = {True: 0, False: 0}

    def score(some: list[dict]) -> list[dict]:
        responses = [response for row in some for response in row["responses"]]
        items = [(row["prompt"], response["text"]) for row in some for response in row["responses"]]
        seeds = [common.derive_seed(args.seed, row["id"], j) for row in some for j in range(len(row["responses"]))]
        for response, own in zip(responses, common.judge(judge, items, args, seeds), strict=True):
            response["scores"] = own
            read[own is not None] += bool(response["text"].strip())
        # a judge that never answers in the form must not be asked for all rows
        failed = f"none of the first {read[False]} responses could be scored: {judge.title} does not answer in the form"
        check(read[True] or read[False] < GIVE_UP_AFTER, f"{failed}; pass --score_mode constrained, or another judge")
        return some

    def length(row: dict) -> int:
        prompts = (common.judge_prompt(objectives, row["prompt"], r["text"], True) for r in row["responses"])
        return max(common.text_size(common.as_messages(text)) for text in prompts)

    sizes = [(length(row) + args.judge_max_new_tokens, len(row["responses"])) for row in rows]
    done = common.map_rows(score, rows, sizes, record, output, judge, "02 score")
    if done is None:  # the first of several processes reports
        return
    common.finish(record, len(done))

    groups = [[response["scores"] for response in row["responses"]] for row in done]
    scores = [own for group in groups for own in group]
    blank = sum(not response["text"].strip() for row in done for response in row["responses"])
    dropped = {"blank (null)": blank, "not readable, or too long for the judge (null)": scores.count(None) - blank}
    common.show_funnel("02 score", ("responses in", len(scores)), dropped, "responses scored")
    common.ScoreHistogram(scores).show(names, "responses")
    common.show_ties(groups, "pairs of a prompt's responses")
    common.show_tokens(judge)
    print(f"wrote {output}")
    if scores.count(None) == len(scores):
        raise common.EmptyResult("no response has scores: pass --score_mode constrained or expected, or another judge")
    print(f"next: python 03_refine.py --run_dir {args.run_dir}")


if __name__ == "__main__":
    common.run_stage(main, Args)
