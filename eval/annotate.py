"""Blind pairwise annotation by people, and their agreement with each other and the judge (Figure 8, Table 6).

With --runs it builds one HTML page (eval/pages/annotate.html) that shows two systems' answers to the same prompts,
sides shuffled, and asks which is better on each objective. The page needs no server and no network, runs no markup of
a model, keeps its progress in the browser and does not name the systems (what an answer says of its own maker stays).
Each annotator sends back the JSON file that its Export button saves. With --exports it computes the agreement.

    reads   two scored run directories (01_sample.py --temperature 0 --n 1, then 02_score.py); the first
            response to each prompt that both have
    writes  OUTPUT_DIR/annotate.html       for the annotators
            OUTPUT_DIR/annotate_key.json   for you: which side was which system, and the judge's scores
    run     python eval/annotate.py --runs SPA=runs/spa/test Vanilla=runs/base/test --num_prompts 50

    reads   exports: {"study": "9f…", "annotator": "R. 1",
                      "answers": [{"item": "5c…", "dimension": "Helpfulness", "choice": "left"}, …]}
    writes  OUTPUT_DIR/annotate_agreement.md and .csv
    run     python eval/annotate.py --exports one.json two.json --key runs/eval/annotate_key.json

The paper reports an "alignment rate" of people with the judge and no more; ours: ties, κ and intervals. The
majority is what more than half of an item's annotators chose, else a tie. Intervals: bootstrap over prompts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import shared
from sklearn.metrics import cohen_kappa_score

import common
from common import arg, check

SIDES = ("left", "tie", "right")  # what an annotator chooses
CHOICES = ("A", "tie", "B")  # what that means: A is the first of --runs


@dataclass
class Args:
    runs: list[str] | None = arg(None, "builds a page from two runs, NAME=DIR NAME=DIR")
    num_prompts: int = arg(50, "prompts to annotate, drawn from those that both runs have (ours)")
    seed: int = arg(0, "of the draw, the sides and the bootstrap")
    output_dir: str = arg("runs/eval", "folder of the outputs")
    overwrite: bool = arg(False, "replace the page of another study; its exports lose their key")
    exports: list[str] | None = arg(None, "computes the agreement of these files")
    key: str | None = arg(None, "the key of the exports; default: OUTPUT_DIR/annotate_key.json")
    judge_tie: float = arg(0.0, "scores no further apart are a tie of the judge (ours, for expected scores)")


# ---------------------------------------------------------------------------------------------------------------------
# The page.


def build_study(runs: list[shared.Run], num_prompts: int, seed: int) -> tuple[dict, dict]:
    """(what the page shows, what its key holds) of the first answers to `num_prompts` of the shared prompts.

    A hash of seed and id draws and orders the prompts, and another decides the side: neither depends on which
    other prompts there are. The study's name is a digest of what the page shows, so new scores keep it.
    """
    rows = [{row["id"]: row for row in run.rows} for run in runs]
    ids = shared.shared_ids(*runs)
    check(bool(ids), f"{runs[0].path} and {runs[1].path} have no prompt in common")
    items, keys = [], []
    for id in sorted(ids, key=lambda id: common.derive_seed(seed, "draw", id))[:num_prompts]:
        item = f"{common.derive_seed(seed, 'item', id):016x}"  # the id itself may say too much
        answers = {run.name: of[id]["responses"][0] for run, of in zip(runs, rows, strict=True)}
        left, right = list(answers)[:: -1 if common.derive_seed(seed, "side", id) % 2 else 1]
        texts = {"left": answers[left]["text"], "right": answers[right]["text"]}
        items.append({"item": item, "prompt": common.plain_text(rows[0][id]["prompt"])} | texts)
        scores = {name: answer["scores"] for name, answer in answers.items()}
        keys.append({"item": item, "id": id, "left": left, "right": right, "scores": scores})
    objectives = shared.definitions(runs[0].args) or [[name, ""] for name in runs[0].objectives]
    data = {"dimensions": [{"name": name, "definition": text} for name, text in objectives], "items": items}
    study = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
    key = {"study": study, "systems": [run.name for run in runs], "dimensions": runs[0].objectives}
    return {"study": study} | data, key | {"judge": runs[0].judge, "items": keys}


def build(args: Args) -> None:
    """Writes the page and its key, and says what to do with them."""
    common.check_at_least(args, 1, "num_prompts")
    runs = shared.read_runs(args.runs, least=2)
    check(len(runs) == 2, f"--runs: two runs are compared, {len(runs)} are given")
    names = [run.name for run in runs]
    check(names[0] != names[1], f"--runs: both are named '{names[0]}'; give each a NAME=DIR of its own")
    data, key = build_study(runs, args.num_prompts, args.seed)

    page_file, key_file = (shared.output_path(args.output_dir, name) for name in ("annotate.html", "annotate_key.json"))
    if key_file.exists() and not args.overwrite:
        lost = f"{key_file} is of another study, whose exports need it; another --output_dir, or --overwrite"
        check(read_key(key_file)["study"] == key["study"], lost)
    shared.write_text(key_file, json.dumps(key, ensure_ascii=False, indent=1))
    shared.write_text(page_file, shared.render_page("annotate.html", data=data))

    items, texts = key["items"], data["items"]
    print(f"study {key['study']}: {names[0]} against {names[1]} on {' and '.join(key['dimensions'])}")
    print(f"  {len(items)} of {len(shared.shared_ids(*runs))} prompts in common are drawn")
    print(f"  {names[0]} is on the left in {sum(item['left'] == names[0] for item in items)} of them")
    print(f"  both answers are the same in {sum(item['left'] == item['right'] for item in texts)}")
    print(f"  a judge's score is missing in {sum(None in item['scores'].values() for item in items)}")
    print(f"{page_file}: for the annotators; opens in any browser, names no system, sends nothing")
    print(f"{key_file}: for you, not for them")
    print(f"then: python eval/annotate.py --exports FILE … --key {key_file}")


# ---------------------------------------------------------------------------------------------------------------------
# Exports.


def read_json(path: Path) -> dict:
    """The object in a JSON file; UserError if there is none."""
    check(path.is_file(), f"{path}: no such file")
    value = common.parse_json("".join(line for _, line in common.read_lines(path)), str(path))
    check(isinstance(value, dict), f"{path}: not a JSON object")
    return value


def read_key(path: Path) -> dict:
    """annotate_key.json."""
    key = read_json(path)
    whole = {"study", "systems", "dimensions", "items"} <= key.keys() and isinstance(key["items"], list)
    parts = {"item", "left", "right", "scores"}
    whole = whole and all(isinstance(item, dict) and parts <= item.keys() for item in key["items"])
    check(whole, f"{path} is no key of this script; give the annotate_key.json that was made with the page")
    return key


def read_export(path: Path, key: dict) -> tuple[str, dict[tuple[str, str], str]]:
    """(annotator, {(dimension, item): "A", "tie" or "B"}) of an export, its sides turned into systems."""
    export = read_json(path)
    check(isinstance(export.get("answers"), list), f"{path}: no list 'answers'; give an export of the page")
    study = f"{path}: of study {export.get('study')}, the key is of {key['study']}; give that study's --key"
    check(export.get("study") == key["study"], study)
    named = isinstance(export.get("annotator"), str) and bool(export["annotator"].strip())
    check(named, f"{path}: no 'annotator'; write a name into the file")
    items, found = {item["item"]: item for item in key["items"]}, {}
    for number, answer in enumerate(export["answers"], 1):
        where = f"{path}, answer {number}"
        check(isinstance(answer, dict), f"{where}: not an object")
        item, dimension, choice = (answer.get(name) for name in ("item", "dimension", "choice"))
        for name, value, known in (("item", item, items), ("dimension", dimension, key["dimensions"])):
            check(isinstance(value, str) and value in known, f"{where}: unknown {name} {value!r}")
        check(choice in SIDES, f"{where}: choice {choice!r}; one of {', '.join(SIDES)}")
        check((dimension, item) not in found, f"{where}: item {item} has been answered on {dimension} before")
        first = choice != "tie" and items[item][choice] == key["systems"][0]
        found[dimension, item] = "tie" if choice == "tie" else "A" if first else "B"
    check(bool(found), f"{path}: no answers in it")
    return " ".join(export["annotator"].split()), found


def judge_choices(key: dict, tie: float) -> dict[tuple[str, str], str]:
    """{(dimension, item): "A", "tie" or "B"}: the judge prefers the higher score; without one, no entry."""
    found = {}
    for item in key["items"]:
        scores = [item["scores"][name] for name in key["systems"]]
        for dimension, a, b in zip(key["dimensions"], *scores, strict=True) if None not in scores else ():
            found[dimension, item["item"]] = "tie" if abs(a - b) <= tie else "A" if a > b else "B"
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Agreement.


def fleiss_kappa(counts) -> tuple[np.ndarray, float]:
    """(share of the pairs of raters that agree, an item; κ = (P̄ − P_e) / (1 − P_e)) of as many raters an item.

    counts: (N, K), how many of an item's raters chose category k. P̄: mean of the shares; P_e = Σ_k p_k², p_k the
    share of all ratings in category k (with two raters this is Scott's π, not Cohen's κ). NaN where P_e is 1.
    """
    if not len(counts):
        return np.empty(0), math.nan
    counts = np.asarray(counts, dtype=float)
    raters = counts.sum(axis=1)
    equal = (counts * (counts - 1)).sum(axis=1) / (raters * (raters - 1))
    expected = float(((counts.sum(axis=0) / counts.sum()) ** 2).sum())
    return equal, float((equal.mean() - expected) / (1 - expected)) if expected < 1 else math.nan


def agreement(choices: np.ndarray) -> dict:
    """How far the raters of the same items agree: choices (N, raters). "equal": an item's pairs that do, a share."""
    equal, kappa = fleiss_kappa([[list(item).count(choice) for choice in CHOICES] for item in choices])
    if choices.shape[1] > 2:
        return {"equal": equal, "kappa": kappa, "kappa_of": "Fleiss"}
    known = len(set(choices.flat)) > 1  # else Cohen's is not defined either
    return {"equal": equal, "kappa": cohen_kappa_score(*choices.T) if known else math.nan, "kappa_of": "Cohen"}


def majority(choices: list[str]) -> str:
    """What more than half chose, else a tie."""
    choice, count = Counter(choices).most_common(1)[0]
    return choice if 2 * count > len(choices) else "tie"


def agreement_rows(people: dict[str, dict], judge: dict, key: dict, seed: int) -> list[dict]:
    """The rows of the three tables. people: annotator -> {(dimension, item): choice}; judge: the same."""
    rows, items = [], [item["item"] for item in key["items"]]
    for dimension in key["dimensions"]:
        # an item a row, an annotator a column; what was not answered is missing
        of_all = {name: [answers.get((dimension, item)) for item in items] for name, answers in people.items()}
        table = pd.DataFrame(of_all, index=items, dtype=object)
        scored = pd.Series({item: judge[dimension, item] for item in items if (dimension, item) in judge}, dtype=object)
        chosen = [(name, table[name].dropna()) for name in table]
        everyone = [("all annotators", table.stack().dropna())] if len(people) > 1 else []
        for who, choices in [*chosen, *everyone, ("judge", scored)]:
            counts = {choice: int((choices == choice).sum()) for choice in CHOICES}
            rows.append({"table": "choices", "dimension": dimension, "who": who, "items": len(choices)} | counts)

        compared = []
        if len(people) > 1:
            who = " and ".join(people) if len(people) == 2 else f"{len(people)} annotators"
            compared.append(("annotators", who, table.dropna().to_numpy()))
            answered = table.dropna(how="all")
            chosen.append(("majority", answered.apply(lambda item: majority(item.dropna().tolist()), axis="columns")))
        for who, choices in chosen:
            both = pd.concat([choices, scored], axis="columns", join="inner")
            compared.append(("judge", who, both.to_numpy()))
        for name, who, choices in compared:
            found = agreement(choices)
            mean, low, high = shared.estimate(found.pop("equal"), seed=seed).values()
            row = {"table": name, "dimension": dimension, "who": who, "items": len(choices)}
            rows.append(row | {"agreement": mean, "low": low, "high": high} | found)
    return rows


def agree(args: Args) -> None:
    """Reads the exports, prints and writes the agreement."""
    common.check_at_least(args, 0, "judge_tie")
    key = read_key(Path(args.key or Path(args.output_dir) / "annotate_key.json"))
    people = {}
    for file in args.exports:
        name, answers = read_export(Path(file), key)
        check(name not in people, f"{file}: annotator '{name}' again; one export an annotator")
        people[name] = answers
    judge = judge_choices(key, args.judge_tie)
    rows = agreement_rows(people, judge, key, args.seed)

    text = shared.render_page("annotate_agreement.md", rows=rows, key=key, people=people)
    text_file = shared.write_table(args.output_dir, "annotate_agreement", text, rows)
    print(text)
    if unscored := len(key["items"]) - len({item for _, item in judge}):
        print(f"\n{unscored} items have no judge's score and are left out of the comparison with the judge")
    print(f"\n{text_file}\n{text_file.with_suffix('.csv')} (A is {key['systems'][0]}, B {key['systems'][1]})")


def main(args: Args) -> None:
    one = "give --runs (to build a page) or --exports (for the agreement), one of the two"
    check(bool(args.runs) != bool(args.exports), one)
    build(args) if args.runs else agree(args)


if __name__ == "__main__":
    common.run_stage(main, Args)
