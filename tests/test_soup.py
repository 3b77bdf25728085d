"""eval/soup.py by hand, and appendix E's lemma on scores of any kind."""

import random
from itertools import product

import appendix_e
import soup
import torch
from conftest import make_model, refused

import common


def test_a_soup_by_hand(call, tiny, tmp_path):
    one, other = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([5.0, -2.0])}
    assert soup.mix([one, other], [3, 1], ["a", "b"])["w"].tolist() == [2.0, 1.0]  # (3 · 1 + 5) / 4, (3 · 2 − 2) / 4
    assert one["w"].tolist() == [1.0, 2.0], "the models stay as they were"
    for bad, words in (
        ({"w": torch.zeros(3)}, "b has w of shape (3,), a of (2,)"),
        ({"v": torch.zeros(2)}, "no checkpoints of one base: only one has v, w"),
        ({"w": torch.tensor([1.0, torch.nan])}, "b: w has values that are not finite"),
    ):
        with refused(words):
            soup.mix([one, bad], [1, 1], ["a", "b"])

    base = common.load_model(tiny())
    make_model(base.config.vocab_size, seed=1).save_pretrained(tmp_path / "b")
    command = ("--models", tiny(), tmp_path / "b", "--weights", 1, 3, "--output_dir", tmp_path / "soup")
    assert call("soup", *command)[0] == 0
    states = [common.load_model(str(path)).state_dict() for path in (tiny(), tmp_path / "b", tmp_path / "soup")]
    for name, value in states[2].items():
        torch.testing.assert_close(value, states[0][name] / 4 + states[1][name] * 3 / 4)
    assert common.load_tokenizer(str(tmp_path / "soup")).chat_template
    assert "is complete already" in call("soup", *command)[1]
    code, _, err = call("soup", *command[:5], 2, *command[6:])
    assert code == 2 and "is there, and not made of these" in err
    assert "2 numbers >= 0 are wanted" in call("soup", *command[:4], 1, "--output_dir", "x")[2]


def test_appendix_e():
    """Lemma 1 on scores of any kind: above its bound no order is lost. On the integers 1 to 10, 9 is where ties end."""
    draw = random.Random(0)
    for _ in range(50):
        scores = [(draw.uniform(1, 10), draw.uniform(1, 10)) for _ in range(8)]
        kept, *lost = appendix_e.count_orders(scores, appendix_e.bound(scores) * (1 + 1e-9))
        assert (kept, lost) == (28, [0, 0])
    grid = list(product(range(1, 11), range(1, 11)))
    assert appendix_e.bound(grid) == 20 and appendix_e.count_orders(grid, 20.01) == (4950, 0, 0)
    assert appendix_e.count_orders(grid, 9) == (4941, 9, 0) and appendix_e.count_orders(grid, 9.001) == (4950, 0, 0)
    assert appendix_e.count_orders(grid, 1)[2] == 870, "whose preferred side has the lower total: SPEC, margin >= 2"
