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
    model: str | None = arg(None, "the model that judges itself; default: that of stage 1")
    endpoint: str | None = arg(
        None, "URL of an OpenAI-compatible server that has the model; default: that of stage 1"
    )
    chat_template: str | None = arg(None, "file with a Jinja chat template; default: that of stage 1")
    judge_model: str | None = arg(None, "another model as the judge (no self-alignment then)")
    judge_endpoint: str | None = arg(None, "URL of the judge's server; its key: SPA_JUDGE_API_KEY")
    judge_chat_template: str | None = arg(None, "file with the judge's Jinja chat template")
    dtype: str = arg(
        "auto", "weights; auto: bfloat16 on a GPU, else float32", ("auto", "float32", "bfloat16")
    )
    device_map: str | None = arg(
        None,
        "auto spreads a model too large for one GPU over all, in one process",
        ("auto", "balanced", "sequential"),
    )
    continuous_batching: bool = arg(
        True, "with --score_mode json, on a GPU where it works: transformers' own"
    )
    batch_size: int = arg(72, "responses judged at a time (ours)")
    concurrency: int = arg(32, "requests under way at an endpoint")
    request_timeout: float = arg(600.0, "seconds that an endpoint may take for an answer")
    retries: int = arg(6, "further tries of a request that failed, after 1, 2, 4 … seconds")
    run_dir: str = arg("runs/default", "folder of this run's files")
    seed: int = arg(0, "seed of the second and third try of --score_mode json")
    overwrite: bool = arg(False, "redo this stage although its files are there")


def main(args: Args) -> None:
    common.check_at_least(args, 1, "batch_size")
    source, output = Path(args.run_dir) / "01_samples.jsonl", Path(args.run_dir) / "02_scores.jsonl"
    rows = list(common.read_rows(source, made_by="01_sample.py"))
    check(bool(rows), f"{source} has no rows")
    facts = common.read_facts(args.run_dir, "01_sample")
    common.choose_model(args, facts)
    common.choose_model(args, common.judged_by_itself(args), "judge_")
    objectives = common.load_objectives(args.primary, args.constitution)
    inputs = {source.name: source, "--constitution": str(objectives)}
    record = common.check_run(args, "02_score", [output], inputs, may_change=common.MAY_CHANGE)
    judge = common.make_judge(args, None)

    def prompt_length(row: dict, response: dict) -> int:
        text = common.judge_prompt(objectives, row["prompt"], response["text"], args.with_instruction)
        return common.judge_length(judge, text)

    lengths = [[prompt_length(row, response) for response in row["responses"]] for row in rows]

    def score(batch: list[int]) -> list[dict]:
        places = [(i, j) for i in batch for j in range(len(rows[i]["responses"]))]
        scores = common.judge(
            judge,
            [(rows[i]["prompt"], rows[i]["responses"][j]["text"]) for i, j in places],
            objectives,
            score_mode=args.score_mode,
            with_instruction=args.with_instruction,
            seeds=[common.derive_seed(args.seed, rows[i]["id"], j) for i, j in places],
        )
        for (i, j), pair in zip(places, scores, strict=True):
            rows[i]["responses"][j]["scores"] = pair
        return [rows[i] for i in batch]

    record["facts"] |= {
        **common.carried_facts(args, facts),
        "primary": args.primary,
        "objectives": objectives,
        "score_mode": args.score_mode,
        "with_instruction": args.with_instruction,
    }
    ids, sizes = [row["id"] for row in rows], [(max(group), len(group)) for group in lengths]
    step = common.Step("02 score", judge, score, decodes=args.score_mode == "json")
    rows = common.make_rows(args, record, output, ids, sizes, step)
    if rows is None:  # the first of several processes reports
        return

    groups = [[response["scores"] for response in row["responses"]] for row in rows]
    scores = [pair for group in groups for pair in group]
    too_long = sum(length > judge.context for group in lengths for length in group)
    unread = scores.count(None) - too_long
    dropped = {"too long for the context (null)": too_long, "answer not readable (null)": unread}
    common.show_funnel("02 score", ("responses in", len(scores)), dropped, "responses scored")
    common.ScoreHistogram(scores).show(common.objective_names(record["facts"]), "responses")
    common.show_ties(common.tie_rate(groups), "pairs of a prompt's responses")
    common.show_tokens(judge)
    print(f"wrote {output}\nnext: python 03_refine.py --run_dir {args.run_dir}")


if __name__ == "__main__":
    common.run_stage(main, Args)
