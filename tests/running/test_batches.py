"""The batches that the predictor of memory counts are those that the stages form."""

import json
from dataclasses import replace
from itertools import islice

import pytest
import tiny

from spkit.config import Config
from spkit.data.selection import load_eval_prompts, load_harmful_pairs
from spkit.evaluation import answers
from spkit.evaluation.utility.likelihood import perplexity_texts
from spkit.method.balancing import AT_ONCE
from spkit.method.importance import Calibration
from spkit.method.training import TrainingSet, _endless
from spkit.models.chat import IGNORE, collate, encode_pair
from spkit.models.loading import load_tokenizer
from spkit.running import memory
from spkit.running.batches import read
from spkit.running.shape import shape_of
from spkit.running.sizes import Batch, Batches


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A backbone and texts of one's own; lengths differ."""
    folder = tmp_path_factory.mktemp("own")
    tiny.save(folder / "model", "llama")
    words = " ".join(text for pair in tiny.PAIRS for text in pair).split()
    rows = {
        "pairs": [
            {"prompt": said(words, 3 + i % 5), "response": said(words, 1 + i), "category": "any"}
            for i in range(9)
        ],
        "prompts": [
            {"prompt": said(words, 2 + i), "objective": "harmful", "category": "any"}
            for i in range(7)
        ],
        "texts": [{"text": said(words, 4 * i + 2)} for i in range(5)],
    }
    for name, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def said(words, count):
    return " ".join(words[i % len(words)] for i in range(count))


def config(folder, **over):
    values = {
        "backbone.source": str(folder / "model"),
        "data.harmful": str(folder / "pairs.jsonl"),
        "data.evaluation": [str(folder / "prompts.jsonl")],
        "data.dev_share": 0.1,
        "data.wrappers": "none",
        "utility.perplexity": str(folder / "texts.jsonl"),
        "utility.batch_size": 2,
        "derivation.ascent.batch_size": 4,
        "derivation.descent.batch_size": 3,
        "derivation.micro_batch_size": 3,
        "importance.samples": 6,
        "importance.batch_size": 4,
        "evaluation.batch_size": 3,
    }
    return Config.from_sources({}, values | {key.replace("__", "."): v for key, v in over.items()})


def batch_of(collated):
    counted = int((collated["labels"] != IGNORE).sum())
    return Batch(*collated["input_ids"].shape, counted)


@pytest.mark.parametrize("max_tokens, at_once", [(None, 3), (16, None)])
def test_they_are_what_the_stages_form(own, max_tokens, at_once):
    used = config(own, data__max_tokens=max_tokens, derivation__micro_batch_size=at_once)
    found, tokenizer = read(used), load_tokenizer(own / "model")
    pairs = load_harmful_pairs(used.data, seed=used.seed)
    encoded = TrainingSet.of(tokenizer, pairs, max_tokens).encoded

    trained = set()
    for settings in (used.derivation.ascent, used.derivation.descent):
        drawn = _endless(encoded, settings.batch_size, used.seed)
        for indices in islice(drawn, settings.max_steps + 1):
            size = at_once or settings.batch_size
            parts = (indices[i : i + size] for i in range(0, len(indices), size))
            trained |= {batch_of(collate([encoded[i] for i in part], 0)) for part in parts}
    assert set(found.derivation) == trained and len(trained) > 3

    scored = Calibration(pairs, used.importance, used.seed, max_tokens)
    assert found.importance == tuple(map(batch_of, scored.batches(tokenizer)))
    first = [batch_of(batch) for batch in scored.answers(tokenizer, AT_ONCE)]
    assert found.balance == tuple(Batch(b.rows, b.width, b.rows) for b in first)

    prompts = load_eval_prompts(used.data, used.evaluation)
    ids = answers.check_prompts(tokenizer, [p.prompt for p in prompts], 1)
    asked = [list(batch.values()) for batch in answers._batches(ids, 3)]
    assert found.evaluation == tuple(Batch(len(b), max(map(len, b)), 0) for b in asked)
    lengths = sorted(
        len(tokenizer.encode(t, add_special_tokens=False)) for t in perplexity_texts(used)
    )
    begins = int(tokenizer.bos_token_id is not None)
    assert [b.width - begins for b in found.texts] == [lengths[1], lengths[3], lengths[4]]


def test_the_sandbox_and_all_stages_of_continual_psa():
    found = read(Config())
    longest = max(b.width for b in found.derivation)
    assert found.derivation and longest < memory.SANDBOX_TOKENS
    staged = read(Config(), continual=True)
    stages = len(Config().continual.stages)
    assert len(staged.importance) == stages * len(found.importance)


def test_answers_that_are_still_to_be_said_count_as_long_as_they_may_be(own):
    used = config(own, data__responses="unaligned", data__response_tokens=50)
    tokenizer = load_tokenizer(own / "model")
    asked = [encode_pair(tokenizer, p.prompt, "x")[1].count(IGNORE) for p in pairs_of(own)]
    found = read(used)
    assert max(b.width for b in found.derivation) == max(asked) + 50
    assert {b.counted // b.rows for b in found.importance} == {50}


def pairs_of(folder):
    return load_harmful_pairs(config(folder).data, seed=0)


@pytest.mark.parametrize(
    "over",
    [
        {"backbone__source": "nobody/nothing"},
        {"data__harmful": "advbench"},  # on the hub
        {"utility__perplexity": "missing.jsonl"},
    ],
)
def test_without_the_texts_the_greatest_length_is_taken_and_said(own, over, monkeypatch):
    monkeypatch.setattr("spkit.system.hub.problem", lambda *_: "not asked")
    used = config(own, data__max_tokens=300, **over)
    assert read(used) is None
    assert memory.lengths(used, None).endswith("each is counted as 300 tokens (data.max_tokens)")
    known = read(config(own, data__max_tokens=300))
    longest = max(b.width for b in known.derivation)
    assert f"the longest pair has {longest} tokens" in memory.lengths(used, known)


def test_the_largest_batch_counts_and_only_what_counts_gets_logits(own):
    used = config(own)
    shape = shape_of(used)
    small, long, wide = Batch(1, 5, 2), Batch(2, 40, 3), Batch(2, 10, 18)
    one = (small,)

    def predicted(batches, stage="derivation", of=shape):
        known = Batches(batches, batches, batches, batches, batches)
        frame = memory.predict(used, of, stage, "cpu", known=known)
        return frame["host GiB"]

    assert predicted((small, long, wide)).equals(predicted((long,)))
    assert predicted((long,))["peak"] > predicted((wide,))["peak"] > predicted(one)["peak"]
    large = replace(shape, vocabulary=100_000)
    found = predicted((small, long, wide), of=large)  # logits of 18 tokens are most now
    assert found["logits and loss"] * memory.GIB == pytest.approx(18 * 100_000 * 3 * 4)
    whole = replace(shape, vocabulary=memory.SMALL_HEAD - 1)  # a small head is not cut
    assert memory.Sizes(used, whole, "cpu").loss(wide) == 20 * (memory.SMALL_HEAD - 1) * 12


def test_the_model_that_answers_has_a_dtype_of_its_own(own):
    shape = shape_of(config(own))
    own_bytes = {
        dtype: memory.predict(
            config(own, backbone__compute_dtype="float32", evaluation__dtype=dtype),
            shape,
            "evaluation",
            "cpu",
        ).loc["backbone", "host GiB"]
        for dtype in (None, "bfloat16")
    }
    assert own_bytes[None] == 2 * own_bytes["bfloat16"]
