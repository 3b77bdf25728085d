"""eval/annotate.py: the page in a real browser, its blindness and its safety; the agreement and its κ."""

import json
import re
import shutil
from pathlib import Path

import annotate
import pytest
import shared
from conftest import scored_row, wait, write_rows
from eval_helpers import csv_rows, refuse, succeed, write_record

OBJECTIVES = [["Harmlessness", "Safe and neutral."], ["Helpfulness", "Addresses what is asked."]]
DIMENSIONS = [name for name, _ in OBJECTIVES]
JUDGED = {"objectives": ["harmlessness", "helpfulness"], "judge_model": "the-judge"}
JUDGED["constitution"] = {name.lower(): text for name, text in OBJECTIVES}
# the judge's scores of A and B. A, A, tie, B, A win on the first dimension, tie, B, B, A, A on the other
SCORES = {
    "p0": ([9, 5], [3, 5]),
    "p1": ([8, 2], [4, 7]),
    "p2": ([5, 5], [5, 6]),
    "p3": ([2, 9], [8, 1]),
    "p4": ([7, 7], [6, 3]),
    "p5": (None, [6, 6]),
}
HOSTILE = [
    "</script><script>window.hacked = 1; alert(1)</script>",
    "<img src=x onerror='window.hacked = 2'><svg onload=window.hacked=3>",
    "<!-- <script> ]]> </style></textarea> --> &lt;b&gt; &amp; \u2028\u2029\x00\x7f\ufeff",
    "\"'`${window.hacked = 4}` \\u003c \\ {{ data }} {% raw %} __proto__ javascript:window.hacked=5",
    "W" * 5000 + " " + "https://host.invalid/" + "a/" * 2000,
    " \tfirst\r\nsecond\n\n\nשלום ‮rtl 你好 🎉 \ud7ff end  ",
]


def make_runs(tmp_path: Path, texts: list[str] | None = None) -> list[str]:
    """The two runs of SCORES as --runs takes them; or of given texts, each as prompt and as both answers."""
    for i, folder in enumerate(tmp_path / name for name in "ab"):
        rows = [scored_row(id, [pair[i]], None, [f"{id} says {i}"]) for id, pair in SCORES.items()]
        if texts is not None:
            rows = [scored_row(f"h{n}", [[5, 5]], None, [f"{t}{i}"]) | {"prompt": t} for n, t in enumerate(texts)]
        write_rows(folder / "02_scores.jsonl", rows)
        write_record(folder, "02_score", args=JUDGED)
    return [f"Zebra9={tmp_path / 'a'}", f"Quokka7={tmp_path / 'b'}"]


@pytest.fixture
def study(tmp_path, call):
    """study(texts=None, *options) -> (page, key) of a page built in tmp_path/out."""

    def build(texts=None, *options) -> tuple[Path, dict]:
        succeed(call, "annotate", "--runs", *make_runs(tmp_path, texts), "--output_dir", tmp_path / "out", *options)
        return tmp_path / "out" / "annotate.html", read_key(tmp_path)

    return build


def read_key(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "annotate_key.json").read_text(encoding="utf-8"))


def page_data(page: Path) -> dict:
    """What the page shows, as it holds it."""
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(encoding="utf-8"))
    return json.loads(data[1])


def make_export(key: dict, annotator: str, first: list, second: list) -> dict:
    """An export in which p0, p1, … got these choices (A, tie, B or None) on the two dimensions."""
    answers = []
    for item in key["items"]:
        for dimension, choices in zip(DIMENSIONS, (first, second), strict=True):
            if (chosen := choices[int(item["id"][1:])]) is not None:
                name = {"A": "Zebra9", "B": "Quokka7", "tie": None}[chosen]
                choice = next((side for side in ("left", "right") if item[side] == name), "tie")
                answers.append({"item": item["item"], "dimension": dimension, "choice": choice})
    return {"study": key["study"], "annotator": annotator, "answers": answers}


def save(path: Path, value) -> Path:
    text = value if isinstance(value, str) else json.dumps(value, indent=1)  # on several lines, as the page saves it
    path.write_text(text, encoding="utf-8")
    return path


def numbers(folder: Path) -> dict:
    return csv_rows(folder / "annotate_agreement.csv", "table", "dimension", "who")


# ---------------------------------------------------------------------------------------------------------------------
# Building


def test_page_is_blind_and_its_key_says_which_side_is_which(study, tmp_path, call):
    page, key = study()
    text, shown = page.read_text(encoding="utf-8"), page_data(page)
    assert "says 0" in text and not re.search("zebra9|quokka7|the-judge", text, re.IGNORECASE)
    assert not {item["item"] for item in shown["items"]} & SCORES.keys()
    folders = [spec.partition("=")[2] for spec in make_runs(tmp_path)]
    succeed(call, "annotate", "--runs", f"X={folders[0]}", f"Y={folders[1]}", "--output_dir", tmp_path / "other")
    assert (tmp_path / "other" / "annotate.html").read_text(encoding="utf-8") == text, "names change nothing in it"
    assert key["systems"] == ["Zebra9", "Quokka7"] and key["dimensions"] == DIMENSIONS
    assert shown["study"] == key["study"] and len(shown["items"]) == 6
    assert shown["dimensions"] == [{"name": name, "definition": text} for name, text in OBJECTIVES]
    for item, hidden in zip(shown["items"], key["items"], strict=True):
        assert item["item"] == hidden["item"] and item["prompt"] == f"question {hidden['id']}"
        sides = {hidden["left"]: item["left"], hidden["right"]: item["right"]}
        assert sides == {"Zebra9": f"{hidden['id']} says 0", "Quokka7": f"{hidden['id']} says 1"}
        assert hidden["scores"] == dict(zip(("Zebra9", "Quokka7"), SCORES[hidden["id"]], strict=True))


def test_sides_and_draw_depend_on_seed_and_prompt_alone(tmp_path):
    rows = [scored_row(f"p{i}", [[5, 5]], None) for i in range(300)]

    def built(number: int, seed: int, rows=rows) -> dict:
        runs = [shared.Run(name, "", tmp_path, rows, {"02": JUDGED}, {"args": JUDGED}) for name in "AB"]
        return {item["id"]: item["left"] for item in annotate.build_study(runs, number, seed)[1]["items"]}

    whole, part, other = built(300, 0), built(40, 0), built(300, 1)
    assert 120 < list(whole.values()).count("A") < 180
    assert part == {id: whole[id] for id in list(whole)[:40]}, "a smaller draw is the beginning of a larger one"
    assert list(whole) != [row["id"] for row in rows] and list(other) != list(whole)
    assert 120 < sum(whole[id] != other[id] for id in whole) < 180, "another seed, other sides"
    assert built(300, 0, rows[::2]) == {row["id"]: whole[row["id"]] for row in rows[::2]}


def test_key_of_another_study_is_not_lost(study, tmp_path, call):
    _, key = study()
    options = ("--runs", *make_runs(tmp_path), "--output_dir", tmp_path / "out")
    assert "--overwrite" in refuse(call, "annotate", "another study", *options, "--seed", 1)
    assert study()[1] == key, "the same study again is fine"
    rows = [scored_row(id, [[1, 1]], None, [f"{id} says 0"]) for id in SCORES]
    write_rows(tmp_path / "a" / "02_scores.jsonl", rows)  # another judge of the same answers
    succeed(call, "annotate", *options)
    assert read_key(tmp_path)["study"] == key["study"] and read_key(tmp_path)["items"] != key["items"]
    succeed(call, "annotate", *options, "--seed", 1, "--overwrite")


def test_summary_and_bad_runs(tmp_path, call):
    a, b = make_runs(tmp_path)
    out = ("--output_dir", tmp_path / "out")
    output = succeed(call, "annotate", "--runs", a, b, "--num_prompts", 4, *out)
    left = sum(item["left"] == "Zebra9" for item in read_key(tmp_path)["items"])
    assert "4 of 6 prompts in common are drawn" in output and f"Zebra9 is on the left in {left} of them" in output
    assert str(tmp_path / "out" / "annotate.html") in output

    write_rows(tmp_path / "c" / "02_scores.jsonl", [scored_row("elsewhere", [[1, 1]], None)])
    shutil.copy(tmp_path / "a" / "02_args.json", tmp_path / "c")
    for said, *options in (
        ("at least 2", "--runs", a),
        ("two runs are compared", "--runs", a, b, f"C={tmp_path / 'c'}"),
        ("no prompt in common", "--runs", a, f"C={tmp_path / 'c'}"),
        ("both are named", "--runs", f"x:{a}", f"y:{a}"),
        ("at least 1", "--runs", a, b, "--num_prompts", 0),
        ("one of the two", "--runs", a, b, "--exports", "x.json"),
        ("one of the two",),
    ):
        refuse(call, "annotate", said, *options, *out)


# ---------------------------------------------------------------------------------------------------------------------
# Agreement

ONE = (["A", "A", "tie", "B", "B", "A"], ["tie"] * 6)
TWO = (["A", "tie", "tie", "B", "A", "A"], ["tie"] * 6)


def test_agreement_of_two_and_of_three(study, tmp_path, call):
    _, key = study()
    files = [save(tmp_path / f"{name}.json", make_export(key, name, *of)) for name, of in (("r1", ONE), ("r2", TWO))]
    out = ("--output_dir", tmp_path / "out", "--key", tmp_path / "out" / "annotate_key.json")
    output = succeed(call, "annotate", "--exports", *files, *out)
    found = numbers(tmp_path / "out")

    def counts(who, dimension="Harmlessness"):
        return [int(found["choices", dimension, who][name]) for name in ("items", "A", "tie", "B")]

    assert counts("r1") == [6, 3, 1, 2] and counts("r2") == [6, 3, 2, 1]
    assert counts("all annotators") == [12, 6, 3, 3] and counts("judge") == [5, 3, 1, 1]
    assert counts("judge", "Helpfulness") == [5, 2, 1, 2] and counts("r1", "Helpfulness") == [6, 0, 6, 0]

    def agreement(table, who, dimension="Harmlessness"):
        row = found[table, dimension, who]
        return int(row["items"]), *(float(row[name]) if row[name] else None for name in ("agreement", "kappa"))

    # p_e 13/36: shares of A, tie, B (3, 1, 2) and (3, 2, 1) of 6
    assert agreement("annotators", "r1 and r2") == (6, pytest.approx(4 / 6), pytest.approx(11 / 23))
    assert agreement("annotators", "r1 and r2", "Helpfulness") == (6, 1, None), "both say tie only"
    # of the five scored: p_e 9/25 each; the majority A, tie, tie, B, tie has 7/25
    assert agreement("judge", "r1") == (5, pytest.approx(4 / 5), pytest.approx(11 / 16))
    assert agreement("judge", "r2") == (5, pytest.approx(4 / 5), pytest.approx(11 / 16))
    assert agreement("judge", "majority") == (5, pytest.approx(3 / 5), pytest.approx(8 / 18))
    assert agreement("judge", "r1", "Helpfulness") == (5, pytest.approx(1 / 5), pytest.approx(0))
    order = [int(item["id"][1:]) for item in key["items"]]
    low, high = shared.bootstrap_interval([float(ONE[0][i] == TWO[0][i]) for i in order])
    row = found["annotators", "Harmlessness", "r1 and r2"]
    assert (float(row["low"]), float(row["high"])) == (low, high) and 0 <= low < 4 / 6 < high <= 1
    lines = [line for line in output.splitlines() if "r1 and r2" in line]
    assert "66.7 [" in lines[0] and "0.48 |" in lines[0] and "– |" in lines[1], "κ is undefined, not a crash"
    assert "1 items have no judge's score" in output
    assert (tmp_path / "out" / "annotate_agreement.md").read_text(encoding="utf-8").strip() in output

    files.append(save(tmp_path / "r3.json", make_export(key, "r3", *ONE)))
    succeed(call, "annotate", "--exports", *files, *out)
    found = numbers(tmp_path / "out")
    # item agreements 1, 1/3, 1, 1, 1/3, 1; totals A 9, tie 4, B 5 of 18: P_e 61/162
    assert agreement("annotators", "3 annotators") == (6, pytest.approx(7 / 9), pytest.approx(65 / 101))
    assert found["annotators", "Harmlessness", "3 annotators"]["kappa_of"] == "Fleiss"
    assert agreement("annotators", "3 annotators", "Helpfulness") == (6, 1, None), "all say tie only"
    assert agreement("judge", "majority") == (5, pytest.approx(4 / 5), pytest.approx(11 / 16))

    succeed(call, "annotate", "--exports", *files, *out, "--judge_tie", 1)
    found = numbers(tmp_path / "out")
    assert counts("judge") == [5, 2, 2, 1], "7 and 6 are a tie now"


def test_items_that_not_all_have_answered(study, tmp_path, call):
    _, key = study()
    some = (["A", "A", None, None, None, None], [None] * 6)
    none_shared = ([None, None, "A", None, None, "B"], [None] * 6)
    exports = {"r1": ONE, "r2": some, "majority": none_shared}
    files = [save(tmp_path / f"{name}.json", make_export(key, name, *of)) for name, of in exports.items()]

    def agree(*files) -> tuple[str, dict]:
        output = succeed(call, "annotate", "--exports", *files, "--output_dir", tmp_path / "out")
        return output, numbers(tmp_path / "out")

    output, found = agree(*files[:2])
    assert "r2 (2 of 12)" in output
    row = found["annotators", "Harmlessness", "r1 and r2"]
    assert (row["items"], float(row["agreement"]), row["kappa"]) == ("2", 1, ""), "both know A only"
    assert found["annotators", "Helpfulness", "r1 and r2"]["agreement"] == ""
    assert found["judge", "Harmlessness", "majority"]["items"] == "5", "one annotator of an item is its majority"
    row = agree(*files)[1]["annotators", "Harmlessness", "3 annotators"]
    assert (row["items"], row["agreement"], row["kappa"]) == ("0", "", "")
    output, found = agree(files[0])
    assert not [who for table, _, who in found if table == "annotators"]
    assert "majority |" not in output, "of one it is no news"


def test_bad_exports_and_files_are_one_line(study, tmp_path, call):
    _, key = study()
    whole = make_export(key, "r 1", *ONE)
    first, second = whole["answers"][:2]
    for change, said in (
        ({"study": "0" * 16}, "the key is of"),
        ({"annotator": "  "}, "no 'annotator'"),
        ({"answers": None}, "no list 'answers'"),
        ({"answers": []}, "no answers"),
        ({"answers": ["left"]}, "answer 1: not an object"),
        ({"answers": [first, second | {"item": "p0"}]}, "answer 2: unknown item 'p0'"),
        ({"answers": [first, second | {"item": ["x"]}]}, "answer 2: unknown item"),
        ({"answers": [first, second | {"dimension": "Style"}]}, "answer 2: unknown dimension 'Style'"),
        ({"answers": [first, second | {"choice": "A"}]}, "answer 2: choice 'A'; one of left, tie, right"),
        ({"answers": [first, second, first]}, "answer 3: item"),
    ):
        file = save(tmp_path / "bad.json", whole | change)
        assert str(file) in refuse(call, "annotate", said, "--exports", file, "--output_dir", tmp_path / "out")

    good, again = save(tmp_path / "good.json", whole), make_export(key, " r  1 ", *TWO)
    for said, *options in (
        ("annotator 'r 1' again", "--exports", good, save(tmp_path / "again.json", again)),
        ("no such file", "--exports", tmp_path / "none.json"),
        ("broken JSON", "--exports", save(tmp_path / "broken.json", "{")),
        ("not a JSON object", "--exports", save(tmp_path / "list.json", [])),
        ("no key of this script", "--exports", good, "--key", good),
        ("at least 0", "--exports", good, "--judge_tie", -1),
        ("annotate_key.json: no such file", "--exports", good, "--output_dir", tmp_path / "empty"),
    ):
        refuse(call, "annotate", said, "--output_dir", tmp_path / "out", *options)
    assert not (tmp_path / "out" / "annotate_agreement.md").exists()


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


TAB, ENTER, LEFT, RIGHT = "\ue004", "\ue007", "\ue012", "\ue014"


def text(page, id: str) -> str:
    return page.script("return document.getElementById(arguments[0]).textContent", id)


def state(page) -> tuple:
    """(item, questions answered, the question that the keys answer, what is chosen for each question of the item)."""
    place, count = (int(re.search(r"\d+", text(page, id))[0]) for id in ("place", "count"))
    marked = page.script("return document.querySelector('[aria-current] .name').textContent")
    chosen = "return [...document.querySelectorAll('.choices')].map((d) => d.querySelector('[aria-pressed=true]')"
    return place, count, marked, page.script(f"{chosen}?.textContent ?? '')")


def alert(page, answer: str) -> None:
    """Waits for a question of the page, and answers it."""
    from selenium.webdriver.support.ui import WebDriverWait

    getattr(WebDriverWait(page.driver, 60).until(lambda driver: driver.switch_to.alert), answer)()


def wait_for_file(page, name: str) -> dict:
    wait((page.downloads / name).exists)
    return json.loads((page.downloads / name).read_text(encoding="utf-8"))


def test_annotation_by_keyboard_reload_and_export(study, chromium):
    page, key = study()
    shown = page_data(page)["items"]
    chromium.open(page)
    assert state(chromium) == (1, 0, "Harmlessness", ["", ""])
    for part in ("prompt", "left", "right"):
        assert text(chromium, part) == shown[0][part]
    chromium.press("e")
    assert "name first" in text(chromium, "status"), "an export needs a name; the field has the focus now"
    chromium.press(*"Ann 123 ü", ENTER)
    assert state(chromium)[1] == 0, "digits in the name are no answers"
    for keys, *expected in (
        ("1", 1, 1, "Helpfulness", ["Left", ""]),
        ("3", 2, 2, "Harmlessness", ["", ""]),
        ("2", 2, 3, "Helpfulness", ["Tie", ""]),
        ("reload", 2, 3, "Helpfulness", ["Tie", ""]),  # in the middle of the second item
        ("uu", 1, 1, "Helpfulness", ["Left", ""]),  # undo knows what was done before the reload
        ("31", 2, 3, "Helpfulness", ["Left", ""]),
        ("2", 3, 4, "Harmlessness", ["", ""]),
        (LEFT, 2, 4, "Harmlessness", ["Left", "Tie"]),
        ("c", 2, 3, "Harmlessness", ["", "Tie"]),
        ("u3", 2, 4, "Helpfulness", ["Right", "Tie"]),  # a revision, in order
        ("u", 2, 4, "Harmlessness", ["Left", "Tie"]),
        ("np" + RIGHT, 3, 4, "Harmlessness", ["", ""]),
        ("n131313", 3, 10, "Harmlessness", ["", ""]),  # left out item 3, so it comes back once the others are done
    ):
        if keys == "reload":
            chromium.driver.refresh()
            assert chromium.script("return document.getElementById('name').value") == "Ann 123 ü"
        else:
            chromium.press(*keys)
        assert state(chromium) == tuple(expected), keys
    assert text(chromium, "left") == shown[2]["left"]

    # with the buttons, still without a mouse: Tab to the third of the first question
    for _ in range(20):
        chromium.press(TAB)
        focus = chromium.script(
            "const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.ariaLabel, e.matches(':focus-visible'), s.outlineStyle, parseFloat(s.outlineWidth)]"
        )
        assert focus[1:3] == [True, "solid"] and focus[3] >= 2, f"the focus is seen: {focus}"
        if focus[0] == "Harmlessness: Right is better":
            break
    chromium.press(ENTER)
    assert chromium.script("return document.activeElement.ariaLabel") == "Helpfulness: Left is better"
    chromium.press(ENTER)
    assert text(chromium, "count") == "12 of 12 answered" and "All 12" in text(chromium, "status")
    chromium.press("e")
    export = wait_for_file(chromium, "annotate_Ann_123_ü.json")
    assert "12 answers, complete" in text(chromium, "status")
    assert chromium.messages() == []

    chosen = [("left", "right"), ("left", "tie"), ("right", "left"), *[("left", "right")] * 3]
    answers = [
        {"item": item["item"], "dimension": dimension, "choice": choice}
        for item, choices in zip(shown, chosen, strict=True)
        for dimension, choice in zip(DIMENSIONS, choices, strict=True)
    ]
    assert export == {"study": key["study"], "annotator": "Ann 123 ü", "answers": answers}


def test_import_studies_apart_and_storage(study, tmp_path, chromium):
    page, key = study(None, "--seed", 5)
    chromium.open(page)
    half = make_export(key, "R. 1", ["A"] * 6, [None] * 6)
    file = chromium.driver.find_element("id", "file")
    file.send_keys(str(save(tmp_path / "half.json", half)))
    wait(lambda: text(chromium, "count") == "6 of 12 answered")
    assert state(chromium)[2] == "Helpfulness" and text(chromium, "status") == "Read 6 answers."
    assert chromium.script("return document.getElementById('name').value") == "R. 1"

    for wrong, said in (
        (half | {"study": "0" * 16}, "it belongs to another study"),
        (None, "it is no export of this page"),
        (half | {"answers": [half["answers"][0]] * 2}, "an answer in it does not fit"),
        (half | {"answers": [half["answers"][0] | {"choice": "A"}]}, "an answer in it does not fit"),
        (half | {"answers": [None]}, "an answer in it does not fit"),
        ("<html>", "it is no JSON file"),
    ):
        file.send_keys(str(save(tmp_path / "wrong.json", wrong)))
        wait(lambda said=said: said in text(chromium, "status"))
        assert text(chromium, "count") == "6 of 12 answered"
        chromium.script("document.getElementById('status').textContent = ''")

    less = save(tmp_path / "less.json", half | {"answers": half["answers"][:2], "annotator": "R. 2"})
    for answer, count in (("dismiss", 6), ("accept", 2)):
        file.send_keys(str(less))
        alert(chromium, answer)
        wait(lambda count=count: text(chromium, "count") == f"{count} of 12 answered")

    # who works on the buttons is taken to the top of the next item
    chromium.script("document.querySelectorAll('.choices button')[3].focus()")
    chromium.press(ENTER)
    assert text(chromium, "place") == "Item 2 of 6" and text(chromium, "count") == "3 of 12 answered"
    assert chromium.script("return document.activeElement.id") == "place"
    chromium.script(
        "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: '1', bubbles: true, repeat: true}))"
    )
    assert text(chromium, "count") == "3 of 12 answered", "a key that is held down is one answer"

    first = chromium.driver.current_window_handle
    chromium.driver.switch_to.new_window("tab")
    chromium.open(page)
    second = chromium.driver.current_window_handle
    wait(lambda: text(chromium, "count") == "3 of 12 answered")
    chromium.press("u")
    chromium.driver.switch_to.window(first)
    wait(lambda: text(chromium, "count") == "2 of 12 answered")  # what another tab has done, before that one is closed
    assert text(chromium, "place") == "Item 2 of 6"
    chromium.driver.switch_to.window(second)
    chromium.driver.close()
    chromium.driver.switch_to.window(first)

    other, _ = study(None, "--seed", 6, "--overwrite")
    chromium.open(other)
    assert text(chromium, "count") == "0 of 12 answered", "another study in the same browser"
    chromium.press("1")
    study(None, "--seed", 5, "--overwrite")

    def opened() -> bool:
        chromium.open(page)
        return text(chromium, "count") == "2 of 12 answered"

    wait(opened)  # on a busy machine what the closed tab has stored comes late
    for answer, count in (("dismiss", 2), ("accept", 0)):
        chromium.driver.find_element("id", "restart").click()
        alert(chromium, answer)
        assert text(chromium, "count") == f"{count} of 12 answered"

    assert not chromium.driver.find_element("id", "warning").is_displayed()
    chromium.press("1")
    chromium.script("localStorage.setItem(arguments[0], '{\"study\": 1')", f"spa-annotate-{key['study']}")
    chromium.driver.refresh()
    assert text(chromium, "count") == "0 of 12 answered", "what can't be read is left alone"
    refuse = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }"
    script = chromium.cdp("Page.addScriptToEvaluateOnNewDocument", {"source": refuse})
    chromium.driver.refresh()
    assert chromium.driver.find_element("id", "warning").is_displayed()
    asks = "const e = new Event('beforeunload', {cancelable: true}); dispatchEvent(e); return e.defaultPrevented"
    assert chromium.script(asks) is False
    chromium.press("1")
    assert text(chromium, "count") == "1 of 12 answered", "it works all the same"
    assert chromium.script(asks) is True, "leaving would lose an answer"
    chromium.press("e", *"R. 3", ENTER, "e")
    assert len(wait_for_file(chromium, "annotate_R_3.json")["answers"]) == 1
    assert chromium.script(asks) is False
    chromium.cdp("Page.removeScriptToEvaluateOnNewDocument", script)
    chromium.driver.refresh()
    assert not chromium.driver.find_element("id", "warning").is_displayed()
    assert chromium.messages() == []


def test_hostile_text_is_shown_and_nothing_runs(study, chromium):
    page, _ = study(HOSTILE)
    chromium.open(page)
    width = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    below = []
    for number, item in enumerate(page_data(page)["items"], 1):
        assert text(chromium, "place") == f"Item {number} of {len(HOSTILE)}"
        for part in ("prompt", "left", "right"):
            assert text(chromium, part) == item[part]
        for columns in (1280, 780, 320, 360):
            chromium.resize(columns)
            scroll, client = chromium.script(width)
            assert scroll == client, f"nothing to scroll sideways at {columns}"
            assert client == columns if columns < 600 else columns - 20 <= client <= columns, "but for the scroll bar"
        chromium.script("scrollTo(0, 10000)")
        below.append(chromium.script("return scrollY"))
        chromium.press("n")
        assert number == len(HOSTILE) or chromium.script("return scrollY") == 0, "each item from its top"
    assert max(below) > 500
    assert chromium.script("return [window.hacked, document.images.length, document.scripts.length]") == [None, 0, 2]
    assert chromium.script("return document.querySelectorAll('[src], [href], [style]').length") == 0
    assert not re.search("innerHTML|outerHTML", page.read_text(encoding="utf-8"))
    assert chromium.script("return performance.getEntriesByType('resource').length") == 0
    assert chromium.messages() == []

    # the two checks above can fail: a word that may not break is too wide, and the policy does forbid
    longest = next(i for i, item in enumerate(page_data(page)["items"]) if "WWW" in item["prompt"])
    for _ in range(len(HOSTILE) - 1 - longest):
        chromium.press("p")
    chromium.script("document.getElementById('prompt').style.overflowWrap = 'normal'")
    scroll, client = chromium.script(width)
    assert scroll > client
    blocked = """
        const done = arguments[0], seen = [];
        document.addEventListener("securitypolicyviolation", (event) => {
          seen.push(event.effectiveDirective);
          if (seen.length === 4) done(seen.sort());
        });
        document.body.setAttribute("style", "color: red");
        const script = document.createElement("script");
        script.textContent = "window.hacked = 6";
        document.body.append(script);
        new Image().src = "data:,";
        fetch("data:,").catch(() => null);
    """
    found = chromium.driver.execute_async_script(blocked)
    assert found == ["connect-src", "img-src", "script-src-elem", "style-src-attr"]
    assert chromium.script("return window.hacked") is None
    chromium.messages()  # reads away what this has caused
