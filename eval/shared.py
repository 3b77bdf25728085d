"""What the evaluation scripts share: runs side by side, intervals over prompts, tables and figures.

Imports nothing beyond numpy until a figure is drawn (matplotlib).
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import sys
import types
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from common import UserError, arg, check

det_covariance = importlib.import_module("04_denoise").det_covariance  # equation 1 stands there, once
# colours that are told apart also by people who are colour-blind; black last
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
RUN_HELP = "scored run directories, [TEST_SET:]NAME=DIR each, or DIR; DIR+refined takes its refined answers"

# ---------------------------------------------------------------------------------------------------------------------
# Runs: what 01 and 02 (or 03) have left in a directory, under the name that a table shows.


@dataclass
class Run:
    """A system on a test set: its rows (as 02_score.py writes them), and how they were made."""

    name: str
    test_set: str
    path: Path
    rows: list[dict]
    made: dict[str, dict]  # {"01": the arguments of stage 1, …}
    record: dict  # of the stage that scored; {} for a file of one's own

    @property
    def args(self) -> dict:
        """The arguments of the stage that scored."""
        return self.record.get("args", {})

    @property
    def objectives(self) -> list[str]:
        """Names of the objectives, in order of priority."""
        groups = (scores for group in self.groups().values() for scores in group if scores)
        return objective_names(self.made, len(next(groups, ())))

    @property
    def judge(self) -> str | None:
        """Who scored; None where no record says it."""
        return judge_name(self.args)

    def groups(self) -> dict[str, list]:
        """The scores of each prompt's responses, by id: k numbers or None each."""
        return {row["id"]: [response["scores"] for response in row["responses"]] for row in self.rows}


def objective_names(made: dict[str, dict], k: int) -> list[str]:
    """The names of k objectives, from the records where they have as many; k = 0: as many as the records have."""
    names = common.names_of(made)
    return names if len(names) == k or (names and not k) else [f"objective {i}" for i in range(1, (k or 2) + 1)]


def judge_name(args: dict) -> str | None:
    """Who scored for the arguments of a stage: a function, another judge, or the model itself."""
    return args.get("scorer") or args.get("judge_model") or args.get("model")


def definitions(args: dict) -> list[list[str]]:
    """[[name, definition], …] of a scoring stage's arguments; [] where they name no objectives."""
    if not args.get("objectives"):
        return []
    return common.load_objectives(types.SimpleNamespace(**{"constitution": None, **args}))


def split_spec(spec: str) -> tuple[str, str]:
    """(label, path) of LABEL=PATH or PATH; both may hold "=", where the path is there."""
    parts = spec.split("=")
    ways = [("=".join(parts[:i]), "=".join(parts[i:])) for i in range(len(parts))]
    there = (way for way in ways if Path(way[1]).exists() or Path(way[1].removesuffix("+refined")).exists())
    return next(there, ways[min(1, len(parts) - 1)])


def read_run(spec: str) -> Run:
    """The run that `[TEST_SET:]NAME=DIR[+refined]` names. Raises UserError with what is missing.

    Without a name the folder's own stands. Scores are read from 02_scores.jsonl; `+refined` takes the refined answers
    of 03_refined.jsonl instead, one a prompt.
    """
    label, folder = split_spec(spec)
    test_set, _, name = label.rpartition(":")
    refined = folder.endswith("+refined") and not Path(folder).is_dir()
    path = Path(folder.removesuffix("+refined") if refined else folder)
    check(path.is_dir(), f"{spec}: no run directory {path} ([TEST_SET:]NAME=DIR; only +refined may stand behind DIR)")
    source = path / ("03_refined.jsonl" if refined else "02_scores.jsonl")
    rows = list(common.read_rows(source, scored=True, refined=refined))
    if refined:
        rows = [row | {"responses": [row["refined"] | {"system": None}]} for row in rows]
    check(rows, f"{source} has no rows")
    made, record = common.made_by(source), common.read_record(common.record_file_of(source))
    return Run(name or path.name + "+refined" * refined, test_set, source, rows, made, record)


def read_filtered(path: Path) -> list[dict]:
    """The rows of 04_denoised.jsonl or 04_dropped.jsonl; the record's number of rows is of the first alone."""
    rows = [(f"{path}, line {number}", line) for number, line in common.read_lines(path)] if path.exists() else []
    rows = [(where, common.parse_json(line, where)) for where, line in rows]
    for where, row in rows:
        fits = isinstance(row, dict) and {"id", "prompt", "responses", "refined"} <= row.keys()
        check(fits, f"{where}: not a row of 04_denoise.py; run that stage again")
    return [row for _, row in rows]


def read_runs(specs: list[str] | None, least: int = 1) -> list[Run]:
    """All runs, at least `least`; UserError if a name stands twice on a test set or the objectives differ.

    What else may keep scores from comparing (judge, way of reading, template) is warned of.
    """
    check(len(specs or []) >= least, f"--runs: at least {least} wanted; {RUN_HELP}")
    runs = [read_run(spec) for spec in specs]
    seen, first = set(), runs[0]
    for run in runs:
        twice = f"--runs: '{run.name}' twice on one test set; give each a NAME=DIR of its own"
        check((run.test_set, run.name) not in seen, twice)
        seen.add((run.test_set, run.name))
        differ = f"{run.path} was scored on {run.objectives}, {first.path} on {first.objectives}"
        check(run.objectives == first.objectives, differ)
        inputs = [one.record.get("inputs", {}) for one in (run, first)]
        words = [one.get("constitution") for one in inputs]  # the definitions as the judge has read them
        differ = f"{run.path} and {first.path} were scored under other definitions of the objectives; score one again"
        check(None in words or words[0] == words[1], differ)
    recorded = [run for run in runs if run.record]
    ways = {
        "judges": [run.judge for run in recorded],
        "ways of reading scores": [run.record.get("scores_read") or run.args.get("score_mode") for run in recorded],
        "judge prompts with and without the instruction": [run.args.get("with_instruction") for run in recorded],
        "chat templates of the judge": [run.args.get("judge_chat_template") for run in recorded],
    }
    for what, values in ways.items():
        if len(set(values)) > 1:
            listed = ", ".join(f"{run.name}: {str(value)[:60]}" for run, value in zip(recorded, values, strict=True))
            common.warn(f"several {what} ({listed}): their scores may not compare")
    return runs


def by_test_set(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs of each test set, in the order given; the first is the one that the others are compared with."""
    return {name: [run for run in runs if run.test_set == name] for name in dict.fromkeys(r.test_set for r in runs)}


def prompt_means(groups: dict[str, list]) -> dict[str, tuple[float, ...]]:
    """id -> mean of each axis over the prompt's scored responses; prompts without any are left out."""
    read = {id: [scores for scores in group if scores is not None] for id, group in groups.items()}
    return {id: tuple(np.mean(group, axis=0)) for id, group in read.items() if group}


def shared_ids(one: Run, other: Run) -> list[str]:
    """Ids of the prompts that both have, in the first one's order; UserError if an id has two prompts."""
    prompts = {row["id"]: row["prompt"] for row in other.rows}
    shared = [row for row in one.rows if row["id"] in prompts]
    for row in shared:
        differ = f"{one.path} and {other.path}: id '{row['id']}' has two different prompts; compare equal sets"
        check(row["prompt"] == prompts[row["id"]], differ)
    return [row["id"] for row in shared]


# ---------------------------------------------------------------------------------------------------------------------
# Who is asked, for the scripts that judge again or answer benchmarks.


@dataclass
class JudgeArgs(common.JudgeArgs):
    """What a script takes that has answers judged; what is not given is as it was when `--runs` were scored."""

    output_dir: str = arg("runs/eval", "folder of the outputs", free=True)
    run_dir: str | None = arg(None, "not used here: see --runs and --output_dir", free=True)


def output_path(output_dir: str, name: str) -> Path:
    """OUTPUT_DIR/name, the folder made."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    return Path(output_dir) / name


def check_no_run_dir(args) -> None:
    """UserError if --run_dir is given to a script that has no use for it."""
    check(args.run_dir is None, "--run_dir is not used here: see --output_dir, and --help for what is read")


def open_judge(args: JudgeArgs, run: Run, stage: str, output: Path, **inputs):
    """(record of `output`, the judge ready for its first row, [[name, definition], …]).

    What no option says is taken from the stage that has scored `run`: so the same judge is asked again.
    """
    check_no_run_dir(args)
    common.read_files(args)
    prefer = run.path.name[:2]
    for names in (("scorer", "judge_model", "judge_endpoint", "judge_chat_template"), ("model", "endpoint")):
        if not any(getattr(args, name) for name in names):  # another judge has another address
            common.inherit(args, run.made, prefer, *names)
    others = ("chat_template", "objectives", "score_mode", "judge_template", "with_instruction", "constitution")
    common.inherit(args, run.made, prefer, *others)
    known = any((args.scorer, args.judge_model, args.judge_endpoint, args.model, args.endpoint))
    check(known, f"no record beside {run.path} says who judged: pass --judge_model (or --scorer)")
    objectives, more = common.judge_defaults(args)
    record_file = output.with_name(f"{output.stem}_args.json")
    record = common.begin(args, stage, [output], record_file=record_file, **inputs, **more)
    prefix = "judge_" if args.judge_model or args.judge_endpoint else ""
    judge = common.Scorer(args.scorer) if args.scorer else common.make_engine(args, prefix)
    if not record["complete"]:
        judge.open()
        common.settle_score_mode(args, judge, record)
    return record, judge, objectives


# ---------------------------------------------------------------------------------------------------------------------
# Uncertainty: prompts are the sample, so prompts are drawn.


def bootstrap_interval(
    values, statistic=None, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic over prompts.

    values: (N,) or (N, D), a prompt a row. statistic(sample) -> number; default: the mean of (N,). NaN, NaN
    for fewer than two prompts.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return (float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    found = []
    for start in range(0, draws, 1000):  # in parts, so that 10,000 prompts fit into memory
        index = rng.integers(0, len(values), (min(1000, draws - start), len(values)))
        if statistic is None:
            found.extend(values[index].mean(axis=1))
        else:
            found.extend(statistic(values[rows]) for rows in index)
    return quantiles(found, level)


def quantiles(values, level: float = 0.95) -> tuple[float, float]:
    """The ends of the middle `level` of the values that are not NaN; NaN, NaN if all are."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if not len(values):
        return (float("nan"), float("nan"))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def ranks(values) -> np.ndarray:
    """Ranks from 1, ties sharing their mean."""
    values = np.asarray(values, dtype=float)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def spearman(x, y) -> float:
    """Spearman's rank correlation, Pearson's of the ranks; NaN where one side does not vary."""
    x, y = ranks(x), ranks(y)
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def rv_coefficient(x, y) -> float:
    """RV of two matrices (N, P) and (N, Q) of the same rows (SPA, Figure 3).

    ‖XᵀY‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) of the column-centred matrices: 1 if one is the other but for shift, scale
    and rotation. NaN where one side does not vary.
    """
    x, y = (np.asarray(m, dtype=float) - np.mean(m, axis=0) for m in (x, y))
    norm = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(x.T @ y) ** 2 / norm) if norm > 1e-24 else float("nan")


def round_half_up(value: float, digits: int = 2) -> str:
    """A decimal number as tables print it, 2.345 as 2.35 (Python's own rounding gives 2.34 or 2.35)."""
    if np.isnan(value):
        return "–"
    exact = Decimal(repr(round(float(value), 10)))  # 9.155 is stored as 9.15499…
    return str(exact.quantize(Decimal(1).scaleb(-digits), rounding=ROUND_HALF_UP))


# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures.


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(2, *(len(row[i]) for row in cells)) for i in range(len(header))]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in cells
    ]
    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def latex_table(header: list[str], rows: list[list[str]]) -> str:
    """A booktabs table; **bold** becomes \\textbf."""

    def cell(text: str) -> str:
        bold = text.startswith("**")
        for plain, escaped in (("\\", r"\textbackslash{}"), ("&", r"\&"), ("%", r"\%"), ("_", r"\_"), ("#", r"\#")):
            text = text.replace(plain, escaped)
        text = text.replace("±", r"$\pm$").replace("–", "--").replace("λ", r"$\lambda$")
        return text.replace("**", r"\textbf{", 1).replace("**", "}", 1) if bold else text

    lines = [" & ".join(cell(text) for text in row) + r" \\" for row in (header, *rows)]
    head = [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*head, *lines[1:], r"\bottomrule", r"\end{tabular}"])


def write_csv(path: Path, rows: list[dict]) -> None:
    """The numbers behind a table or a figure, unrounded."""
    with common.replace_file(path) as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def write_text(path: Path, text: str) -> None:
    with common.replace_file(path) as file:
        file.write(text if text.endswith("\n") else text + "\n")


@contextlib.contextmanager
def figure(path: Path, columns: int = 1, width: float = 6.4, height: float = 4.0):
    """Yields the axes of a figure (a list if `columns` > 1) that is saved as `path` (PNG) and as PDF.

    Raises UserError without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: python -m pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"axes.prop_cycle": matplotlib.cycler(color=COLOURS), "font.size": 10, "savefig.dpi": 160}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    style |= {"legend.frameon": False, "pdf.fonttype": 42}  # fonts stay text
    with matplotlib.rc_context(style):
        drawing, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")
        yield axes
        for suffix in (".png", ".pdf"):
            drawing.savefig(path.with_suffix(suffix), metadata=None if suffix == ".png" else {"CreationDate": None})
        pyplot.close(drawing)
