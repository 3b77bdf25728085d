"""The readers of a judge's free answers: answers built from parts, together with what they say by the written rules.

The rules: what stands in thoughts is no answer. Of the rest, the JSON objects that have all names count, and must
agree; else the last mention of each name. What is no score from 1 to 10, or stands twice in an object, is null.
No reader is asked what is right. READERS=1000000 tries that many answers in place of CI's, READERS_SEED=1 others.
"""

import contextlib
import itertools
import json
import os
import random
import re
import time

import mtbench
import pairwise
import pytest

import common

CASES, SEED = int(os.environ.get("READERS", "6000")), int(os.environ.get("READERS_SEED", "0"))
NAMES, CASE = ["Harmlessness", "Helpfulness"], [str, str.lower, str.upper]
split, LONG = re.compile("[¦\n]").split, "9" * 5000

# values in JSON, and behind "Name:" in a line: those with their meaning, and those that are no score
WHOLE = {str(k): k for k in range(1, 11)}
RIGHT = WHOLE | {'"7"': 7, "7.0": 7, "7.5": 7.5, '"9/10"': 9, '" 6 out of 10"': 6, '"2.5"': 2.5}
WRONG = split(r"""null¦true¦0¦11¦-5¦1e1¦[8]¦{"score": 8}¦"8%"¦"1-10"¦"7,5"¦""¦"ten"¦0.99¦10.01¦1e999¦"8 or 9"¦"8 points"
"\n1. It is safe"¦"A"¦"10.5"¦"4/5"¦"8/100"¦"-8"¦"+8"¦" "¦"8 9"¦"8.5.1"¦NaN¦Infinity""")
SAID = WHOLE | {"7.5": 7.5, "8.0": 8, "9/10": 9, "3 / 10": 3, "6 out of 10": 6, "2 out of ten": 2, "4 (out of 10)": 4}
ENDS = split(""" ¦.¦,¦**¦",¦; fine¦, which is fine¦ - it is safe¦ (good)¦ — safe¦. It is¦}¦ |¦""")
NOT_SAID = split("""1-10¦1 to 10¦7-8¦7–8¦9 or 10¦4/5¦8/100¦8%¦7,5¦1,000¦5+3¦8.5.1¦7.5pts¦3 points matter¦8 / 10 / 3¦8x
1e1¦+8¦08:15¦N/A¦ten¦10-1¦8/10%¦8 to 9¦~8¦99¦7 7¦(8)(9)¦8, 9¦8 (9)¦8 (or 9)¦8, perhaps 9¦8; 9¦8, no, 9¦8 | 9¦8 - 9¦0
11¦-5¦good¦8²¦8/10, 9/10¦SCORE (integer from 1-10)¦8 out of 100¦[8]¦4 (out of 5)¦4, out of 5""")
OPTIONS = {"A": 0, "b": 1, "B": 1, "tie": 2, "Response A": 0, "response B": 1, "TIE": 2}
NO_OPTIONS = split("both¦A/B¦A or B¦Always A¦a tie¦A-B¦C¦A & B¦AB¦tied¦B, A¦A (or B)¦neither¦A is worse¦")
# what stands around an answer and says nothing, although a careless reader could take it for something
PROSE = split(r"""Sure! Here are my scores.¦It is 5" tall¦{braces} {¦"quoted¦\boxed{}¦}}} ]] {{¦Scale: 1-10, 4/5¦- 7
```json¦Unhelpfulness: 2¦Harmlessness is 3 here, Helpfulness 4¦Dis-Helpfulness: 3; un-harmlessness: 1¦preHarmlessness: 9
{"a": "¦Helpfulness2: 4¦see [3] and [[rating]]¦{"a": [1, {"b": null}], "c": 1e999}¦ß é 日本語 🙂¦{"note": "a {b} \" }c"}
{"quote": "{\"Harmlessness\": 1}"}¦1. First, 2. second¦the better of the two¦İıſK¦rating of sorts¦| 8 | 7 |¦<b>8</b>
A or B? tie!¦\n \" \¦'it' `is`¦""")
PROSE += [LONG, "\r\n\t\xa0", "\0\ufeff\u202e", '{"a":' * 9, "[" * 99]
EXTRA = split(r"""Reason@"a } and { \" of {it}"¦more@{"Harmlessness": 3}¦list@[1, {"a": {}}]¦unhelpfulness@2¦é@0
Harmlessness score@2¦text@"Helpfulness is 2\n" """)
WRONG, NOT_SAID, EXTRA = [*WRONG, LONG], [*NOT_SAID, LONG, "\n1. It is safe"], [*EXTRA, f"a@{LONG}", 'b@"two\nlines"']
# parts of which a long text may make a careless reader slow
WORST = split(r"""{¦{}¦[¦{"a": 1, ¦{"a":¦{"¦{"\"¦{"{" ¦"}{"¦{"a":[¦{"a{"¦ ¦Harmlessness¦Harmlessness: 8 ¦Harmlessness  |
{"Harmlessness": 8, "Helpfulness": 7}¦"Harmlessness": 8,¦8 out of ¦*¦"¦\¦1¦1.¦w-¦or 8 ¦[[¦[[1¦[[1]] ¦rating [¦better: A
,¦</think>¦<think>""")


def value(rng, right: dict, wrong: list) -> tuple:
    """(a spelling, its meaning), of a value that is right in nine of ten cases."""
    text = rng.choice(list(right) if rng.random() < 0.9 else wrong)
    return text, right.get(text)


def say(rng, parts: list[str]) -> str:
    """The parts in order, each on lines of its own, prose between them."""
    return "\n".join(line for part in [*parts, ""] for line in (*rng.sample(PROSE, rng.randint(0, 1)), part))


def json_object(rng, items: list[tuple[str, str]]) -> str:
    """{…} of (key, JSON value) pairs and others, in several layouts, bare or inside of something."""
    items = [*items, *(field.split("@") for field in rng.sample(EXTRA, rng.randint(0, 2)))]
    comma, colon = rng.choice([", ", ",\n    ", ","]), rng.choice([": ", ":", " :\t"])
    fields = comma.join(json.dumps(key) + colon + text for key, text in rng.sample(items, len(items)))
    around = rng.choice(["¦", "¦", "¦", "```json\n¦\n```", '{"scores": ¦}', "\\boxed{¦}", "[¦, 1]", '{5" ¦', "<¦>."])
    return around.replace("¦", f"{{{rng.choice(['', ' '])}{fields}\n}}")


def scores_object(rng, meant: list | None) -> tuple[str, list[list]]:
    """(an object with all names, what it and one inside of it say), each as `meant` where that is given."""
    pairs = [(json.dumps(one), one) for one in meant] if meant else [value(rng, RIGHT, WRONG) for _ in NAMES]
    items = [(rng.choice(CASE)(name), text) for name, (text, _) in zip(NAMES, pairs, strict=True)]
    objects = [[one for _, one in pairs]]
    if rng.random() < 0.1:
        objects.append(rng.choice([[1, 2], meant or [3, 4]]))
        items.append(("draft", json.dumps([dict(zip(NAMES, objects[1], strict=True))])))
    if rng.random() < 0.05:  # a name twice
        objects[0], twice = [None, None], rng.choice(NAMES)
        items.append((f" {twice}", rng.choice(list(RIGHT))))
    return json_object(rng, items), objects


def scores_line(rng) -> tuple[str, tuple]:
    """(a line that mentions a name, (which name, what it says))."""
    i = rng.randrange(2)
    if rng.random() < 0.2:  # an object that lacks a name, is cut, or is not quite JSON
        text, meant = value(rng, RIGHT, ["null", "11", "[8]", '"8%"', '"8 or 9"'])
        form = rng.choice(split("{%s: %s¦{'a': 1, %s: %s}¦{%s: %s,}¦{%s: %s} // half¦{%s: %s, …}¦{{%s: %s}}"))
        return form % (json.dumps(rng.choice(CASE)(NAMES[i])), text), (i, meant)
    text, meant = value(rng, SAID, NOT_SAID)
    text += rng.choice(ENDS) if meant is not None else ""
    lead, mark = rng.choice(["", "- ", "1. ", "Overall ", "(", "> "]), rng.choice(["", "**", "*", "`", '"', "“"])
    colon = rng.choice([": ", ":", " = ", ":\xa0", "："])
    return f"{lead}{mark}{rng.choice(CASE)(NAMES[i])}{mark}{colon}{rng.choice(['', mark])}{text}", (i, meant)


def scores_answer(rng) -> tuple[str, list | None]:
    lines = [scores_line(rng) for _ in range(rng.randint(0, 4))]
    said = [line for line, _ in lines]
    if rng.random() < 0.55:
        first, found = scores_object(rng, None)
        meant = None if None in found[0] or rng.random() < 0.2 else found[0]  # of the further objects
        for text, objects in [scores_object(rng, meant) for _ in range(rng.randint(0, 2))]:
            said, found = [*said, text], found + objects
        right = None not in found[0] and all(one == found[0] for one in found)
        return say(rng, rng.sample(said := [*said, first], len(said))), found[0] if right else None
    last = dict(pair for _, pair in lines)
    return say(rng, said), None if None in (last.get(0), last.get(1)) else [last[0], last[1]]


def verdict_answer(rng) -> tuple[str, int | None]:
    parts, objects, named, only = [], [], [], rng.choice([*OPTIONS, None])  # None: anything
    for _ in range(rng.randint(0, 3)):
        text, meant = (only, OPTIONS[only]) if only else value(rng, OPTIONS, [*NO_OPTIONS, None, 1, True])
        if rng.random() < 0.5:
            parts.append(json_object(rng, [(rng.choice(CASE)("better"), json.dumps(text))]))
            objects.append(meant)
        else:
            mark, colon = rng.choice(["", "**", "'", '"']), rng.choice([": ", "=", ":"])
            end = rng.choice(["", ".", ", since it is safe", " (it is safe)", "\r"]) if meant is not None else ""
            parts.append(f"{mark}{rng.choice(CASE)('better')}{mark}{colon}{mark}{text}{mark}{end}")
        named.append(meant)
    found = {*(objects or named[-1:]), *(one for one in named if one is not None)}
    return say(rng, parts), found.pop() if len(found) == 1 else None


def rating_answer(rng) -> tuple[str, float | None]:
    right, wrong = WHOLE | {"5.5": 5.5, "7.0": 7, "8.": 8, " 9 ": 9}, split("0¦11¦-3¦7-8¦8/10¦1e1¦8, 9¦8%¦7 or 8")
    pairs = [value(rng, right, [*wrong, LONG]) for _ in range(rng.randint(0, 3))]
    pairs = pairs[:1] * len(pairs) if rng.random() < 0.6 else pairs
    form = rng.choice(["[[%s]]", "Rating: [[%s]]", "**Rating**: [[%s]]/10", "Rating: [%s]"])
    parts, found = [form % text for text, _ in pairs], {meant for _, meant in pairs}
    if "[[" in form and parts:  # then single brackets don't count
        parts += rng.sample(["Rating: [3]", "x = [4]", "[[rating]]", "[[ ]]"], rng.randint(0, 2))
    return say(rng, parts), found.pop() if len(found) == 1 else None


READERS = {verdict_answer: pairwise.parse_verdict, rating_answer: mtbench.parse_rating}
READERS[scores_answer] = lambda text: common.parse_scores(text, NAMES)


@pytest.mark.parametrize("make", READERS)
def test_answers_are_read_as_the_rules_say(make):
    """FAULTS 10, 11, 12, 13: thoughts, decoys, several answers, names inside words, values that are none."""
    read, rng, count = READERS[make], random.Random(SEED), 0
    for _ in range(CASES // 3):
        text, meant = make(rng)
        thought = "\n".join(make(rng)[0] for _ in range(rng.randint(1, 2)))
        lost = rng.random() < 0.02  # a thought without an end
        ways = ["", "", f"<think>{thought}</think>", f"{thought}\n</think>\n", f"<think>a</think>{thought}</think>"]
        text = ("<think>" if lost else rng.choice(ways)) + text + rng.choice(["", "", f"\n<think>{thought}"])
        assert json.dumps(read(text)) == json.dumps(None if lost else meant), text
        count += meant is not None
    assert 0.2 < count / (CASES // 3) < 0.8, "there are answers of both kinds"


@pytest.mark.parametrize(
    ("text", "names", "scores"),
    [
        ("Harmlessness: 8 out of 10. Helpfulness: 7 out of ten.", NAMES, [8, 7]),
        ('{"Harmlessness": 8, "Helpfulness": 7', NAMES, [8, 7]),
        ("Unharmlessness: 2, Harmlessness: 8, Unhelpfulness: 1, Helpfulness: 9", NAMES, [8, 9]),
        ("Support: 8\nEmotional support: 3\nſupport: 8", ["Support", "Emotional support"], [8, 3]),
    ],
)
def test_names_that_share_a_line_or_an_end(text, names, scores):
    """FAULTS 12: the longer name counts; a letter that only folds to one of a name's is no crash."""
    assert common.parse_scores(text, names) == scores


def test_any_text_is_read_without_an_error():
    """FAULTS 11: and objects are found where a plain, slow reading finds them."""
    rng, slow, count = random.Random(SEED), [], 0
    words = split(r"""{¦{¦}¦}¦"¦"¦[¦]¦:¦,¦\¦ ¦{"a": {¦"b": "¦{"c": ¦better: A¦[[7]]¦Harmlessneſs: 8¦</think>¦better: tıe
{"Harmlessness": 8, ¦{"Harmlessness": 8, ¦"Helpfulness": 7}¦"Helpfulness": 2}¦ or ¦/10¦1¦=""")

    def collect(pairs):
        values = [[str(value) for key, value in pairs if key == name] for name in NAMES]
        slow.extend([tuple(one[0] if len(one) == 1 and one[0] in "278" else None for one in values)] * all(values))

    for _ in range(CASES):
        text = "".join(rng.choices(words, k=rng.randint(1, 25)))
        for read in READERS.values():
            read(text)
        shown, start = text.rpartition("</think>")[2], -1
        slow.clear()
        while (start := shown.find("{", start + 1)) >= 0:
            with contextlib.suppress(ValueError):
                start = json.JSONDecoder(object_pairs_hook=collect, strict=False).raw_decode(shown, start)[1] - 1
        assert set(map(tuple, common.read_fields(text, NAMES, common.NUMBER)[0])) == set(slow), text
        count += bool(slow)
    assert count > 0.01 * CASES, "there are objects"


@pytest.mark.parametrize("unit", [*WORST, "\n"])
def test_time_grows_with_the_length_of_the_text(unit):
    """FAULTS 11, section 4: not with its square, whatever stands in it; up to a million characters with READERS."""
    lengths = (10_000, 1_000_000) if CASES > 100_000 else (2_000, 20_000)
    starts = split("""{¦Harmlessness: 8¦Harmlessness: 8, ¦{"Harmlessness": ¦{"a": "¦[[¦better: A¦""")
    for before, after in itertools.product(starts, ("", '"}', "x]]")):
        times = []
        for length in lengths:
            start, text = time.process_time(), before + unit * (length // len(unit)) + after
            for read in READERS.values():
                read(text)
            times.append(time.process_time() - start)
        assert times[1] < 0.1 + 4 * times[0] * lengths[1] / lengths[0], (before, after, times)
