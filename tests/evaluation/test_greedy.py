"""Batches decode as each row alone, and nothing is computed twice: forward passes are counted."""

import families
import pytest
import torch

from spkit.evaluation import greedy
from spkit.evaluation.greedy import GREEDY, continued

PAD, END, STEPS = 0, 2, 9
BEGINNING = [1, 7, 30, 9, 11, 12, 40, 8, 21, 6]
RESTS = [[5, 9], [33], [8, 50, 21, 22, 60, 3], [17], [44, 45, 46, 4], [9, 10], [20, 20, 20, 61, 19]]
ROWS = [BEGINNING + rest for rest in RESTS]
WINDOWS = {"mistral", "gemma2", "gemma3_text", "gemma3"}  # 16 positions, which ROWS exceed


def alone(model, row, ends, steps=STEPS):
    """One row by `generate`, without padding: the ids up to the first that ends it."""
    options = {"max_new_tokens": steps, "pad_token_id": PAD, "eos_token_id": ends or None, **GREEDY}
    ids = torch.tensor([row])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return output[0, len(row) :].tolist()


def together(model, rows, ends, steps=STEPS, pad=PAD):
    """Each row's ids up to the first that ends it; behind that there is padding only."""
    found = []
    for ids in continued(model, rows, pad=pad, ends=ends, max_new_tokens=steps).tolist():
        stop = next((n for n, token in enumerate(ids, start=1) if token in ends), len(ids))
        assert set(ids[stop:]) <= {pad}
        found.append(ids[:stop])
    return found


class Passes:
    """What the model's embedding is given: (rows, positions) of each forward pass."""

    def __init__(self, model):
        self.shapes = []
        embedding = model.get_input_embeddings()
        self.hook = embedding.register_forward_pre_hook(self._seen)

    def _seen(self, module, args):
        self.shapes.append(tuple(args[0].shape))

    def __enter__(self):
        return self.shapes

    def __exit__(self, *error):
        self.hook.remove()


@pytest.fixture(scope="module")
def llama():
    return families.model("llama")


def often(model, rows):
    """An id that ends some rows early and others not at all."""
    said = [alone(model, row, []) for row in rows]
    ends = {i: sum(i in ids[:-1] for ids in said) for ids in said for i in ids}
    return next(i for i, count in sorted(ends.items()) if 1 <= count < len(rows))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_answers_as_one_by_one(family):
    model = families.model(family)
    assert greedy._plain_cache(model, 25) == (family not in WINDOWS)
    for ends in ([], [often(model, ROWS), END]):
        expected = [alone(model, row, ends) for row in ROWS]
        assert len({tuple(ids) for ids in expected}) > 2
        assert together(model, ROWS, ends) == expected
        assert together(model, ROWS[::-1], ends) == expected[::-1]


@pytest.mark.parametrize("family", sorted(WINDOWS))
def test_a_window_that_holds_all_is_none(family):
    model = families.model(family)
    model.config.get_text_config().sliding_window = 96
    ends = [often(model, ROWS), END]
    expected = [alone(model, row, ends) for row in ROWS]
    with Passes(model) as shapes:
        assert together(model, ROWS, ends) == expected
    assert shapes[0] == (1, len(BEGINNING)) and len({rows for rows, _ in shapes[1:]}) > 1
    model.config.get_text_config().sliding_window = longest = max(map(len, ROWS)) + STEPS
    assert not greedy._plain_cache(model, longest) and greedy._plain_cache(model, longest - 1)


def test_what_all_share_is_read_once(llama):
    with Passes(llama) as shapes:
        together(llama, ROWS, [])
    assert shapes[:2] == [(1, len(BEGINNING)), (7, max(map(len, RESTS)))]
    assert shapes[2:] == [(7, 1)] * (STEPS - 1)


def test_rows_that_share_nothing_are_read_whole(llama):
    rows = [*ROWS[:-1], [3, *ROWS[-1][1:]]]
    with Passes(llama) as shapes:
        found = together(llama, rows, [])
    assert shapes[0] == (7, max(map(len, rows))) and len(shapes) == STEPS
    assert found == [alone(llama, row, []) for row in rows]


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        (ROWS, len(BEGINNING)),
        ([BEGINNING, *ROWS], len(BEGINNING) - 1),  # all of one row: its last id is left to it
        ([ROWS[0]] * 5, len(ROWS[0]) - 1),
        ([ROWS[0]], 0),
        (RESTS, 0),
        (ROWS[:4], 0),  # 10 ids of 3 rows would be saved: less than the pass costs
        ([[5], *ROWS], 0),
    ],
)
def test_how_much_is_shared(llama, rows, shared):
    assert greedy._shared(rows) == shared
    assert together(llama, rows, []) == [alone(llama, row, []) for row in rows]


def test_a_row_that_has_ended_is_taken_out(llama):
    end = often(llama, ROWS)
    expected = [alone(llama, row, [end]) for row in ROWS]
    with Passes(llama) as shapes:
        assert together(llama, ROWS, [end]) == expected
    going = [sum(len(ids) > step for ids in expected) for step in range(1, STEPS)]
    assert going[-1] < going[0]  # so some have ended early
    assert shapes[2:] == [(rows, 1) for rows in going if rows]


def test_few_ends_of_many_rows_wait(llama, monkeypatch):
    """Taking rows out costs a copy of the cache: not for each one."""
    end = often(llama, ROWS)
    monkeypatch.setattr(greedy, "LEAVE", 1)  # only when all have ended
    with Passes(llama) as shapes:
        found = together(llama, ROWS, [end])
    assert {rows for rows, _ in shapes[1:]} == {7}
    assert found == [alone(llama, row, [end]) for row in ROWS]


def test_padding_may_be_the_token_that_ends_a_row(llama):
    end = often(llama, ROWS)
    assert together(llama, ROWS, [end], pad=end) == [alone(llama, row, [end]) for row in ROWS]


def test_a_batch_ends_with_its_last_row(llama):
    """All rows end at their first token: one column, and no further pass."""
    first = {ids[0] for ids in (alone(llama, row, []) for row in ROWS)}
    output = continued(llama, ROWS, pad=PAD, ends=sorted(first), max_new_tokens=STEPS)
    assert output.shape == (7, 1) and output.dtype == torch.int64


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "default"])
def test_positions_that_depend_on_the_length_are_never_shared(llama, kind):
    model = families.model("llama")
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": kind}
    assert greedy._plain_cache(model, 25) == (kind == "default")


@pytest.mark.parametrize("own", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_a_checkpoint_that_asks_for_another_cache_gets_it(llama, own):
    model = families.model("llama")
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    with Passes(model) as shapes:
        found = together(model, ROWS, [])
    assert shapes[0] == (7, max(map(len, ROWS)))
    assert found == [alone(llama, row, []) for row in ROWS]
