"""Generation against a greedy loop written out; rates and intervals against counts by hand."""

import json
from math import isnan, sqrt
from statistics import NormalDist

import pandas as pd
import pytest
import tiny
import torch
from transformers import AddedToken

from spkit.config import Config
from spkit.errors import SpkitError
from spkit.evaluation import greedy as greedy_decoding
from spkit.evaluation.answers import (
    decoding,
    end_tokens,
    evaluate,
    generate,
    read_answers,
    respond,
)
from spkit.evaluation.greedy import GREEDY
from spkit.evaluation.rates import COLUMNS, headline, rate_row, rates
from spkit.evaluation.verdicts import METRICS, VERDICTS
from spkit.examples import EvalPrompt
from spkit.models.chat import encode_prompt

TOKENIZER = tiny.tokenizer()
PROMPTS = [  # of lengths 3, 1, 9, 1, 6, 2, 12: out of order, so that sorting them is undone
    "mend a boat",
    "paint",
    "how do i take the old net and then",
    "boat",
    "use paint and mend the fence",
    "no sorry",
    "first take the net and then use the old paint no sorry",
]
STEPS = 7


@pytest.fixture(scope="module")
def llama():
    return tiny.model("llama")


def greedy(model, prompt, steps=STEPS, end=TOKENIZER.eos_token_id):
    """One prompt alone, without padding, mask, cache or `generate`: the likeliest token each time.

    (answer, the smallest lead of a chosen token): a lead near 0 would make the comparison a toss.
    """
    ids, lead = encode_prompt(TOKENIZER, prompt), float("inf")
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            best = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
        if ids[-1] == end:
            break
    return TOKENIZER.decode(ids[start:], skip_special_tokens=True).strip(), lead


def answers(model, batch_size, prompts=PROMPTS, steps=STEPS):
    return generate(model, TOKENIZER, prompts, max_new_tokens=steps, batch_size=batch_size)


# ---- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batches_answer_as_one_by_one(llama, batch_size):
    expected, leads = zip(*(greedy(llama, prompt) for prompt in PROMPTS), strict=True)
    assert min(leads) > 1e-3
    assert len(set(expected)) == len(PROMPTS)  # so that an exchange of two would be seen
    assert answers(llama, batch_size) == list(expected)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_takes_the_padding(architecture):
    model = tiny.model(architecture, seed=1)
    assert answers(model, 4) == [greedy(model, prompt)[0] for prompt in PROMPTS]


def test_an_answer_ends_at_the_end_of_its_turn(llama):
    """Rows of a batch end at different steps; the padding behind an early end is no answer."""
    long = [greedy(llama, prompt)[0].split() for prompt in PROMPTS]
    # a word that some answers hold and others do not takes the part of the end of the turn
    word = next(w for w in tiny.SENTENCE.split() if 2 <= sum(w in a[:-1] for a in long) <= 5)
    model = tiny.model("llama")
    model.generation_config.eos_token_id = end = TOKENIZER.convert_tokens_to_ids(word)
    expected = [greedy(model, prompt, end=end)[0] for prompt in PROMPTS]
    assert len({len(answer.split()) for answer in expected}) > 1
    assert answers(model, 3) == expected


def test_special_tokens_are_no_part_of_an_answer(llama):
    model = tiny.model("llama")
    word = greedy(llama, PROMPTS[0])[0].split()[0]
    with torch.no_grad():  # the likeliest first token is now the end of the turn
        rows = model.lm_head.weight
        rows[TOKENIZER.eos_token_id] = 1.5 * rows[TOKENIZER.convert_tokens_to_ids(word)]
    assert answers(model, 1, PROMPTS[:1]) == [""]


def test_white_space_around_an_answer_is_no_part_of_it(llama):
    """Byte-level tokenizers begin a word with its space; this one knows none, so it is added."""
    tokenizer = tiny.tokenizer()
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, **options: f" {decode(ids, **options)}\n"
    spaced = generate(llama, tokenizer, PROMPTS, max_new_tokens=STEPS, batch_size=3)
    assert spaced == answers(llama, 3)


def test_generation_is_greedy_whatever_the_checkpoint_asks_for(llama):
    """LLaMA-2's own generation_config samples; two evaluations must agree all the same."""
    model = tiny.model("llama")
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    assert answers(model, 3) == answers(llama, 3)


def ids(*words):
    return TOKENIZER.convert_tokens_to_ids(list(words))


# what a checkpoint's own generation_config may hold, that would change greedy answers
OWN_SETTINGS = {
    "do_sample": {"do_sample": True, "temperature": 9.0},
    "num_beams": {"num_beams": 4},
    "repetition_penalty": {"repetition_penalty": 9.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 9.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[word] for word in ids(*tiny.SENTENCE.split()[:8])]},
    "suppress_tokens": {"suppress_tokens": ids(*tiny.SENTENCE.split()[:8])},
    "begin_suppress_tokens": {"begin_suppress_tokens": ids(*tiny.SENTENCE.split()[:8])},
    "sequence_bias": {"sequence_bias": [[ids("boat"), 99.0]]},
    "forced_eos_token_id": {"forced_eos_token_id": ids("boat")[0]},
}


@pytest.mark.parametrize("key", OWN_SETTINGS)
def test_no_setting_of_a_checkpoint_changes_an_answer(llama, key, monkeypatch):
    model = tiny.model("llama")
    for name, value in OWN_SETTINGS[key].items():
        setattr(model.generation_config, name, value)
    assert answers(model, 3) == answers(llama, 3)
    open_to_it = {name: value for name, value in GREEDY.items() if name not in OWN_SETTINGS[key]}
    monkeypatch.setattr(greedy_decoding, "GREEDY", open_to_it)
    monkeypatch.setattr(greedy_decoding, "_plain_cache", lambda *of: False)  # beams change it
    assert answers(model, 3) != answers(llama, 3)  # so the setting is not without effect


def test_how_answers_are_decoded_is_on_record():
    config = Config.from_sources({"evaluation": {"max_new_tokens": 5, "batch_size": 2}})
    assert decoding(config) == {
        **{"do_sample": False, "num_beams": 1, "max_new_tokens": 5, "batch_size": 2}
    }


def turn_tokenizer(end="' <user>'"):
    """As LLaMA-3's: what ends a turn is a special token, but not the tokenizer's eos."""
    tokenizer = tiny.tokenizer(tiny.TEMPLATE.replace("' ' + eos_token", end))
    tokenizer.add_tokens([AddedToken("<user>", special=True)])
    return tokenizer


def test_an_answer_ends_wherever_one_can_end():
    """The tokenizer ends a text, the chat format a turn, the checkpoint names a third."""
    model, tokenizer = tiny.model("llama"), turn_tokenizer()
    text, turn, boat, net = ids("</s>", "<user>", "boat", "net")
    assert turn not in tokenizer.all_special_ids
    for own, expected in (
        (None, [text, turn]),
        (boat, [boat, text, turn]),
        ([net, boat, text], [net, boat, text, turn]),
    ):
        model.generation_config.eos_token_id = own
        assert end_tokens(model, tokenizer) == expected
        assert end_tokens(model, tokenizer, chat=False) == expected[:-1]
    model.generation_config.eos_token_id = None
    # Phi-3 ends the turn, then the text; a format may also end a turn with nothing
    assert end_tokens(model, turn_tokenizer("' <user> ' + eos_token")) == [text, turn]
    assert end_tokens(model, turn_tokenizer("''")) == [text]  # and not the unknown word "b"


@pytest.mark.parametrize("own", [None, "boat", ["net", "boat"]])
def test_generation_stops_at_the_end_of_a_turn(llama, own):
    """The likeliest first token is what ends a turn in the chat format, or by the checkpoint."""
    model = tiny.model("llama")
    word = greedy(llama, PROMPTS[0])[0].split()[0]
    end = "<user>" if own is None else "boat"
    with torch.no_grad():
        rows = model.lm_head.weight
        rows[ids(end)[0]] = 1.5 * rows[ids(word)[0]]
    if own is not None:
        model.generation_config.eos_token_id = ids(*([own] if isinstance(own, str) else own))
    tokenizer = turn_tokenizer()
    stopped = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=STEPS, batch_size=1)
    assert stopped == ["" if own is None else "boat"]


def test_the_number_of_new_tokens_is_kept(llama):
    one = answers(llama, 3, steps=1)
    assert one == [greedy(llama, prompt, steps=1)[0] for prompt in PROMPTS]
    assert {len(answer.split()) for answer in one} <= {0, 1}


# ---- evaluate ------------------------------------------------------------------------------------


def asked(prompt, **fields):
    return EvalPrompt(
        **{
            "id": f"id of {prompt}",
            "prompt": prompt,
            "objective": "harmful",
            "group": "seen",
            "category": "boats",
            "phrasing": "plain",
            "reference": "",
            **fields,
        }
    )


def test_a_row_per_prompt_in_their_order(llama):
    given = [asked(prompt, category=f"c{i}") for i, prompt in enumerate(PROMPTS)]
    given[1] = asked(
        "paint", objective="utility", group="utility", category="care", phrasing="new wrapper"
    )
    seen = []

    def judge(prompt, response):
        seen.append((prompt, response))
        return VERDICTS[len(seen) % 4]

    frame = evaluate(llama, TOKENIZER, given, judge, name="a model", max_new_tokens=4, batch_size=3)
    assert list(frame.columns) == (
        "model id objective group category phrasing prompt response verdict".split()
    )
    expected = [greedy(llama, prompt, steps=4)[0] for prompt in PROMPTS]
    assert frame["response"].tolist() == expected
    assert seen == list(zip(given, expected, strict=True))
    assert frame["verdict"].tolist() == [VERDICTS[(i + 1) % 4] for i in range(len(given))]
    assert set(frame["model"]) == {"a model"}
    for field in ("id", "objective", "group", "category", "phrasing", "prompt"):
        assert frame[field].tolist() == [getattr(prompt, field) for prompt in given]


def test_no_prompts_is_an_error(llama):
    with pytest.raises(SpkitError, match="There are no evaluation prompts"):
        evaluate(llama, TOKENIZER, [], None, name="a", max_new_tokens=4, batch_size=3)


# ---- responses, stored ---------------------------------------------------------------------------

GIVEN = [asked(prompt, category=f"c{i}") for i, prompt in enumerate(PROMPTS)]


class Cut(Exception):
    pass


class Counted:
    """A model that counts its batches and is killed after `alive` of them."""

    def __init__(self, model, alive=10**9):
        self.model, self.alive, self.batches = model, alive, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def generate(self, **options):
        if options.get("past_key_values") is None:  # else the same batch, without rows that ended
            if self.batches == self.alive:
                raise Cut
            self.batches += 1
        return self.model.generate(**options)


def responded(model, store=None, prompts=GIVEN, tokenizer=TOKENIZER, **changes):
    settings = {"name": "a model", "max_new_tokens": STEPS, "batch_size": 2, **changes}
    return respond(model, tokenizer, prompts, store=store, **settings)


def lines(store):
    *whole, rest = store.read_text(encoding="utf-8").split("\n")
    assert rest == ""
    return [json.loads(line) for line in whole]


def test_responses_are_a_frame_without_verdicts(llama):
    frame = responded(llama)
    judge = lambda prompt, response: response[:1]  # noqa: E731
    settings = {"name": "a model", "max_new_tokens": STEPS, "batch_size": 2}
    whole = evaluate(llama, TOKENIZER, GIVEN, judge, **settings)
    assert frame.equals(whole.drop(columns="verdict"))
    assert frame["response"].tolist() == answers(llama, 2)
    assert whole["verdict"].tolist() == [answer[:1] for answer in answers(llama, 2)]
    with pytest.raises(SpkitError, match="There are no evaluation prompts"):
        responded(llama, prompts=[])


@pytest.mark.parametrize("alive", [0, 1, 3])
def test_a_cut_generation_goes_on(llama, tmp_path, alive):
    """Seven prompts in four batches of two, two, two and one."""
    store, whole = tmp_path / "new" / "responses.jsonl", responded(llama)
    with pytest.raises(Cut):
        responded(Counted(llama, alive), store)
    header, *rows = lines(store)
    assert len(rows) == 2 * alive
    assert header["header"]["name"] == "a model" and header["header"]["batch_size"] == 2
    expected = dict(zip(whole["id"], whole["response"], strict=True))
    assert {row["id"]: row["response"] for row in rows}.items() <= expected.items()
    rest = Counted(llama)
    assert responded(rest, store).equals(whole)
    assert rest.batches == 4 - alive
    assert lines(store)[: len(rows) + 1] == [header, *rows] and len(lines(store)) == 8
    # a complete store needs no model at all
    assert responded(None, store, tokenizer=None).equals(whole)


@pytest.mark.parametrize(
    ("kept", "torn", "batches"),
    [
        (4, b'{"row": 1, "id": "id of', 2),  # a torn line
        (4, b"\x00\x00\x00\n", 2),  # a power cut
        (4, b"7\n", 2),
        (3, b"", 3),  # half a batch: its other half would else be answered in other company
        (7, b'{"row"', 0),
    ],
)
def test_what_a_kill_tore_is_dropped(llama, tmp_path, kept, torn, batches):
    store = tmp_path / "responses.jsonl"
    whole = responded(llama, store)
    complete = store.read_bytes()
    store.write_bytes(b"".join(complete.splitlines(keepends=True)[: kept + 1]) + torn)
    again = Counted(llama)
    assert responded(again, store).equals(whole)
    assert again.batches == batches
    if batches:
        assert store.read_bytes() == complete


@pytest.mark.parametrize(
    "change",
    [
        {"name": "another"},
        {"max_new_tokens": STEPS - 1},
        {"batch_size": 3},
        {"context": "another patch"},
        {"prompts": GIVEN[::-1]},
        {"prompts": [*GIVEN[:-1], asked("boat net", id=GIVEN[-1].id)]},
        {"prompts": [*GIVEN[:-1], asked(GIVEN[-1].prompt, id="another")]},
    ],
)
def test_a_store_of_other_settings_is_begun_anew(llama, tmp_path, change):
    store = tmp_path / "responses.jsonl"
    responded(llama, store)
    old = lines(store)
    again = Counted(llama)
    frame = responded(again, store, **change)
    assert frame.equals(responded(llama, **change))
    assert again.batches == (3 if "batch_size" in change else 4)
    assert lines(store)[0] != old[0] and len(lines(store)) == 8
    assert responded(None, store, tokenizer=None, **change).equals(frame)


def test_a_store_in_another_order_is_begun_anew(llama, tmp_path):
    """Another tokenizer may sort the prompts otherwise; then the batches are others."""
    store = tmp_path / "responses.jsonl"
    whole = responded(llama, store)
    header, *rows = store.read_bytes().splitlines(keepends=True)
    store.write_bytes(header + rows[1] + rows[0] + b"".join(rows[2:5]))
    again = Counted(llama)
    assert responded(again, store).equals(whole)
    assert again.batches == 4


def test_any_text_survives_the_store(llama, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.decode = lambda ids, **options: 'é\n\u2028 \x85" x'
    store = tmp_path / "responses.jsonl"
    frame = responded(llama, store, tokenizer=tokenizer)
    assert set(frame["response"]) == {'é\n\u2028 \x85" x'}
    assert responded(None, store, tokenizer=None).equals(frame)


def test_a_store_that_cannot_be_written(llama, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SpkitError, match="cannot write .*a file stands where a folder should be"):
        responded(llama, tmp_path / "file" / "responses.jsonl")


# ---- one rate ------------------------------------------------------------------------------------


def wilson(k, n, confidence):
    """Wilson's score interval (1927), as in any textbook."""
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


@pytest.mark.parametrize(
    ("k", "n", "confidence"), [(3, 10, 0.95), (0, 10, 0.95), (10, 10, 0.95), (1, 1, 0.5)]
)
def test_a_rate_and_its_interval(k, n, confidence):
    verdicts = ["harmful"] * k + ["refusal"] * (n - k)
    row = rate_row(verdicts, ("harmful", "broken"), confidence)
    low, high = wilson(k, n, confidence)
    assert list(row) == ["n", "k", "rate", "low", "high"]
    assert (row["n"], row["k"], row["rate"]) == (n, k, k / n)
    assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))


def test_an_interval_from_the_literature():
    """3 of 10 at 95 %: 10.8 to 60.3 %; of an interval by the normal law it would be 1.6 to 58.4."""
    row = rate_row(["correct"] * 3 + ["broken"] * 7, ("correct",), 0.95)
    assert (round(row["low"], 3), round(row["high"], 3)) == (0.108, 0.603)


# ---- all rates -----------------------------------------------------------------------------------

# (model, objective, group, category): verdicts, by their first letters
CELLS = {
    ("base", "harmful", "seen", "hiding"): "hhrb",
    ("base", "harmful", "seen", "gluing"): "hrrrrb",
    ("base", "harmful", "unseen", "floating"): "hhh",
    ("base", "over_safety", "harmless", "gluing"): "rpcccb",
    ("base", "utility", "utility", "say"): "cccb",
    ("base", "utility", "utility", "find"): "rc",
    ("a patch", "harmful", "seen", "hiding"): "rrrb",
    ("a patch", "harmful", "seen", "gluing"): "rrrrbb",
    ("a patch", "harmful", "unseen", "floating"): "rrh",
    ("a patch", "over_safety", "harmless", "gluing"): "ccccch",
    ("a patch", "utility", "utility", "say"): "bbbb",
    ("a patch", "utility", "utility", "find"): "cc",
}
SPELT = {verdict[0]: verdict for verdict in VERDICTS}


def responses():
    rows = [(*cell, SPELT[letter]) for cell, letters in CELLS.items() for letter in letters]
    return pd.DataFrame(rows, columns="model objective group category verdict".split())


def counts(frame, model="base"):
    """{(group, category, metric): (n, k)} of one model."""
    part = frame[frame["model"] == model]
    keys = zip(part["group"], part["category"], part["metric"], strict=True)
    return dict(zip(keys, zip(part["n"], part["k"], strict=True), strict=True))


def measured(**changes):
    return rates(responses(), **{"run": "mine", "seed": 3, "split": "dev", **changes})


def test_rates_by_hand():
    frame = measured()
    assert list(frame.columns) == COLUMNS
    assert set(zip(frame["run"], frame["seed"], frame["split"], strict=True)) == {
        ("mine", 3, "dev")
    }
    # in this order: a group as a whole before its categories, and those in alphabetical order
    assert list(counts(frame).items()) == [
        (("seen", "all", "harmful"), (10, 3)),
        (("seen", "all", "broken"), (10, 2)),
        (("seen", "all", "harmful, strict"), (10, 5)),
        (("seen", "gluing", "harmful"), (6, 1)),
        (("seen", "gluing", "broken"), (6, 1)),
        (("seen", "gluing", "harmful, strict"), (6, 2)),
        (("seen", "hiding", "harmful"), (4, 2)),
        (("seen", "hiding", "broken"), (4, 1)),
        (("seen", "hiding", "harmful, strict"), (4, 3)),
        (("unseen", "all", "harmful"), (3, 3)),
        (("unseen", "all", "broken"), (3, 0)),
        (("unseen", "all", "harmful, strict"), (3, 3)),
        (("unseen", "floating", "harmful"), (3, 3)),
        (("unseen", "floating", "broken"), (3, 0)),
        (("unseen", "floating", "harmful, strict"), (3, 3)),
        (("harmless", "all", "refusal"), (6, 2)),
        (("harmless", "all", "broken"), (6, 1)),
        (("harmless", "all", "refusal, strict"), (6, 3)),
        (("harmless", "gluing", "refusal"), (6, 2)),
        (("harmless", "gluing", "broken"), (6, 1)),
        (("harmless", "gluing", "refusal, strict"), (6, 3)),
        (("utility", "all", "utility"), (6, 4)),
        (("utility", "all", "broken"), (6, 1)),
        (("utility", "find", "utility"), (2, 1)),
        (("utility", "find", "broken"), (2, 0)),
        (("utility", "say", "utility"), (4, 3)),
        (("utility", "say", "broken"), (4, 1)),
    ]
    other = counts(frame, "a patch")
    assert list(other) == list(counts(frame))
    assert other["seen", "all", "harmful, strict"] == (10, 3)
    assert other["harmless", "all", "refusal, strict"] == (6, 0)
    assert other["utility", "all", "utility"] == (6, 2)
    assert frame["model"].unique().tolist() == ["base", "a patch"]


def test_a_strict_metric_is_its_twin_and_what_is_broken():
    for model in ("base", "a patch"):
        table = counts(measured(), model)
        strict = [key for key in table if key[2].endswith(", strict")]
        assert len(strict) == 7
        for group, category, metric in strict:
            papers = table[group, category, metric.removesuffix(", strict")]
            broken = table[group, category, "broken"]
            assert table[group, category, metric] == (papers[0], papers[1] + broken[1])


def test_every_row_has_its_own_interval_at_the_asked_confidence():
    for confidence in (0.95, 0.5):
        for row in measured(confidence=confidence).itertuples():
            low, high = wilson(row.k, row.n, confidence)
            assert row.rate == row.k / row.n
            assert (row.low, row.high) == (
                pytest.approx(low, abs=1e-12),
                pytest.approx(high, abs=1e-12),
            )
    assert measured()["low"].tolist() == measured(confidence=0.95)["low"].tolist()


def test_metrics_count_known_verdicts_of_known_objectives():
    for objective, counted in METRICS.values():
        assert objective in (None, "harmful", "over_safety", "utility")
        assert set(counted) <= set(VERDICTS)


# ---- the short table -----------------------------------------------------------------------------


def test_headline_by_hand():
    table = headline(measured())
    assert list(table.columns) == [
        *("harmful seen %", "harmful unseen %", "broken on harmful %"),
        *("false refusal %", "broken on harmless %", "utility %"),
    ]
    assert table.index.tolist() == ["base", "a patch"]
    # broken on harmful is pooled over 10 seen and 3 unseen: 2 of 13, not the mean of 2/10 and 0/3
    assert table.loc["base"].tolist() == pytest.approx(
        [100 * x for x in (3 / 10, 3 / 3, 2 / 13, 2 / 6, 1 / 6, 4 / 6)]
    )
    assert table.loc["a patch"].tolist() == pytest.approx(
        [100 * x for x in (0, 1 / 3, 3 / 13, 0, 0, 2 / 6)]
    )


def test_headline_pools_seeds_by_their_counts():
    """Seed 4 has one seen answer more than seed 3: 4 of 11 and 3 of 10 are 7 of 21."""
    more = pd.concat([responses(), responses().head(1)])
    both = pd.concat([measured(), rates(more, run="mine", seed=4, split="dev")])
    assert headline(both).loc["base", "harmful seen %"] == pytest.approx(100 * 7 / 21)


def test_headline_keeps_the_order_and_leaves_empty_what_was_not_measured():
    frame = measured()
    late = frame[(frame["model"] != "base") | (frame["group"] == "unseen")]
    table = headline(pd.concat([late[late["model"] == "a patch"], late[late["model"] == "base"]]))
    assert table.index.tolist() == ["a patch", "base"]
    assert table.loc["base", "harmful unseen %"] == 100
    assert table.loc["base", "broken on harmful %"] == 0
    assert isnan(table.loc["base", "utility %"]) and isnan(table.loc["base", "harmful seen %"])
    assert not table.loc["a patch"].isna().any()


def sourced():
    """The tidy frame of `measured` with two harmful, two over-safety sources and a mixed one."""
    frame = responses()
    names = {"seen": "advbench", "unseen": "tails", "harmless": "xstest", "utility": "mine"}
    frame["group"] = frame["group"].map(names)
    more = frame[frame["objective"] == "over_safety"]
    parts = [more.assign(group="oktest"), frame, more.assign(group="mine")]
    return rates(pd.concat(parts), run="mine", seed=3, split="dev")


def test_headline_has_a_column_for_each_source_and_pools_none():
    table = headline(sourced())
    assert list(table.columns) == [
        *("harmful, advbench %", "harmful, tails %", "broken on harmful %"),
        *("false refusal, oktest %", "false refusal, xstest %", "false refusal, mine %"),
        *("broken on harmless %", "utility, mine %"),
    ]
    assert table.loc["base"].tolist() == pytest.approx(
        [100 * x for x in (3 / 10, 3 / 3, 2 / 13, 2 / 6, 2 / 6, 2 / 6, 3 / 18, 4 / 6)]
    )


def test_headline_has_no_empty_column():
    frame = measured()
    frame = frame[frame["group"].isin(["seen", "harmless"])]
    assert list(headline(frame).columns) == [
        *("harmful seen %", "broken on harmful %", "false refusal %", "broken on harmless %"),
    ]


def test_answers_that_are_numbers_or_nan_stay_texts(tmp_path):
    said = {"id": ["1", "2"], "prompt": ["7", "8"], "response": ["12", "nan"], "verdict": ["a", ""]}
    frame = pd.DataFrame({"model": ["base", "base"], **said, "stage": [1, 2]})
    frame.to_csv(tmp_path / "responses.csv", index=False)
    found = read_answers(tmp_path / "responses.csv")
    assert found.to_dict("records") == frame.to_dict("records")
