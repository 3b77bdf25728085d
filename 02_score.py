"""Stage 2, self-evaluation (SPA section 3.1 step 2; Figure 9).

The model judges each of its own responses on the primary objective (harmlessness or honesty) and on
helpfulness, from 1 to 10. The constitution, Figure 9's prompt and its readers stand in common.py,
section "Judging", since 03 and the evaluation score in the same way.

    reads   RUN_DIR/01_samples.jsonl
    writes  RUN_DIR/02_scores.jsonl, the same rows, each response with its scores:
            {"id": "…", "prompt": "…", "responses": [{"text": "…", "system": null, "scores": [9, 6]}, …]}
            scores are [primary, secondary], or null where a free answer could not be read
    run     python 02_score.py --primary harmlessness --run_dir runs/default
    next    python 03_refine.py --run_dir runs/default

Hardware: as stage 1; it reads each response once and, but for `--score_mode json`, generates nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import common
from common import arg, check


@dataclass
class Args:
    primary: str = arg(
        "harmlessness", "primary objective; the secondary one is helpfulness", common.PRIMARIES
    )
    score_mode: str = arg(
        "constrained",
        "constrained: only the integers 1-10 can be chosen, always read (ours); json: free text (paper); "
        "expected: mean over 1-10, a float, which breaks a weak model's ties (ours)",
        common.SCORE_MODES,
    )
    with_instruction: bool = arg(True, "show the judge the instruction (ours); --no-…: Figure 9 verbatim")
    constitution: str | None = arg(None, 'JSON file {"helpfulness": "…"} instead of ours')
    model: str | None = arg(
        None, "the judge; default: the model of stage 1 (another one is no self-alignment)"
    )
    chat_template: str | None = arg(None, "file with a Jinja chat template; default: that of stage 1")
    dtype: str = arg(
        "auto", "weights; auto: bfloat16 on a GPU, else float32", ("auto", "float32", "bfloat16")
    )
    batch_size: int = arg(72, "responses judged at a time (ours)")
    run_dir: str = arg("runs/default", "folder of this run's files")
    seed: int = arg(0, "seed of the second and third try of --score_mode json")
    overwrite: bool = arg(False, "redo this stage although its files are there")


def main(args: Args) -> None:
    common.check_at_least(args, 1, "batch_size")
    source, output = Path(args.run_dir) / "01_samples.jsonl", Path(args.run_dir) / "02_scores.jsonl"
    rows = list(common.read_rows(source, made_by="01_sample.py"))
    check(bool(rows), f"{source} has no rows")
    facts = common.read_facts(args.run_dir, "01_sample")
    if args.model and facts and args.model != facts["model"]:
        common.warn(
            f"{args.model} judges the responses of {facts['model']}: this is no longer self-alignment"
        )
    args.model = args.model or facts.get("model", common.DEFAULT_MODEL)
    args.chat_template = args.chat_template or facts.get("chat_template")
    objectives = common.load_objectives(args.primary, args.constitution)
    inputs = {source.name: source, "--constitution": str(objectives)}
    record = common.check_run(args, "02_score", [output], inputs)

    tokenizer = common.load_tokenizer(args.model, args.chat_template)
    context = common.context_length(common.load_config(args.model))
    record["facts"] = {
        "model": args.model,
        "chat_template": args.chat_template,
        "primary": args.primary,
        "objectives": objectives,
        "score_mode": args.score_mode,
        "with_instruction": args.with_instruction,
    }
    done = common.done_rows(args, record, output, len(rows))
    model = None if record["complete"] else common.load_model(args.model, args.dtype)
    common.check_vocabulary(tokenizer, model, args.model)
    common.begin_rows(args, record, output, done)
    rank, world = common.processes()

    def prompt_length(row: dict, response: dict) -> int:
        text = common.judge_prompt(objectives, row["prompt"], response["text"], args.with_instruction)
        return len(common.encode_prompt(tokenizer, text)) + common.JUDGE_MAX_NEW_TOKENS

    lengths = [[prompt_length(row, response) for response in row["responses"]] for row in rows]
    batches = common.plan_batches(
        [max(group) for group in lengths], [len(group) for group in lengths], args.batch_size
    )[rank::world]
    started, read = time.time(), 0
    with (
        common.progress("02 score", batches, [row["id"] in done for row in rows]) as bar,
        open(common.rows_file(output, rank), "a", encoding="utf-8", newline="\n") as file,
    ):
        for batch in batches:
            if all(rows[i]["id"] in done for i in batch):
                continue
            # a response that fills the whole context can't be judged: it stays null, and is counted
            fitting = [(i, j) for i in batch for j, length in enumerate(lengths[i]) if length <= context]
            scores = common.judge(
                model,
                tokenizer,
                [(rows[i]["prompt"], rows[i]["responses"][j]["text"]) for i, j in fitting],
                objectives,
                score_mode=args.score_mode,
                with_instruction=args.with_instruction,
                seeds=[common.derive_seed(args.seed, rows[i]["id"], j) for i, j in fitting],
            )
            by_place = dict(zip(fitting, scores, strict=True))
            for i in batch:
                row = rows[i]
                for j, response in enumerate(row["responses"]):
                    response["scores"] = by_place.get((i, j))
                if row["id"] not in done:
                    done[row["id"]] = row
                    file.write(common.dump_row(row))
                    file.flush()
                    bar.update()
                read += len(row["responses"])
            bar.set_postfix_str(f"{read / (time.time() - started):.1f} responses/s")
    rows = common.finish_rows(record, output, done, [row["id"] for row in rows])
    if rows is None:  # the first of several processes reports
        return

    groups = [[response["scores"] for response in row["responses"]] for row in rows]
    scores = [pair for group in groups for pair in group]
    too_long = sum(length > context for group in lengths for length in group)
    unread = scores.count(None) - too_long
    dropped = {"too long for the context (null)": too_long, "answer not readable (null)": unread}
    common.show_funnel("02 score", ("responses in", len(scores)), dropped, "responses scored")
    common.ScoreHistogram(scores).show(common.objective_names(record["facts"]), "responses")
    common.show_ties(common.tie_rate(groups), "pairs of a prompt's responses")
    print(f"wrote {output}\nnext: python 03_refine.py --run_dir {args.run_dir}")


if __name__ == "__main__":
    common.run_stage(main, Args)
