"""What the tests of eval/ share: a script that succeeds or refuses in one line, its tables, records of stages."""

import csv
import json
import re
from pathlib import Path


def succeed(call, script: str, *options) -> str:
    """What the script prints."""
    code, out, err = call(script, *options)
    assert code == 0, err
    return out


def refuse(call, script: str, words: str, *options) -> str:
    """The one line in which the script says what is wrong."""
    code, _, err = call(script, *options)
    err = re.sub(r"[^\r\n]*?%\|[^\]\r\n]*\]", "", err)  # bars
    wrong = [line for line in err.splitlines() if line.strip() and "warning: " not in line]
    assert code == 2 and len(wrong) == 1 and words in wrong[0], (words, err)
    return wrong[0]


def csv_rows(path: Path, *keys: str) -> list[dict] | dict:
    """The rows of a CSV file, by the values of `keys` if there are some."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {tuple(row[key] for key in keys): row for row in rows} if keys else rows


def table_lines(text: str) -> dict[str, list[str]]:
    """First cell -> the other cells, of the lines of all Markdown tables; the last of a name stands."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


def write_record(folder: Path, stage: str, complete: bool = True, inputs: dict | None = None, **more) -> None:
    """NN_args.json of a stage; more: its "args", and "checked", "versions" and the like."""
    record = {"stage": stage, "args": {}, "earlier": {}, "inputs": inputs or {}, "complete": complete} | more
    (folder / f"{stage[:2]}_args.json").write_text(json.dumps(record), encoding="utf-8")
