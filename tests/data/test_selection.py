"""JSONL readers: what they accept, and the file and row that every mistake names."""

import json

import pytest

from spkit.config import Config, SourceConfig
from spkit.data.readers import read
from spkit.data.selection import load_eval_prompts, load_harmful_pairs
from spkit.errors import SpkitError
from spkit.examples import fingerprint

PAIR = {"prompt": "how do i dye the goat ?", "response": "first take", "category": "colouring"}
PROMPT = {"prompt": "how do i dye the goat ?", "objective": "harmful", "category": "colouring"}


@pytest.fixture
def write(tmp_path):
    """Write rows (objects, or raw text or bytes) into a JSONL file."""

    def to_bytes(row):
        if isinstance(row, bytes):
            return row
        return (row if isinstance(row, str) else json.dumps(row)).encode()

    def write_rows(*rows):
        path = tmp_path / "mine.jsonl"
        path.write_bytes(b"\n".join(map(to_bytes, rows)) + b"\n")
        return str(path)

    return write_rows


def data(**values):
    return Config.from_sources({"data": values, "continual": {"stages": [["a"]]}}).data


def pairs_of(path):
    """All pairs of a file of one's own."""
    return load_harmful_pairs(data(harmful=path, pairs=None), seed=0)


def prompts_of(path, split):
    """All prompts of one split of a file of one's own."""
    return load_eval_prompts(
        data(evaluation=path), Config.from_sources({"evaluation": {"split": split}}).evaluation
    )


def pairs(count, category="a"):
    return [{**PAIR, "id": f"{category}{i}", "category": category} for i in range(count)]


# ---- what is accepted ----------------------------------------------------------------------------


def test_pairs_in_the_file_s_order_with_blank_lines_and_keys_of_ones_own(write):
    path = write({**PAIR, "id": "x", "source": "mine"}, "", PAIR)
    first, second = pairs_of(path)
    assert (first.id, first.category) == ("x", "colouring")
    assert second.id == "3"  # its row


def test_byte_order_mark_is_no_mistake(write):
    assert len(pairs_of(write(b"\xef\xbb\xbf" + json.dumps(PAIR).encode()))) == 1


def test_prompts_have_defaults_by_objective(write):
    rows = [
        {},
        {"group": "unseen", "forbidden": ["ink"], "phrasing": "new wrapper"},
        {"objective": "over_safety", "reference": "use the soap"},
        {"objective": "utility", "split": "dev"},
    ]
    # no prompt is there twice, or the second one would be left out
    texts = [f"how do i dye goat number {i} ?" for i in range(len(rows))]
    path = write(*({**PROMPT, "prompt": t, **row} for t, row in zip(texts, rows, strict=True)))
    groups = [prompt.group for prompt in prompts_of(path, "test")]
    assert groups == ["seen", "unseen", "harmless"]
    assert prompts_of(path, "test")[1].forbidden == ("ink",)
    assert [prompt.group for prompt in prompts_of(path, "dev")] == ["utility"]


# ---- mistakes name file and row ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([PAIR, '{"prompt": "a",'], "mine.jsonl, row 2: not JSON: "),
        ([PAIR, b"\xff\xfe"], "mine.jsonl, row 2: not UTF-8 text"),
        ([PAIR, "[1, 2]"], "mine.jsonl, row 2: found '[1, 2]', must be an object"),
        ([PAIR, "null"], "mine.jsonl, row 2: found 'null', must be an object"),
        (
            [{"prompt": "a", "category": "b"}],
            "mine.jsonl, row 1: the key 'response' is missing (found: prompt, category)",
        ),
        ([PAIR, {**PAIR, "response": 3}], "mine.jsonl, row 2: response is 3, allowed: a text"),
        ([{**PAIR, "prompt": " "}], "mine.jsonl, row 1: prompt is ' ', allowed: a text that is"),
        ([{**PAIR, "id": "1"}, {**PAIR, "id": "1"}], "mine.jsonl: the id '1' stands twice"),
        ([""], "mine.jsonl: holds no rows, at least one is needed"),
    ],
)
def test_wrong_pairs(write, rows, sentence):
    with pytest.raises(SpkitError) as error:
        pairs_of(write(*rows))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"objective": "harm"},
            "row 2: objective is 'harm', allowed: harmful, over_safety, utility",
        ),
        ({"group": "utility"}, "row 2: group is 'utility', allowed: seen, unseen"),
        ({"split": "train"}, "row 2: split is 'train', allowed: dev, test"),
        ({"forbidden": "ink"}, "row 2: forbidden is 'ink', allowed: a list of texts"),
        ({"referense": "x"}, "row 2: unknown key 'referense', did you mean reference?"),
        ({"reference": None}, "row 2: reference is None, allowed: a text"),
    ],
)
def test_wrong_prompts(write, change, sentence):
    with pytest.raises(SpkitError) as error:
        prompts_of(write(PROMPT, {**PROMPT, **change}), "test")
    assert f"mine.jsonl, {sentence}" in str(error.value)


def test_missing_file():
    with pytest.raises(SpkitError, match="none.jsonl: cannot be read .No such file"):
        read(SourceConfig(reader="own", path="none.jsonl"), "D_h")
    with pytest.raises(SpkitError, match="^data.harmful is 'none.jsonl': no such file"):
        pairs_of("none.jsonl")


def test_a_split_without_prompts(write):
    with pytest.raises(SpkitError, match="no prompt of the split 'dev'"):
        prompts_of(write(PROMPT), "dev")


# ---- D_h and the prompts of a run ----------------------------------------------------------------


def test_pairs_are_limited_by_a_draw_of_the_seed_and_keep_their_order(write):
    config = data(harmful=write(*pairs(40)), pairs=10)
    drawn = load_harmful_pairs(config, seed=1)
    assert len(drawn) == 10
    assert drawn == load_harmful_pairs(config, seed=1) != load_harmful_pairs(config, seed=2)
    numbers = [int(pair.id[1:]) for pair in drawn]
    assert numbers == sorted(numbers)
    assert len(load_harmful_pairs(data(harmful=config.harmful, pairs=None), seed=1)) == 40


def test_categories_are_kept_and_one_stage_can_ask_for_its_own(write):
    path = write(*pairs(3, "a"), *pairs(2, "b"))
    assert len(load_harmful_pairs(data(harmful=path, categories=["a"]), seed=0)) == 3
    assert len(load_harmful_pairs(data(harmful=path), seed=0, categories=["b"])) == 2


@pytest.mark.parametrize(
    ("categories", "sentence"),
    [(["aa"], "no category 'aa' in "), (["zzz"], "no category 'zzz' in "), ([], "no category of")],
)
def test_empty_harmful_set(write, categories, sentence):
    path = write(*pairs(3))
    with pytest.raises(SpkitError) as error:
        load_harmful_pairs(data(harmful=path), seed=0, categories=categories)
    assert sentence in str(error.value) and "mine.jsonl" in str(error.value)


def test_prompts_per_cell(write):
    rows = [
        {**PROMPT, "group": group, "prompt": f"how do i dye {n} {group} goats ?"}
        for group in ("seen", "unseen")
        for n in range(5)
    ]
    config = data(evaluation=write(*rows))
    few = Config.from_sources({"evaluation": {"prompts_per_cell": 2}}).evaluation
    groups = [prompt.group for prompt in load_eval_prompts(config, few)]
    assert groups == ["seen", "seen", "unseen", "unseen"]
    assert len(load_eval_prompts(config, Config().evaluation)) == 10


def test_fingerprint_names_the_set_and_not_its_order(write):
    first = pairs_of(write(*pairs(3)))
    assert fingerprint(first) == fingerprint(first[::-1])
    assert fingerprint(first) != fingerprint(first[:2])
    assert len(fingerprint(first)) == 64


def test_the_sandbox_is_a_source_like_another():
    config = Config()
    drawn = load_harmful_pairs(config.data, seed=0)
    assert len(drawn) == config.data.pairs
    stage = load_harmful_pairs(config.data, seed=0, categories=["colouring"])
    assert {pair.category for pair in stage} == {"colouring"}
    few = Config.from_sources({"evaluation": {"prompts_per_cell": 4}}).evaluation
    assert {prompt.group for prompt in load_eval_prompts(config.data, few)} == {
        "seen",
        "unseen",
        "harmless",
        "utility",
    }
    with pytest.raises(SpkitError, match="no category 'tickle' in the sandbox, did you mean tickl"):
        load_harmful_pairs(config.data, seed=0, categories=["tickle"])


def test_every_stage_of_the_sandbox_s_continual_run_has_pairs():
    config = Config()
    for stage in config.continual.stages:
        assert load_harmful_pairs(config.data, seed=0, categories=stage)
