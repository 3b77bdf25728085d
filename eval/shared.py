"""What the evaluation scripts share: runs side by side, a judge that is asked again, intervals, tables and figures."""

from __future__ import annotations

import ast
import base64
import contextlib
import hashlib
import importlib
import math
import re
import sys
import types
import warnings
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from common import arg, check

matplotlib.use("Agg")  # no window, whatever MPLBACKEND says
PAGES = Path(__file__).with_name("pages")
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
    seeds: tuple[Run, ...] = ()  # the runs of several seeds that `merge_seeds` has put together

    def __post_init__(self):
        self.args = self.record.get("args", {})  # of the stage that scored
        self.judge = judge_name(self.args)  # who scored; None where no record says it
        # id -> the scores of the prompt's responses, k numbers or None each
        self.groups = {row["id"]: [response["scores"] for response in row["responses"]] for row in self.rows}
        self.objectives = objective_names(self.made, self.groups)  # in order of priority

    def means(self) -> pd.DataFrame:
        """The mean scores of each prompt that has any: a row a prompt, a column an objective."""
        means = prompt_means(self.groups, self.objectives)
        check(len(means), f"{self.path}: no response has scores")
        return means


def objective_names(made: dict[str, dict], groups: dict[str, list]) -> list[str]:
    """The names of the objectives that were scored, in order of priority: the records', else numbers."""
    scores = next((scores for group in groups.values() for scores in group if scores), ())
    return common.names_of(made, len(scores)) or ["objective 1", "objective 2"]


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


def read_named(specs: list[str] | None, option: str, form: str) -> dict[str, str]:
    """name -> path, of NAME=PATH or PATH each. UserError without any, or if a name stands twice."""
    check(specs, f"{option}: at least one is wanted, {form} each")
    found = {}
    for spec in specs:
        name, path = split_spec(spec)
        name = name or Path(path).name
        check(name and path, f"{option} {spec}: {form} is wanted")
        check(name not in found, f"{option}: '{name}' twice; give each a {form} of its own")
        found[name] = path
    return found


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


def read_runs(
    specs: list[str] | None, least: int = 1, per_set=False, allow_differences: bool | None = None, seeds=False
) -> list[Run]:
    """All runs, at least `least`; UserError if a name stands twice on a test set or the objectives differ.

    per_set: each test set may have objectives of its own. seeds: runs of one name become one (`merge_seeds`).
    What keeps scores from comparing is a UserError, and with `allow_differences` a warning; None, for scripts that
    compare no scores: definitions refused, the rest warned of.
    """
    check(len(specs or []) >= least, f"--runs: at least {least} wanted; {RUN_HELP}")
    runs = [read_run(spec) for spec in specs]
    seen = [(run.test_set, run.name) for run in runs]
    twice = next((run.name for run in runs if seen.count((run.test_set, run.name)) > 1), None)
    check(seeds or twice is None, f"--runs: '{twice}' twice on one test set; give each a NAME=DIR of its own")
    for group in by_test_set(runs).values() if per_set else [runs]:
        for run in group:
            check_objectives(run, group[0])
    found = differences(runs)
    if allow_differences is False:
        check(not found, f"{'; '.join(found)}: score them alike, or pass --allow_differences")
    for text in found:
        fatal = allow_differences is None and text.startswith("several definitions")
        check(not fatal, f"{text}: score them alike")
        common.warn(f"{text}: their scores may not compare")
    # the judge's prompt, its words and readers stand there: an ablation may be an edit of them
    code = {run.record["code"].get("common.py") for run in runs if "code" in run.record and not run.args.get("scorer")}
    if len(code) > 1:
        common.warn("common.py was edited between the scorings of these runs: their scores may not compare")
    return merge_seeds(runs) if seeds else runs


def check_objectives(run: Run, other: Run) -> None:
    """UserError if two runs were scored on other objectives."""
    differ = f"{run.path} was scored on {run.objectives}, {other.path} on {other.objectives}: compare equal ones"
    check(run.objectives == other.objectives, differ)


def merge_seeds(runs: list[Run]) -> list[Run]:
    """Runs of one name on one test set, as of several seeds, become one: each prompt has the responses of all."""
    merged: dict[tuple, Run] = {}
    for run in runs:
        first = merged.get((run.test_set, run.name), replace(run, rows=[], seeds=()))
        known = [seed.path for seed in first.seeds]
        check(run.path not in known, f"--runs: '{run.name}' twice on one test set, from one folder")
        shared_ids(first, run)  # refuses an id that has two prompts
        rows = {row["id"]: row for row in first.rows}
        for row in run.rows:
            before = rows.get(row["id"], {"responses": []})
            rows[row["id"]] = row | {"responses": before["responses"] + row["responses"]}
        merged[run.test_set, run.name] = replace(first, rows=list(rows.values()), seeds=(*first.seeds, run))
    return list(merged.values())


def differences(runs: list[Run]) -> list[str]:
    """What keeps the scores of these runs from comparing, a text each; runs without a record are not looked at."""
    rows = []  # (what, the way of a run, how that is shown); seeds share a name
    for run in (run for run in runs if run.record):
        made = run.record.get("inputs", {})
        # a judge is what is in its folder, wherever that lies: trained again under the same name it is another one
        content = made.get("--scorer") or made.get("--judge_model") or made.get("--model") or ""
        another = any(run.args.get(name) for name in ("scorer", "judge_model", "judge_endpoint"))
        template = run.args.get("judge_chat_template" if another else "chat_template")
        ways = {
            "judges": content or run.judge,
            "ways of reading scores": run.record.get("scores_read") or run.args.get("score_mode"),
            "judge prompts": run.args.get("judge_template"),
            "judge prompts with and without the instruction": run.args.get("with_instruction"),
            "chat templates of the judge": template,
            "types of the judge's numbers": run.args.get("dtype"),
        }
        damaged = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)
        with contextlib.suppress(*damaged):  # the definitions as the judge has read them
            words = ast.literal_eval(made.get("constitution", "[]"))
            ways |= {f"definitions of {name}": text for name, text in words}
        for what, way in ways.items():
            shown = f"{run.judge} {content}".strip() if what == "judges" else str(way)
            rows.append((what, str(way), f"{run.test_set}:{run.name}: {shown[:60]}".lstrip(":")))
    ways_of = pd.DataFrame(rows, columns=["what", "way", "shown"]).groupby("what", sort=False)
    return [f"several {what} ({', '.join(of.shown.unique())})" for what, of in ways_of if of.way.nunique() > 1]


def by_test_set(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs of each test set, in the order given; the first is the one that the others are compared with."""
    return {name: [run for run in runs if run.test_set == name] for name in dict.fromkeys(r.test_set for r in runs)}


def read_scores(group: list) -> list[list]:
    """Of some responses' scores those that were read."""
    return [scores for scores in group if scores is not None]


def prompt_means(groups: dict[str, list], names: list[str]) -> pd.DataFrame:
    """The mean over each prompt's scored responses: a row a prompt that has any, a column an objective."""
    means = {id: np.mean(read_scores(group), axis=0) for id, group in groups.items() if any(group)}
    return pd.DataFrame.from_dict(means, orient="index", columns=names)


def gains(means: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    """The differences of `prompt_means` on the prompts that both have."""
    return (means - base).reindex(means.index).dropna()


def dets_of(groups: dict[str, list], filtered: list[dict], ddof: int = 0) -> dict[str, float]:
    """id -> det Σ of its responses' scores, but that of stage 4 where it has left one: another covariance, maybe."""
    found = {str(id): det_covariance(read_scores(group), ddof) for id, group in groups.items() if any(group)}
    return found | {str(row["id"]): row["det"] for row in filtered if row.get("det") is not None}


def shared_ids(one: Run, other: Run) -> list[str]:
    """Ids of the prompts that both have, in the first one's order; UserError if an id has two prompts."""
    prompts = {row["id"]: row["prompt"] for row in other.rows}
    shared = [row for row in one.rows if row["id"] in prompts]
    for row in shared:
        differ = f"{one.path} and {other.path}: id '{row['id']}' has two different prompts; compare equal sets"
        check(row["prompt"] == prompts[row["id"]], differ)
    return [row["id"] for row in shared]


def scored_by_both(one: Run, other: Run) -> dict[str, list[tuple[list, list]]]:
    """id -> both judges' scores of each response that both have scored. UserError if the responses differ."""
    mine, theirs = ({row["id"]: row["responses"] for row in run.rows} for run in (one, other))
    found = {}
    for id in shared_ids(one, other):
        same = [r["text"] for r in mine[id]] == [r["text"] for r in theirs[id]]
        check(same, f"id '{id}': {one.path} and {other.path} have other responses")
        pairs = [(a["scores"], b["scores"]) for a, b in zip(mine[id], theirs[id], strict=True)]
        found[id] = [pair for pair in pairs if None not in pair]
    return found


def read_jsonl(path: Path, fields: set[str], maker: str):
    """(where it stands, row) of each line of a JSONL file; UserError for one without these fields."""
    for number, line in common.read_lines(path):
        where = f"{path}, line {number}"
        row = common.parse_json(line, where)
        check(isinstance(row, dict) and fields <= row.keys(), f"{where}: {maker}")
        yield where, row


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
    common.inherit(args, run.made, prefer, *others, "judge_max_new_tokens")
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


def ask(judge: common.Engine, chats: list[list[dict]], seeds: list[int], read, longest: int) -> list[tuple]:
    """(value, text, tries) of each question that is answered in free text: read(text) -> a value or None.

    What can't be read is asked again with sampling, twice. (None, None, 0) where the judge has no room or refuses.
    """
    found: list[tuple] = [(None, None, 0)] * len(chats)
    todo = [i for i, chat in enumerate(chats) if not common.too_long(judge, chat, judge.context - longest)]
    for attempt in range(1 + common.JSON_RETRIES):
        tries = [common.derive_seed(seeds[i], attempt) for i in todo]
        sampling = {"temperature": 1.0 if attempt else 0.0, "max_new_tokens": longest}
        answers = judge.complete([chats[i] for i in todo], tries, **sampling) if todo else []
        answered = [(i, answer.text) for i, answer in zip(todo, answers, strict=True) if answer]
        for i, text in answered:
            found[i] = (read(text), text, attempt + 1)
        todo = [i for i, _ in answered if found[i][0] is None]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Uncertainty: prompts are the sample, so prompts are drawn.


def bootstrap_interval(values, statistic=None, draws: int = 10_000, seed: int | np.random.Generator = 0):
    """Percentile bootstrap interval, 95 %, of a statistic over prompts; NaN, NaN for fewer than two.

    values: (N,) or (N, D), a prompt a row. statistic(sample) -> number, not counted where it is NaN; default: the mean.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return (math.nan, math.nan)
    rows, function = (values, np.mean) if statistic is None else (range(len(values)), lambda i: statistic(values[i]))
    options = {"method": "percentile", "n_resamples": draws, "batch": 1000}  # in parts: 10,000 prompts fit into memory
    rng = seed if isinstance(seed, np.random.Generator) else abs(seed)  # none is below 0 for numpy
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that do not vary
        found = stats.bootstrap((rows,), function, vectorized=statistic is None, rng=rng, **options)
    return quantiles(found.bootstrap_distribution)


def quantiles(values) -> tuple[float, float]:
    """The ends of the middle 95 % of the values that are not NaN; NaN, NaN if all are."""
    low, high = pd.Series(values, dtype=float).quantile([0.025, 0.975]).tolist()
    return low, high


def estimate(values, name: str = "", seed: int = 0) -> dict[str, float]:
    """{"mean", "low", "high"} of values, or {name, name_low, name_high}: the mean and its bootstrap interval."""
    mean = float(np.mean(values)) if len(values) else math.nan
    keys = (name, f"{name}_low", f"{name}_high") if name else ("mean", "low", "high")
    return dict(zip(keys, (mean, *bootstrap_interval(values, seed=seed)), strict=True))


def spearman(x, y) -> float:
    """Spearman's rank correlation; NaN where one side does not vary."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(stats.spearmanr(x, y).statistic)


def rv_coefficient(x, y) -> float:
    """RV of two matrices (N, P) and (N, Q) of the same rows (SPA, Figure 3).

    ‖XᵀY‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) of the column-centred matrices: 1 if one is the other but for shift, scale
    and rotation. NaN where one side does not vary.
    """
    x, y = (np.asarray(m, dtype=float) - np.mean(m, axis=0) for m in (x, y))
    norm = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(x.T @ y) ** 2 / norm) if norm > 1e-24 else math.nan


def round_half_up(value: float, digits: int = 2) -> str:
    """A decimal number as tables print it, 2.345 as 2.35 (Python's own rounding gives 2.34 or 2.35)."""
    if np.isnan(value):
        return "–"
    exact = Decimal(repr(round(float(value), 10)))  # 9.155 is stored as 9.15499…
    return str(exact.quantize(Decimal(1).scaleb(-digits), rounding=ROUND_HALF_UP))


def with_interval(row: dict, name: str = "", digits: int = 2, scale: float = 1, sign: bool = False) -> str:
    """An `estimate` as tables print it: 5.01 [4.83, 5.19]; sign: +0.20 [-0.11, +0.51]; – where there is none."""
    keys = (name, f"{name}_low", f"{name}_high") if name else ("mean", "low", "high")
    texts = [round_half_up(scale * row.get(key, math.nan), digits) for key in keys]
    if sign:
        texts = [text if text.startswith(("-", "–")) else f"+{text}" for text in texts]
    return "–" if texts[0] == "–" else f"{texts[0]} [{texts[1]}, {texts[2]}]"


# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures. **bold** is Markdown, in LaTeX it becomes \textbf.


LATEX = {sign: f"\\{sign}" for sign in "&%$#_{}"} | {"\\": r"\textbackslash ", "~": r"\textasciitilde "}
LATEX |= {"^": r"\textasciicircum ", "±": r"$\pm$", "–": "--", "−": "$-$", "λ": r"$\lambda$"}
# control characters become visible pictures of themselves, but for tab and newline; halves of a character a sign
VISIBLE = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {0x7F: 0x2421}
VISIBLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF], 0xFFFD)


def align_tables(text: str) -> str:
    """Markdown whose tables (lines of cells between |) get their second line, and columns, numbers to the right."""

    def align(found: re.Match) -> str:
        cells = [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in found[0].splitlines()]
        widths = [max(2, *map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        rows = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells)
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)

    return re.sub(r"(?m)(^\|.*\|\n)+", align, f"{text}\n").rstrip("\n")


def as_cell(value) -> str:
    """A value in a Markdown table: what is not whole with two digits."""
    return (round_half_up(value) if isinstance(value, float) else str(value)).replace("|", "\\|")


def write_text(path: Path, text: str) -> None:
    with common.replace_file(path) as file:
        file.write(text if text.endswith("\n") else text + "\n")


def write_csv(path: Path, rows: list[dict] | pd.DataFrame) -> None:
    """The numbers behind a table or a figure, unrounded; what is not defined is an empty cell."""
    write_text(path, pd.DataFrame(rows, dtype=object).to_csv(index=False))


def write_table(output_dir: str, name: str, text: str, rows: list[dict] | pd.DataFrame) -> Path:
    """Writes OUTPUT_DIR/name.md, the tables, and name.csv, the numbers behind them; gives the path of the first."""
    path = output_path(output_dir, f"{name}.md")
    write_text(path, text)
    write_csv(path.with_suffix(".csv"), rows)
    return path


@contextlib.contextmanager
def figure(path: Path, columns: int = 1, width: float = 6.4, height: float = 4.0):
    """Yields the axes of a figure (a list if `columns` > 1) that is saved as `path` (PNG) and as PDF."""
    with matplotlib.rc_context(fname=PAGES / "figure.mplstyle"):
        drawing = Figure(figsize=(width, height), layout="constrained")
        yield drawing.subplots(1, columns)
        drawing.savefig(path.with_suffix(".png"))
        drawing.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})


def visible(value) -> str:
    """A value as text that a page may hold."""
    return str(value).replace("\r\n", "\n").translate(VISIBLE)


def render_page(name: str, **values) -> str:
    """eval/pages/NAME filled in: HTML, every text escaped, Markdown, its tables in columns, or LaTeX.

    `hashes` lets in the page's own style and script, no other.
    """
    source, hashes, kind = (PAGES / name).read_text(encoding="utf-8"), {}, Path(name).suffix
    for tag, text in re.findall(r"<(style|script)>(.*?)</\1>", source, re.DOTALL):
        hashes[tag] = f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
    as_latex = lambda value: str(value).translate(str.maketrans(LATEX))  # noqa: E731
    write = {".html": visible, ".md": as_cell, ".tex": as_latex}[kind]
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=kind == ".html",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if hasattr(value, "__html__") else write(value),
    )
    pages.globals |= {"interval": with_interval, "rounded": round_half_up, "hashes": hashes}
    text = pages.get_template(name).render(**values)
    return align_tables(text.strip()) if kind == ".md" else text
