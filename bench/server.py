"""A server's scores against the same weights in this process: each way of reading them, and how long it takes.

responses   the server's own, --n of each prompt, cut at --max_new_tokens
expected    mean and greatest difference from the local model's, over all scores
constrained how many are the same integers
json        how many free answers can be read

writes  nothing but what it prints
run     llama-server -m FILE.gguf --port 8000, or vllm serve models/smollm2-135m --generation-config vllm, then
        python bench/server.py --endpoint http://localhost:8000/v1 --model NAME --local models/smollm2-135m
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from common import arg  # noqa: E402


@dataclass
class Args(common.JudgeArgs):
    """A server's scores against those of the same weights in this process."""

    prompts: str = arg(str(ROOT / "data" / "high_stakes.jsonl"), "prompts, as JSON Lines")
    num_prompts: int = arg(12, "how many of them")
    n: int = arg(3, "responses to each")
    max_new_tokens: int = arg(40, "of a response")
    local: str = arg("models/smollm2-135m", "the folder with the server's weights")


def read_all(engine: common.Engine, items: list[tuple], args: Args) -> dict[str, list]:
    """The scores of all items in each mode; prints how long they took."""
    scores = {}
    for mode in ("expected", "constrained", "json"):
        started, args.score_mode = time.monotonic(), mode
        if isinstance(engine, common.Server):
            engine.with_logprobs = mode == "expected"
        scores[mode] = common.judge(engine, items, args, list(range(len(items))))
        print(f"  {engine.title}: {mode} {time.monotonic() - started:.1f} s")
    return scores


def main(args: Args) -> None:
    args.objectives, args.with_instruction = args.objectives or ["harmlessness", "helpfulness"], True
    server = common.make_engine(args)
    server.open()
    server.probe_form(common.score_skeleton(["Harmlessness", "Helpfulness"]), common.SCORES)
    print(f"{server.title}: context {server.context}, answers are held to a form by {server.mode}")

    # the server's own responses, so that stage 1's request is tried too
    lines = [json.loads(text) for _, text in common.read_lines(Path(args.prompts))][: args.num_prompts]
    prompts = [line["prompt"] for line in lines for _ in range(args.n)]
    chats = list(map(common.as_messages, prompts))
    responses = server.complete(chats, list(range(len(chats))), temperature=1.0, max_new_tokens=args.max_new_tokens)
    items = [(prompt, response.text) for prompt, response in zip(prompts, responses, strict=True) if response]
    print(f"{len(items)} responses, {len({text for _, text in items})} different")

    local = common.Local(args.local, dtype="float32")
    theirs, ours = read_all(server, items, args), read_all(local, items, args)
    gaps = [abs(a - b) for one, other in zip(theirs["expected"], ours["expected"], strict=True) if one and other
            for a, b in zip(one, other, strict=True)]  # fmt: skip
    print(f"expected: {len(gaps) // 2} of {len(items)} read, difference mean {sum(gaps) / len(gaps):.6f}, "
          f"greatest {max(gaps):.6f}")  # fmt: skip
    same = sum(one == other for one, other in zip(theirs["constrained"], ours["constrained"], strict=True))
    print(f"constrained: {same} of {len(items)} the same")
    for name, scores in (("server", theirs), ("local", ours)):
        print(f"json, {name}: {sum(score is not None for score in scores['json'])} of {len(items)} read")


if __name__ == "__main__":
    common.run_stage(main, Args)
