"""Blind pairwise annotation by people, and their agreement with each other and the judge (Figure 8, Table 6).

With --runs it builds one HTML page that shows two systems' answers to the same prompts, sides shuffled, and
asks which is better on each of the objectives. The page needs no server and no network, runs no markup of
a model, keeps its progress in the browser and does not name the systems (what an answer says of its own maker
stays). Each annotator sends back the JSON file that its Export button saves. With --exports it computes the
agreement from those files.

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

import base64
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shared

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

# Its policy allows no host, not even its own folder, and only this style and script. A download link to a
# blob and reading a chosen file are no fetches, so both still work.
PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="@POLICY@">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>Which answer is better?</title>
<style>@STYLE@</style>
</head>
<body>
<noscript><p class="alert">This page needs JavaScript, which is switched off in this browser.</p></noscript>
<header>
  <h1>Which answer is better?</h1>
  <div class="progress">
    <progress id="bar" aria-labelledby="count"></progress>
    <span id="count"></span>
  </div>
  <div class="tools">
    <label for="name">Your name</label>
    <input id="name" autocomplete="off" spellcheck="false" maxlength="80">
    <button id="export" type="button" aria-keyshortcuts="e">Export</button>
    <button id="import" type="button">Import</button>
    <button id="restart" type="button">Start over</button>
    <input id="file" type="file" accept=".json,application/json" aria-label="An earlier export" hidden>
  </div>
</header>
<p id="warning" class="alert" role="alert" hidden></p>
<main>
  <h2 id="place" tabindex="-1"></h2>
  <section class="card" aria-labelledby="prompt-title">
    <h3 id="prompt-title">Prompt</h3>
    <div id="prompt" class="text" dir="auto"></div>
  </section>
  <div class="answers">
    <section class="card left" aria-labelledby="left-title">
      <h3 id="left-title">Left answer</h3>
      <div id="left" class="text" dir="auto"></div>
    </section>
    <section class="card right" aria-labelledby="right-title">
      <h3 id="right-title">Right answer</h3>
      <div id="right" class="text" dir="auto"></div>
    </section>
  </div>
  <div class="panel">
    <div id="dimensions"></div>
    <div class="moves">
      <button id="previous" type="button" aria-keyshortcuts="p ArrowLeft">Previous</button>
      <button id="undo" type="button" aria-keyshortcuts="u">Undo</button>
      <button id="next" type="button" aria-keyshortcuts="n ArrowRight">Next</button>
      <p id="status" role="status"></p>
    </div>
    <p class="help">
      <span><kbd>1</kbd> left, <kbd>2</kbd> tie, <kbd>3</kbd> right on the marked question</span>
      <span><kbd>c</kbd> clear it</span> <span><kbd>u</kbd> undo</span>
      <span><kbd>n</kbd> or <kbd>→</kbd> next</span> <span><kbd>p</kbd> or <kbd>←</kbd> previous</span>
      <span><kbd>e</kbd> export</span>
    </p>
  </div>
</main>
<script id="data" type="application/json">@DATA@</script>
<script>@SCRIPT@</script>
</body>
</html>
"""

STYLE = """
:root {
  --page: #f3f5f7; --card: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #cfd6dd;
  --left: #0068a6; --right: #b04a00; --tie: #57606a; --on: #ffffff; --mark: #eaf3fa; --focus: #111111;
  --alert: #fff1c2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1e2226; --ink: #e6e9ec; --soft: #a3adb7; --line: #3b434b;
    --left: #6cc0f2; --right: #f5a85c; --tie: #b3bcc5; --on: #14171a; --mark: #25303a; --focus: #ffffff;
    --alert: #4a3b00;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 0 1rem; max-width: 84rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif;
}
h1, h2, h3, p { margin: 0; }
h1 { font-size: 1.15rem; }
h2 { font-size: 1.15rem; margin: .25rem 0 .75rem; width: fit-content; }
h3 { font-size: .8rem; color: var(--soft); text-transform: uppercase; letter-spacing: .05em; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1.5rem; padding: .75rem 0; }
.progress { display: flex; align-items: center; gap: .6rem; flex: 1 1 14rem; min-width: 0; }
.progress span { color: var(--soft); white-space: nowrap; font-variant-numeric: tabular-nums; }
progress { flex: 1; min-width: 4rem; height: .6rem; accent-color: var(--left); }
.tools { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem; }
.card.left { border-top: .25rem solid var(--left); }
.card.right { border-top: .25rem solid var(--right); }
.answers { display: grid; grid-template-columns: minmax(0, 1fr); gap: .75rem; margin: .75rem 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; margin-top: .25rem; }
.text:empty::before { content: "(no text)"; color: var(--soft); font-style: italic; }
.panel {
  background: var(--page); border-top: 1px solid var(--line); padding: .75rem 0; display: grid; gap: .6rem;
}
#dimensions { display: grid; grid-template-columns: minmax(0, 1fr); gap: .75rem; }
.dimension {
  background: var(--card); border: 2px solid var(--line); border-radius: .5rem; padding: .6rem .9rem;
  display: flex; flex-direction: column;
}
.dimension[aria-current] { border-color: var(--left); background: var(--mark); }
.dimension .definition { font-size: .85rem; line-height: 1.4; color: var(--soft); }
.dimension .name { font-weight: 600; overflow-wrap: anywhere; }
.choices {
  display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .5rem;
  margin-top: auto; padding-top: .5rem;
}
button, input {
  font: inherit; color: inherit; background: var(--card); border: 1px solid var(--soft); border-radius: .4rem;
  min-height: 2.5rem; padding: .3rem .8rem;
}
button { cursor: pointer; }
button:hover { border-color: var(--ink); }
input { width: 11rem; max-width: 100%; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
h2:focus-visible { outline-offset: 4px; border-radius: .2rem; }
.choices button { border-width: 2px; font-weight: 600; padding: .3rem 0; }
.choices .left { border-color: var(--left); }
.choices .tie { border-color: var(--tie); }
.choices .right { border-color: var(--right); }
.choices [aria-pressed="true"] { color: var(--on); }
.choices [aria-pressed="true"]::before { content: "✓ "; }
.choices .left[aria-pressed="true"] { background: var(--left); }
.choices .tie[aria-pressed="true"] { background: var(--tie); }
.choices .right[aria-pressed="true"] { background: var(--right); }
.ready { background: var(--left); border-color: var(--left); color: var(--on); font-weight: 600; }
.moves { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; }
#status { flex: 1 1 16rem; min-height: 1.55em; overflow-wrap: anywhere; }
.help { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; color: var(--soft); }
kbd {
  font: inherit; font-size: .8rem; border: 1px solid var(--line); border-radius: .25rem; padding: 0 .3rem;
  background: var(--card);
}
.alert { background: var(--alert); border-radius: .4rem; padding: .5rem .8rem; margin-bottom: .75rem; }
@media (min-width: 48rem) {
  .answers, #dimensions { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
@media (min-width: 48rem) and (min-height: 44rem) {
  .panel { position: sticky; bottom: 0; }
}
@media (pointer: coarse) {
  button, input { min-height: 2.75rem; }
  .help { display: none; }
}
"""

SCRIPT = r"""
"use strict";
// Text of prompts, models and people goes to the page through textContent only.
const STUDY = JSON.parse(document.getElementById("data").textContent);
const ITEMS = STUDY.items, NAMES = STUDY.dimensions.map((dimension) => dimension.name);
const KEY = "spa-annotate-" + STUDY.study; // of these prompts, answers and sides: studies don't mix
const SIDES = ["left", "tie", "right"];
const $ = (id) => document.getElementById(id);

// ---- State: what was chosen, where we are, and what to undo. Kept in the browser after each change.
let answers = new Map(); // "item/dimension" as indices -> side
let undo = []; // [item, dimension, side before or null], the latest last
let at = 0, marked = 0; // the item shown, its dimension that the keys answer
let kept = true, exported = true; // does the browser keep it; does a file have it

const sideOf = (item, dimension) => answers.get(item + "/" + dimension) ?? null;
const openIn = (item) => NAMES.findIndex((_, dimension) => sideOf(item, dimension) === null);
const total = () => ITEMS.length * NAMES.length;
const shorten = (text, most) => text.length > most ? text.slice(0, most - 1) + "…" : text;

function setSide(item, dimension, side) {
  if (side === null) answers.delete(item + "/" + dimension);
  else answers.set(item + "/" + dimension, side);
}

function toExport() {
  const list = [];
  ITEMS.forEach((item, i) => NAMES.forEach((name, d) => {
    if (sideOf(i, d) !== null) list.push({ item: item.item, dimension: name, choice: sideOf(i, d) });
  }));
  return { study: STUDY.study, annotator: $("name").value.trim(), answers: list };
}

function readExport(given) {
  if (!given?.study || !Array.isArray(given.answers)) throw Error("it is no export of this page");
  if (given.study !== STUDY.study) throw Error("it belongs to another study");
  const found = new Map();
  for (const answer of given.answers) {
    const item = ITEMS.findIndex((known) => known.item === answer?.item);
    const dimension = NAMES.indexOf(answer?.dimension);
    const known = item >= 0 && dimension >= 0 && SIDES.includes(answer.choice);
    if (!known || found.has(item + "/" + dimension)) throw Error("an answer in it does not fit this page");
    found.set(item + "/" + dimension, answer.choice);
  }
  return [found, typeof given.annotator === "string" ? given.annotator : ""];
}

function save() {
  try {
    localStorage.setItem(KEY, JSON.stringify({ ...toExport(), at, undo }));
    kept = true;
  } catch {
    kept = false;
  }
  $("warning").textContent = "This browser does not keep your progress: export before you close this page, "
    + "and import that file to go on.";
  $("warning").hidden = kept;
}

function load() {
  let stored = null;
  try {
    stored = JSON.parse(localStorage.getItem(KEY));
    if (stored === null) return;
    [answers, $("name").value] = readExport(stored);
  } catch {
    return; // unreadable: start with nothing; save() says it if nothing can be kept at all
  }
  [at, undo] = [stored.at ?? 0, stored.undo ?? []];
}

// ---- What is seen. The elements are made once; only their text and marks change, so focus stays.
function make(tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

STUDY.dimensions.forEach(({ name, definition }, d) => {
  const group = make("div", "dimension", ""), title = make("p", "name", name);
  const text = make("p", "definition", definition), choices = make("div", "choices", "");
  group.setAttribute("role", "group");
  group.setAttribute("aria-labelledby", title.id = "dimension-" + d);
  if (definition) group.setAttribute("aria-describedby", text.id = "definition-" + d);
  SIDES.forEach((side, i) => {
    const button = make("button", side, ["Left", "Tie", "Right"][i]);
    button.type = "button";
    button.setAttribute("aria-label", name + ": " + ["Left is better", "Tie", "Right is better"][i]);
    button.addEventListener("click", () => choose(d, side));
    choices.append(button);
  });
  group.addEventListener("focusin", () => mark(d));
  group.append(title, ...(definition ? [text] : []), choices);
  $("dimensions").append(group);
});

function mark(dimension) {
  marked = dimension;
  [...$("dimensions").children].forEach((group, d) => {
    if (d === marked) group.setAttribute("aria-current", "true");
    else group.removeAttribute("aria-current");
  });
}

function show() {
  const item = ITEMS[at];
  $("place").textContent = `Item ${at + 1} of ${ITEMS.length}`;
  for (const part of ["prompt", "left", "right"]) $(part).textContent = item[part];
  [...$("dimensions").children].forEach((group, d) => group.querySelectorAll("button").forEach((button, i) =>
    button.setAttribute("aria-pressed", String(sideOf(at, d) === SIDES[i]))));
  mark(marked);
  $("bar").max = total();
  $("bar").value = answers.size;
  $("count").textContent = `${answers.size} of ${total()} answered`;
  $("export").classList.toggle("ready", answers.size === total());
}

const say = (text) => { $("status").textContent = text; };

// ---- What can be done.
function go(item, dimension = Math.max(0, openIn(item))) {
  const moved = item !== at, inChoices = $("dimensions").contains(document.activeElement);
  at = item;
  marked = dimension;
  show();
  save();
  if (moved) scrollTo(0, 0);
  // a person on the buttons goes on at the next question, or at the top of the next item
  if (inChoices && moved) $("place").focus();
  else if (inChoices) $("dimensions").children[marked].querySelector("button").focus();
}

function step(by) {
  if (!(at + by in ITEMS)) return say(by < 0 ? "This is the first item." : "This is the last item.");
  say("");
  go(at + by);
}

function choose(dimension, side) {
  const wasOpen = openIn(at) >= 0, before = sideOf(at, dimension);
  if (side !== before) undo = [...undo, [at, dimension, before]].slice(-500);
  setSide(at, dimension, side);
  exported = false;
  say(`Item ${at + 1}, ${NAMES[dimension]}: ${side ?? "cleared"}`);
  if (side === null) return go(at, dimension);
  const open = openIn(at);
  if (open >= 0) return go(at, open);
  if (!wasOpen && dimension + 1 < NAMES.length) return go(at, dimension + 1); // it was done before: in order
  if (!wasOpen) return go(Math.min(at + 1, ITEMS.length - 1));
  // this item is done: on to the next one that is not, after this one or else from the start
  const order = ITEMS.map((_, i) => (at + 1 + i) % ITEMS.length), next = order.find((i) => openIn(i) >= 0);
  if (next !== undefined) return go(next);
  go(at);
  say(`All ${total()} questions are answered. Export them now, key e.`);
}

function undoLast() {
  if (!undo.length) return say("Nothing to undo.");
  const [item, dimension, before] = undo.pop();
  setSide(item, dimension, before);
  exported = false;
  say(`Undone: item ${item + 1}, ${NAMES[dimension]}`);
  go(item, dimension);
}

function exportFile() {
  const content = toExport();
  if (!content.annotator) {
    $("name").focus();
    return say("Your name first, please; then export.");
  }
  const link = document.createElement("a");
  const text = JSON.stringify(content, null, 1) + "\n";
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "annotate_" + content.annotator.replace(/[^\p{L}\p{N}_-]+/gu, "_") + ".json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  exported = true;
  const open = total() - answers.size;
  say(`Saved ${link.download}: ${answers.size} answers` + (open ? `, ${open} still open.` : ", complete."));
}

async function importFile() {
  const file = $("file").files[0];
  if (!file) return;
  let found, annotator;
  try {
    [found, annotator] = readExport(JSON.parse(await file.text()));
  } catch (error) {
    const reason = error instanceof SyntaxError ? "it is no JSON file" : error.message;
    return say(`${shorten(file.name, 60)} was not read: ${reason}.`);
  } finally {
    $("file").value = ""; // so that the same file can be chosen again
  }
  const question = `Replace the ${answers.size} answers here by the ${found.size} of the file?`;
  if (answers.size && !confirm(question)) return;
  [answers, $("name").value, undo, exported] = [found, annotator, [], true];
  go(Math.max(0, ITEMS.findIndex((_, i) => openIn(i) >= 0)));
  say(`Read ${found.size} answers.`);
}

function restart() {
  const question = `Remove the name and all ${answers.size} answers from this browser? Export them first.`;
  if (!confirm(question)) return;
  [answers, $("name").value, undo, exported] = [new Map(), "", [], true];
  go(0);
  say("Started over.");
}

// ---- Keys, buttons, and the browser itself.
const ACTIONS = new Map([
  ...SIDES.map((side, i) => [String(i + 1), () => choose(marked, side)]),
  ["n", () => step(1)], ["arrowright", () => step(1)], ["p", () => step(-1)], ["arrowleft", () => step(-1)],
  ["u", undoLast], ["c", () => choose(marked, null)], ["e", exportFile],
]);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.isComposing) return;
  if (event.target === $("name")) {
    if (["Enter", "Escape"].includes(event.key)) $("name").blur(); // the other keys are letters of the name
    return;
  }
  const act = ACTIONS.get(String(event.key).toLowerCase());
  if (act) { event.preventDefault(); act(); }
});
for (const [id, act] of [["previous", () => step(-1)], ["next", () => step(1)], ["undo", undoLast],
  ["export", exportFile], ["import", () => $("file").click()], ["restart", restart]]) {
  $(id).addEventListener("click", act);
}
$("file").addEventListener("change", importFile);
$("name").addEventListener("input", save);
addEventListener("storage", (event) => { // another tab with this study went on
  if (event.key === KEY && event.newValue) { const here = at; load(); at = here; show(); }
});
addEventListener("beforeunload", (event) => { if (!kept && !exported) event.preventDefault(); });

load();
go(at);
"""


def build_study(runs: list[shared.Run], num_prompts: int, seed: int) -> tuple[dict, dict]:
    """(what the page shows, what its key holds) of the first answers to `num_prompts` of the shared prompts.

    A hash of seed and id draws and orders the prompts, and another decides the side: neither depends on which
    other prompts there are. The study's name is a digest of what the page shows, so new scores keep it.
    """
    rows = [{row["id"]: row for row in run.rows} for run in runs]
    ids = shared.shared_ids(*runs)
    check(bool(ids), f"{runs[0].path} and {runs[1].path} have no prompt in common")
    drawn = sorted(ids, key=lambda id: common.derive_seed(seed, "draw", id))[:num_prompts]
    items, keys = [], []
    for id in drawn:
        item = f"{common.derive_seed(seed, 'item', id):016x}"  # the id itself may say too much
        left = common.derive_seed(seed, "side", id) % 2
        answers = [of[id]["responses"][0] for of in rows]
        sides = {"left": answers[left]["text"], "right": answers[1 - left]["text"]}
        items.append({"item": item, "prompt": common.plain_text(rows[0][id]["prompt"])} | sides)
        sides = {"left": runs[left].name, "right": runs[1 - left].name}
        scores = {run.name: answer["scores"] for run, answer in zip(runs, answers, strict=True)}
        keys.append({"item": item, "id": id} | sides | {"scores": scores})
    objectives = shared.definitions(runs[0].args) or [[name, ""] for name in runs[0].objectives]
    data = {"dimensions": [{"name": name, "definition": text} for name, text in objectives], "items": items}
    study = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
    key = {"study": study, "systems": [run.name for run in runs], "dimensions": runs[0].objectives}
    return {"study": study} | data, key | {"judge": runs[0].judge, "items": keys}


def build_page(data: dict) -> str:
    """The page. Only its own style and script run, by their hashes; no text can end the data's element."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (STYLE, SCRIPT)]
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; "
    policy += f"style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"
    text = json.dumps(data)  # ASCII, so U+2028 and its like are escapes already
    for character in "<>&":  # ends an element, a comment or an entity
        text = text.replace(character, f"\\u{ord(character):04x}")
    page = PAGE.replace("@POLICY@", policy).replace("@STYLE@", STYLE).replace("@SCRIPT@", SCRIPT)
    return page.replace("@DATA@", text)  # last: what prompts and models wrote is not filled in again


def build(args: Args) -> None:
    """Writes the page and its key, and says what to do with them."""
    common.check_at_least(args, 1, "num_prompts")
    runs = shared.read_runs(args.runs, least=2)
    check(len(runs) == 2, f"--runs: two runs are compared, {len(runs)} are given")
    names = [run.name for run in runs]
    check(names[0] != names[1], f"--runs: both are named '{names[0]}'; give each a NAME=DIR of its own")
    data, key = build_study(runs, args.num_prompts, args.seed)

    page_file = shared.output_path(args.output_dir, "annotate.html")
    key_file = shared.output_path(args.output_dir, "annotate_key.json")
    if key_file.exists() and not args.overwrite:
        lost = f"{key_file} is of another study, whose exports need it; another --output_dir, or --overwrite"
        check(read_key(key_file)["study"] == key["study"], lost)
    shared.write_text(key_file, json.dumps(key, ensure_ascii=False, indent=1))
    shared.write_text(page_file, build_page(data))

    items = key["items"]
    print(f"study {key['study']}: {names[0]} against {names[1]} on {' and '.join(key['dimensions'])}")
    for text, count in (
        ("prompts in common", len(shared.shared_ids(*runs))),
        ("drawn", len(items)),
        (f"{names[0]} on the left", sum(item["left"] == names[0] for item in items)),
        ("both answers the same", sum(item["left"] == item["right"] for item in data["items"])),
        ("without a judge's score", sum(None in item["scores"].values() for item in items)),
    ):
        print(f"  {text:<24}{count:>6}")
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
        check(isinstance(item, str) and item in items, f"{where}: unknown item {item!r}")
        check(dimension in key["dimensions"], f"{where}: unknown dimension {dimension!r}")
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
        if None in scores:
            continue
        for dimension, a, b in zip(key["dimensions"], *scores, strict=True):
            found[dimension, item["item"]] = "tie" if abs(a - b) <= tie else "A" if a > b else "B"
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Agreement.


def cohen_kappa(a: list, b: list) -> float:
    """κ = (p_o − p_e) / (1 − p_e) of two raters of the same items (Cohen 1960, nominal categories).

    p_o: share of equal ratings; p_e = Σ_k p_a(k) p_b(k), each rater's own shares of category k. NaN where
    p_e is 1 (both know one category only) or nothing was rated.
    """
    if not a:
        return float("nan")
    counts_a, counts_b = Counter(a), Counter(b)
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
    expected = sum(counts_a[k] * counts_b[k] for k in counts_a) / len(a) ** 2
    return (observed - expected) / (1 - expected) if expected < 1 else float("nan")


def item_agreement(counts) -> np.ndarray:
    """Share of the pairs of raters that agree, an item. counts: (N, K), how many chose category k -> (N,)."""
    counts = np.asarray(counts, dtype=float)
    raters = counts.sum(axis=1)
    return (counts * (counts - 1)).sum(axis=1) / (raters * (raters - 1))


def fleiss_kappa(counts) -> float:
    """κ = (P̄ − P_e) / (1 − P_e) of the same number of raters an item, nominal categories.

    counts: (N, K), how many of an item's raters chose category k. P̄: mean over items of the share of rater
    pairs that agree; P_e = Σ_k p_k², p_k the share of all ratings in category k (with two raters this is
    Scott's π, not Cohen's κ). NaN where P_e is 1 or there are no items.
    """
    counts = np.asarray(counts, dtype=float)
    if not len(counts):
        return float("nan")
    expected = float(((counts.sum(axis=0) / counts.sum()) ** 2).sum())
    observed = float(item_agreement(counts).mean())
    return (observed - expected) / (1 - expected) if expected < 1 else float("nan")


def majority(choices: list[str]) -> str:
    """What more than half chose, else a tie."""
    choice, count = Counter(choices).most_common(1)[0]
    return choice if 2 * count > len(choices) else "tie"


def choice_row(dimension: str, who: str, chosen: list[str]) -> dict:
    """How often each system won."""
    counts = Counter(chosen)
    row = {"table": "choices", "dimension": dimension, "who": who, "items": len(chosen)}
    return row | {choice: counts[choice] for choice in CHOICES}


def agreement_row(table: str, dimension: str, who: str, equal, kappa: float, kind: str, seed: int) -> dict:
    """Raw agreement with its interval, and κ. equal: (N,), the share of agreeing pairs an item."""
    low, high = shared.bootstrap_interval(equal, seed=seed)
    mean = float(np.mean(equal)) if len(equal) else float("nan")
    row = {"table": table, "dimension": dimension, "who": who, "items": len(equal)}
    return row | {"agreement": mean, "low": low, "high": high, "kappa": kappa, "kappa_of": kind}


def agreement_rows(people: dict[str, dict], judge: dict, dimensions: list[str], seed: int) -> list[dict]:
    """The rows of the three tables. people: annotator -> {(dimension, item): choice}; judge: the same."""
    rows = []
    for dimension in dimensions:
        on_this = [
            {item: choice for (of, item), choice in answers.items() if of == dimension}
            for answers in (*people.values(), judge)
        ]
        chosen, machine = on_this[:-1], on_this[-1]
        everyone = {item: [c[item] for c in chosen if item in c] for choices in chosen for item in choices}
        compared = list(zip(people, chosen, strict=True))
        rows += [choice_row(dimension, name, list(choices.values())) for name, choices in compared]
        if len(people) > 1:
            every = [choice for choices in chosen for choice in choices.values()]
            rows.append(choice_row(dimension, "all annotators", every))
        rows.append(choice_row(dimension, "judge", list(machine.values())))
        if len(people) > 1:
            full = [choices for choices in everyone.values() if len(choices) == len(people)]
            counts = [[choices.count(choice) for choice in CHOICES] for choices in full]
            equal = item_agreement(counts) if full else []
            if len(people) == 2:
                kappa = cohen_kappa([choices[0] for choices in full], [choices[1] for choices in full])
                who, kind = " and ".join(people), "Cohen"
            else:
                kappa, who, kind = fleiss_kappa(counts), f"{len(people)} annotators", "Fleiss"
            rows.append(agreement_row("annotators", dimension, who, equal, kappa, kind, seed))
            compared.append(("majority", {item: majority(choices) for item, choices in everyone.items()}))
        for name, choices in compared:
            both = [item for item in choices if item in machine]
            a, b = [choices[item] for item in both], [machine[item] for item in both]
            equal = [float(x == y) for x, y in zip(a, b, strict=True)]
            rows.append(agreement_row("judge", dimension, name, equal, cohen_kappa(a, b), "Cohen", seed))
    return rows


def percent(row: dict) -> str:
    """Raw agreement in percent with its interval."""
    if np.isnan(row["low"]):
        return shared.round_half_up(100 * row["agreement"], 1)  # fewer than two items
    mean, low, high = (shared.round_half_up(100 * row[name], 1) for name in ("agreement", "low", "high"))
    return f"{mean} [{low}, {high}]"


def report(rows: list[dict], key: dict, people: dict[str, dict]) -> str:
    """The tables in Markdown."""
    wanted = len(key["items"]) * len(key["dimensions"])
    given = ", ".join(f"{name} ({len(answers)} of {wanted})" for name, answers in people.items())
    system_a, system_b = key["systems"]
    rounded = shared.round_half_up
    lines = [f"# {system_a} against {system_b}, annotated", "", f"Answers given: {given}", ""]
    header = ["dimension", "who", "answers", f"{system_a} better", "tie", f"{system_b} better"]
    cells = [
        [row["dimension"], row["who"], *(str(row[name]) for name in ("items", *CHOICES))]
        for row in rows
        if row["table"] == "choices"
    ]
    lines += [shared.markdown_table(header, cells), ""]
    judge = f"the judge{', ' + key['judge'] if key.get('judge') else ''} (Table 6)"
    notes = {
        "annotators": "## Annotators with each other\n\nOn the items that all have answered: the share of "
        "equal choices and Cohen's κ; of more than two annotators, the mean over pairs and Fleiss' κ.",
        "judge": f"## Annotators with {judge}\n\nThe share of equal choices and Cohen's κ. The "
        "majority is what more than half chose, else a tie.",
    }
    for table, note in notes.items():
        header = ["dimension", "who", "items", "agreement %, 95 % interval", "κ"]
        found = [row for row in rows if row["table"] == table]
        cells = [
            [row["dimension"], row["who"], str(row["items"]), percent(row), rounded(row["kappa"])] for row in found
        ]
        lines += [note, "", shared.markdown_table(header, cells), ""] if found else []
    return "\n".join(lines).rstrip()


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
    rows = agreement_rows(people, judge, key["dimensions"], args.seed)

    text = report(rows, key, people)
    text_file = shared.output_path(args.output_dir, "annotate_agreement.md")
    numbers_file = shared.output_path(args.output_dir, "annotate_agreement.csv")
    shared.write_text(text_file, text)
    cells = [{name: "" if value != value else value for name, value in row.items()} for row in rows]
    shared.write_csv(numbers_file, cells)  # NaN as an empty cell
    print(text)
    unscored = len(key["items"]) - len({item for _, item in judge})
    if unscored:
        print(f"\n{unscored} items have no judge's score and are left out of the comparison with the judge")
    print(f"\n{text_file}\n{numbers_file} (A is {key['systems'][0]}, B {key['systems'][1]})")


def main(args: Args) -> None:
    one = "give --runs (to build a page) or --exports (for the agreement), one of the two"
    check(bool(args.runs) != bool(args.exports), one)
    if args.runs:
        build(args)
    else:
        agree(args)


if __name__ == "__main__":
    common.run_stage(main, Args)
