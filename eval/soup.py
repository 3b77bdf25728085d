"""Rewarded soup: one model whose weights lie between those of others (arXiv 2306.04488).

Each objective has a specialist of its own, trained from the same base, and the weights are averaged:
(a θ_1 + b θ_2) / (a + b). SPA's appendix A weighs the scores instead and trains once: 05_pairs.py --rule weighted.

    reads   --models: two or more checkpoints of one base, hub names or folders
    writes  OUTPUT_DIR, a Hugging Face checkpoint in float32 with the first one's tokenizer; soup.json says of what
    run     python eval/soup.py --models runs/a/06_harmless runs/a/06_helpful --weights 7 3 --output_dir runs/a/06_soup

Hardware: no GPU; memory for three of the models in float32 (12 bytes a parameter).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import shared  # noqa: F401 (finds common)
import torch

import common
from common import arg, check


@dataclass
class Args:
    models: list[str] = arg(None, "two or more checkpoints of one base: hub names or folders")
    weights: list[float] = arg(None, "how much of each, >= 0; their sum counts as 1 (paper: 6 4, 7 3, 8 2, 9 1)")
    output_dir: str = arg(None, "folder of the new checkpoint")
    overwrite: bool = arg(False, "replace a checkpoint that is there")


def mix(states: list[dict[str, torch.Tensor]], weights: list[float], names: list[str]) -> dict[str, torch.Tensor]:
    """Σ w_i θ_i / Σ w_i in float32, tensor by tensor; UserError where the models don't fit or aren't finite."""
    mixed: dict[str, torch.Tensor] = {}
    for state, weight, name in zip(states, weights, names, strict=True):
        odd = sorted(state.keys() ^ (mixed or state).keys())
        check(not odd, f"{name} and {names[0]} are no checkpoints of one base: only one has {', '.join(odd[:2])}")
        for key, value in state.items():
            before = mixed.setdefault(key, torch.zeros(value.shape))
            shapes = f"{name} has {key} of shape {tuple(value.shape)}, {names[0]} of {tuple(before.shape)}"
            check(value.shape == before.shape, f"{shapes}: these are no checkpoints of one base")
            check(value.isfinite().all(), f"{name}: {key} has values that are not finite; train it again")
            before += value.float() * (weight / sum(weights))
    return mixed


def main(args: Args) -> None:
    count = len(args.models or [])
    check(count >= 2, "--models: two or more checkpoints are wanted")
    fits = len(args.weights or []) == count and min(args.weights) >= 0 < sum(args.weights)
    check(fits, f"--weights: {count} numbers >= 0 are wanted, one a model, not all 0")
    check(args.output_dir, "--output_dir: where to write the new checkpoint")
    folders = [common.find_path(name) for name in args.models]
    digests = [common.digest(path) if path.is_dir() else str(path) for path in folders]
    made_of = {"models": digests, "weights": args.weights}
    output, partial = Path(args.output_dir), Path(f"{args.output_dir}.partial")
    if output.exists() and not args.overwrite:
        told = output / "soup.json"
        same = told.is_file() and common.parse_json(told.read_text(), str(told)) == made_of
        check(same, f"{output} is there, and not made of these; choose another --output_dir, or pass --overwrite")
        print(f"{output} is complete already; --overwrite makes it again")
        return

    # The sum, and one model after the other: the last one stays until the next is there.
    states = (common.load_model(name, "float32", "cpu").state_dict() for name in args.models)
    mixed = mix(states, args.weights, args.models)
    model = common.load_model(args.models[0], "float32", "cpu")
    model.load_state_dict(mixed)
    shutil.rmtree(partial, ignore_errors=True)  # a kill may have left it
    model.save_pretrained(partial)
    common.load_tokenizer(args.models[0]).save_pretrained(partial)
    (partial / "soup.json").write_text(json.dumps(made_of))
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    print(f"wrote {output}: " + " + ".join(f"{w:g} × {m}" for w, m in zip(args.weights, args.models, strict=True)))


if __name__ == "__main__":
    common.run_stage(main, Args)
