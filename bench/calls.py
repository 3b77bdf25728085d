"""How many functions of the kit a prompt passes on its way through stage 1, and how deep they call each other.

Counted with sys.setprofile while 01_sample.main works on one prompt that is sampled three times. A function counts if
it stands in a file of the kit and has a name (no lambda, no comprehension). Its depth is the number of calls from main
down to it, through the kit alone: what a library calls back is counted, but has no depth, and so is `check`, which
only asserts. What runs before main, the arguments, is left out. The first version of the kit had 85 functions and 10
calls in main. Two counts:

    rows    from the first row of work to the last row written: what a prompt passes, while map_rows is under way
    main    all of it: also reading the prompts, the record, loading the model, the report

    writes  nothing but what it prints: every function with its depth and number of calls, and the two counts
    run     python bench/calls.py
"""

from __future__ import annotations

import importlib
import inspect
import sys
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
from common import arg  # noqa: E402

ROWS = ("map_rows", "make_rows")  # today's name, and the name of the first version


@dataclass
class Args:
    model: str = arg(common.DEFAULT_MODEL, "model to sample from; a tiny one calls the same functions")
    max_new_tokens: int = arg(2, "longest response")
    kit: str = arg(str(ROOT), "folder of the kit, another version perhaps")


def count_calls(work, folder: Path) -> tuple[dict[tuple, int], Counter, set]:
    """Runs work(): ({(file, name): depth}, {(file, name): calls}, those under map_rows) of the files in `folder`."""
    depths, calls, under_rows = {}, Counter(), set()

    def watch(frame, event: str, _) -> None:
        code = frame.f_code
        is_function = code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")  # no body of a class
        if event != "call" or not is_function or Path(code.co_filename).parent != folder:
            return
        own = (Path(code.co_filename).name, getattr(code, "co_qualname", code.co_name).replace(".<locals>", ""))
        depth, direct, names = -1, code.co_name != "check", set()  # main itself is no call
        while frame and frame.f_code is not count_calls.__code__:
            of_kit = Path(frame.f_code.co_filename).parent == folder
            direct &= of_kit or frame.f_code.co_name == "<lambda>"
            depth += of_kit and not frame.f_code.co_name.startswith("<")
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        calls[own] += 1
        depths[own] = max(depth if direct else -1, depths.get(own, -1))
        if not names.isdisjoint(ROWS):
            under_rows.add(own)

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return depths, calls, under_rows


def main(args: Args) -> None:
    kit = Path(args.kit).resolve()
    for name in ("common", "01_sample"):  # of that version
        sys.modules.pop(name, None)
    sys.path.insert(0, str(kit))
    stage = importlib.import_module("01_sample")
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text('{"id": "a", "prompt": "What makes bread rise?"}\n', encoding="utf-8")
        options = {"prompts": str(prompts), "run_dir": folder, "model": args.model, "n": 3}
        asked = stage.Args(**options, max_new_tokens=args.max_new_tokens)
        depths, calls, under_rows = count_calls(lambda: stage.main(asked), kit)
    for own, depth in depths.items():
        where = "rows" if own in under_rows else "main"
        print(f"  {where}, depth {depth if depth >= 0 else '–':>2}, {calls[own]:>3} calls: {own[0]}: {own[1]}")
    for where, chosen in (("rows", under_rows), ("main", set(depths))):
        print(f"{where}: {len(chosen)} functions of the kit, {max(depths[own] for own in chosen)} calls deep")


if __name__ == "__main__":
    common.run_stage(main, Args)
