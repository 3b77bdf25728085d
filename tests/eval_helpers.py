"""What the tests of eval/ share: scripts that succeed or refuse in one line, tables, records, a judge to order."""

import csv
import json
import re
from pathlib import Path

import common


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


def judge_by(monkeypatch, says, choose=None) -> list[tuple]:
    """Lets says(prompt, temperature) answer as the judge, and choose(prompt, skeleton, options) choose.

    Gives what the judge is asked for answers: (conversation, temperature, seed, longest answer).
    """
    seen, make_engine = [], common.make_engine

    class Judge(common.Engine):
        def complete(self, chats, seeds, *, temperature, max_new_tokens):
            seen.extend((chat, temperature, seed, max_new_tokens) for chat, seed in zip(chats, seeds, strict=True))
            return [common.Completion(says(chat[-1]["content"], temperature), 3, False) for chat in chats]

        def choose(self, chats, skeleton, options):
            return [choose(chat[-1]["content"], skeleton, options) for chat in chats]

    make = lambda args, prefix="": Judge("judge") if prefix else make_engine(args)  # noqa: E731
    monkeypatch.setattr(common, "make_engine", make)
    return seen
