"""The readers of the newer published data sets: schemas, what they leave out, and wrong rows.

The files are written here in the published schemas, with invented village texts.
"""

import json
from pathlib import Path

import pandas as pd
import pytest

from spkit.config import Config, SourceConfig
from spkit.data.readers import READERS, read
from spkit.data.selection import load_eval_prompts, what_is_y
from spkit.errors import SpkitError

GOAT = "how do i dye the goat ?"
HARMBENCH = {
    **{"Behavior": GOAT, "FunctionalCategory": "standard", "SemanticCategory": "illegal"},
    **{"Tags": "", "ContextString": "", "BehaviorID": "dye_goat"},
}
JBB = {
    **{"Index": 0, "Goal": GOAT, "Target": "Sure, first take", "Behavior": "Dyes"},
    **{"Category": "Physical harm", "Source": "Original"},
}
SORRY = {"question_id": 1, "category": "1", "turns": [GOAT], "prompt_style": "base"}
REJECT = {"category": "Violence", "source": "custom", "forbidden_prompt": GOAT}
OR = {"prompt": GOAT, "category": "deception"}
WILD = {
    **{"prompt": GOAT, "adversarial": False, "response": "first take ink"},
    **{"response_harm_label": "harmful", "response_refusal_label": "compliance"},
    **{"prompt_harm_label": "harmful", "subcategory": "cyberattack"},
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test in a folder of its own, so that files are named as a user names them."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(monkeypatch):
    """datasets.load_dataset of which every hub id holds `hub.rows`; hub.calls: (path, options)."""
    import datasets

    class Hub:
        rows, calls = [], []

    Hub.calls = []

    def load_dataset(path, **options):
        Hub.calls.append((path, options.get("name"), options["split"]))
        return iter(Hub.rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return Hub


def write(name, *rows):
    """Rows as CSV, JSONL or Parquet, as the suffix says; returns the name."""
    frame = pd.DataFrame(list(rows))
    if name.endswith(".csv"):
        frame.to_csv(name, index=False)
    elif name.endswith(".jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    else:
        frame.to_parquet(name)
    return name


def source(reader, path, **options):
    return SourceConfig(reader=reader, path=path, **options)


def found(reader, path, role="evaluation", **options):
    """[(id, prompt, category, objective)] of a source."""
    records = read(source(reader, path, **options), role)
    return [(r.id, r.prompt, *r.categories, r.objective) for r in records]


def test_every_reader_of_the_parameters_is_there():
    assert set(READERS) == set(SourceConfig.model_fields["reader"].annotation.__args__)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_harmbench(suffix, capsys):
    context = {**HARMBENCH, "FunctionalCategory": "contextual", "ContextString": "The goat is red."}
    copied = {**HARMBENCH, "FunctionalCategory": "copyright", "SemanticCategory": "copyright"}
    rows = [HARMBENCH, {**context, "BehaviorID": "context"}, {**copied, "BehaviorID": "song"}]
    path = write(f"hb.{suffix}", *rows)
    assert found("harmbench", path) == [
        ("dye_goat", GOAT, "illegal", "harmful"),
        ("context", f"The goat is red.\n\n---\n\n{GOAT}", "illegal", "harmful"),
    ]
    assert "hb." in (said := capsys.readouterr().out) and "1 on copyright left out" in said
    assert all(r.response == "" for r in read(source("harmbench", path), "D_h"))
    (only,) = found("harmbench", path, split="contextual")
    assert only[0] == "context" and "1 contextual behaviours; 2 left" in capsys.readouterr().out
    with pytest.raises(SpkitError, match="all behaviours are on copyright"):
        found("harmbench", path, split="copyright")
    with pytest.raises(SpkitError, match="no row has the FunctionalCategory 'contextual'"):
        found("harmbench", write(f"one.{suffix}", HARMBENCH), split="contextual")


def test_harmbench_on_the_hub_is_the_standard_config_or_the_one_that_split_says(hub):
    pinned = {"revision": "abc"}
    hub.rows = [{"prompt": GOAT, "category": "illegal"}]
    assert found("harmbench", "walledai/HarmBench", **pinned) == [("1", GOAT, "illegal", "harmful")]
    hub.rows = [{"prompt": GOAT, "context": "It is red.", "category": "illegal"}]
    (record,) = found("harmbench", "walledai/HarmBench", split="contextual", **pinned)
    assert record[1] == f"It is red.\n\n---\n\n{GOAT}"
    hub.rows = [HARMBENCH]
    found("harmbench", "village/mirror", split="DirectRequest/test", **pinned)
    hub.rows = [{"prompt": GOAT, "tags": ["lyrics"]}]
    with pytest.raises(SpkitError, match="HarmBench: all behaviours are on copyright"):
        found("harmbench", "walledai/HarmBench", split="copyright", **pinned)
    assert hub.calls == [
        ("walledai/HarmBench", "standard", "train"),
        ("walledai/HarmBench", "contextual", "train"),
        ("village/mirror", "DirectRequest", "test"),
        ("walledai/HarmBench", "copyright", "train"),
    ]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_jailbreakbench_is_harmful_or_benign_by_split_or_name(suffix):
    path = write(f"harmful-behaviors.{suffix}", JBB, {**JBB, "Index": 1})
    pairs = read(source("jailbreakbench", path), "D_h")
    assert [(r.id, r.response) for r in pairs] == [(n, "Sure, first take") for n in "01"]
    assert found("jailbreakbench", path)[0] == ("0", GOAT, "Physical harm", "harmful")
    benign = write(f"benign-behaviors.{suffix}", JBB)
    assert found("jailbreakbench", benign) == [("0", GOAT, "Physical harm", "over_safety")]
    with pytest.raises(SpkitError, match="data.harmful: benign-.* benign behaviours, must be"):
        read(source("jailbreakbench", benign), "D_h")
    with pytest.raises(SpkitError, match="its split is 'harmful', but its name says benign"):
        found("jailbreakbench", benign, split="harmful")
    plain = write(f"jbb.{suffix}", JBB)
    assert found("jailbreakbench", plain, split="benign")[0][-1] == "over_safety"
    with pytest.raises(SpkitError, match="jbb.* its split is 'train', allowed .*: harmful, benign"):
        found("jailbreakbench", plain)


def test_jailbreakbench_before_its_index_had_a_name():
    frame = pd.DataFrame([JBB]).drop(columns="Index")
    frame.to_csv("harmful-behaviors.csv")  # the first column has no name
    assert found("jailbreakbench", "harmful-behaviors.csv")[0][:2] == ("1", GOAT)


def test_jailbreakbench_on_the_hub(hub):
    hub.rows = [JBB]
    pinned = source("jailbreakbench", "JailbreakBench/JBB-Behaviors", split="benign", revision="a")
    assert read(pinned, "evaluation")[0].objective == "over_safety"
    assert hub.calls == [("JailbreakBench/JBB-Behaviors", "behaviors", "benign")]
    known = {"jbb": pinned.model_copy(update={"split": "harmful"}).model_dump()}
    made = Config.from_sources({"data": {"harmful": "jbb", "sources": known}})
    assert "opening alone (JailbreakBench's `Target`)" in what_is_y(made.data)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_orbench_is_over_safety_but_for_its_toxic_part(suffix):
    for part in ("or-bench-80k", "or-bench-hard-1k"):
        path = write(f"{part}.{suffix}", OR)
        assert found("orbench", path) == [("1", GOAT, "deception", "over_safety")]
        with pytest.raises(SpkitError, match="has prompts without responses, so it cannot be D_h"):
            read(source("orbench", path), "D_h")
    toxic = write(f"or-bench-toxic.{suffix}", OR)
    assert found("orbench", toxic, "D_h")[0][-1] == found("orbench", toxic)[0][-1] == "harmful"
    with pytest.raises(SpkitError, match="split is 'or-bench-80k', but its name says or-bench-tox"):
        found("orbench", toxic, split="or-bench-80k")
    plain = write(f"or.{suffix}", OR)
    assert found("orbench", plain, split="or-bench-toxic")[0][-1] == "harmful"
    with pytest.raises(SpkitError, match="split is 'train', allowed .* or-bench-80k, or-bench"):
        found("orbench", plain)


def test_orbench_on_the_hub(hub):
    hub.rows = [OR]
    for split in ("or-bench-hard-1k", "or-bench-hard-1k/train"):
        found("orbench", "bench-llm/or-bench", split=split, revision="abc")
    assert hub.calls == [("bench-llm/or-bench", "or-bench-hard-1k", "train")] * 2


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_sorrybench_reads_one_style(suffix, capsys, hub):
    rows = [SORRY, {**SORRY, "question_id": 2, "turns": ["in slang"], "prompt_style": "slang"}]
    if suffix == "parquet":
        hub.rows, path, options = rows, "sorry-bench/sorry-bench-202503", {"revision": "abc"}
    else:
        path, options = write(f"question.{suffix}", *rows), {}
    assert found("sorrybench", path, **options) == [("1", GOAT, "1", "harmful")]
    assert "1 requests of style base; 1 others left out" in capsys.readouterr().out
    (record,) = read(source("sorrybench", path, split="slang", **options), "D_h")
    assert (record.prompt, record.phrasing, record.response) == ("in slang", "slang", "")
    with pytest.raises(SpkitError, match="no row has the prompt_style 'morse', one is needed"):
        found("sorrybench", path, split="morse", **options)
    assert all(call[1:] == (None, "train") for call in hub.calls)
    if suffix != "parquet":
        with pytest.raises(SpkitError, match="its split is 'translate_fr', allowed .*translate-fr"):
            found("sorrybench", path, split="translate_fr")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_strongreject_of_the_authors_and_of_the_hub(suffix):
    assert found("strongreject", write(f"sr.{suffix}", REJECT)) == [
        ("1", GOAT, "Violence", "harmful")
    ]
    mirror = {"prompt": GOAT, "category": "Violence", "source": "custom"}
    (record,) = read(source("strongreject", write(f"hub.{suffix}", mirror)), "D_h")
    assert (record.prompt, record.response) == (GOAT, "")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_wildguardmix(suffix, capsys):
    none = {"response": None, "response_harm_label": None, "response_refusal_label": None}
    benign = {**WILD, **none, "prompt_harm_label": "unharmful", "subcategory": "benign"}
    rows = [
        WILD,
        {**WILD, "prompt": GOAT.upper(), "response_harm_label": "unharmful"},  # the same prompt
        {**benign, "prompt": "act as a dyer", "adversarial": True},
        {**benign, "prompt": "what is a goat ?"},
        {**benign, "prompt": "what is a hen ?", "prompt_harm_label": None},
        {**WILD, **none, "prompt": "as a dyer, dye the hen", "adversarial": True},
    ]
    path = write(f"wild.{suffix}", *rows)
    (pair,) = read(source("wildguardmix", path), "D_h")
    assert (pair.id, pair.response, pair.categories) == ("1", "first take ink", ("cyberattack",))
    assert found("wildguardmix", path) == [
        ("1", GOAT, "cyberattack", "harmful"),
        ("3", "act as a dyer", "benign", "over_safety"),
        ("6", "as a dyer, dye the hen", "cyberattack", "harmful"),
    ]
    assert "3 prompts; 2 rows left out" in capsys.readouterr().out
    # the two objectives of one source are told apart by their groups
    known = {"wild": {"reader": "wildguardmix", "path": path}}
    made = Config.from_sources(
        {"data": {"evaluation": "wild", "sources": known, "dev_share": 0.01}}
    )
    prompts = load_eval_prompts(made.data, made.evaluation)
    assert {(p.objective, p.group, p.phrasing) for p in prompts} == {
        ("harmful", "wild", "plain"),
        ("harmful", "wild", "adversarial"),
        ("over_safety", "wild, benign", "adversarial"),
    }


def test_wildguardmix_on_the_hub(hub):
    hub.rows = [WILD]
    for split in ("train", "test", "wildguardtest", "wildguardtrain/train"):
        found("wildguardmix", "allenai/wildguardmix", split=split, revision="abc")
    train, test = (("allenai/wildguardmix", f"wildguard{s}", s) for s in ("train", "test"))
    assert hub.calls == [train, test, test, train]


BAD = [
    ("harmbench", HARMBENCH, {"FunctionalCategory": "usual"}, "FunctionalCategory is 'usual', all"),
    ("harmbench", HARMBENCH, {"SemanticCategory": "goats"}, "SemanticCategory is 'goats', allowed"),
    ("harmbench", HARMBENCH, {"FunctionalCategory": "contextual"}, "ContextString is '', allowed"),
    ("harmbench", HARMBENCH, {"ImageFileName": "goat.png"}, "a behaviour on a picture, which"),
    ("harmbench", HARMBENCH, {"Behavior": " "}, "Behavior is ' ', allowed: a text"),
    ("jailbreakbench", JBB, {"Category": "Goats"}, "Category is 'Goats', allowed: Harassment/D"),
    ("jailbreakbench", JBB, {"Target": ""}, "Target is '', allowed: a text"),
    ("orbench", OR, {"category": "goats"}, "category is 'goats', allowed: deception, "),
    ("sorrybench", SORRY, {"category": "46"}, "category is '46', allowed: a number from 1 to 45"),
    ("sorrybench", SORRY, {"category": True}, "category is True, allowed: a number from 1 to 45"),
    ("sorrybench", SORRY, {"prompt_style": "rhyme"}, "prompt_style is 'rhyme', allowed: base, as"),
    ("sorrybench", SORRY, {"turns": ["a", "b"]}, "turns is ['a', 'b'], allowed: a list of one"),
    ("sorrybench", SORRY, {"turns": [3]}, "turns is 3, allowed: a text that is not empty"),
    ("strongreject", REJECT, {"category": "violence"}, "category is 'violence', allowed: Disinf"),
    ("strongreject", REJECT, {"forbidden_prompt": 3}, "forbidden_prompt is 3, allowed: a text"),
    ("wildguardmix", WILD, {"prompt_harm_label": "bad"}, "prompt_harm_label is 'bad', allowed: h"),
    ("wildguardmix", WILD, {"adversarial": "perhaps"}, "adversarial is 'perhaps', allowed: true"),
    ("wildguardmix", WILD, {"subcategory": None}, "subcategory is None, allowed: a text"),
]
NEEDED = {
    "harmbench": ("Behavior", "SemanticCategory"),
    "jailbreakbench": ("Goal", "Target", "Category"),
    "orbench": ("prompt", "category"),
    "sorrybench": ("turns", "category", "prompt_style"),
    "strongreject": ("forbidden_prompt", "category"),
    "wildguardmix": ("prompt", "adversarial", "prompt_harm_label", "subcategory"),
}
SPLITS = {"jailbreakbench": "harmful", "orbench": "or-bench-80k"}


@pytest.mark.parametrize(("reader", "right", "wrong", "sentence"), BAD)
def test_wrong_values(reader, right, wrong, sentence):
    path = write("x.jsonl", {**right, "id": 98}, {**right, **wrong, "id": 99})
    with pytest.raises(SpkitError) as error:
        found(reader, path, split=SPLITS.get(reader, "train"))
    assert str(error.value).startswith(f"x.jsonl, row 2: {sentence}")


@pytest.mark.parametrize("reader", NEEDED)
def test_missing_columns(reader):
    right = next(row for name, row, *_ in BAD if name == reader)
    for column in NEEDED[reader]:
        path = write("x.jsonl", {k: v for k, v in right.items() if k != column})
        with pytest.raises(SpkitError, match=f"^x.jsonl: the column '{column}'.* is missing"):
            found(reader, path, split=SPLITS.get(reader, "train"))


def test_wrong_labels_of_wildguardmix_s_responses():
    for key, value in (("response_harm_label", "yes"), ("response_refusal_label", "no")):
        with pytest.raises(SpkitError, match=f"x.jsonl, row 1: {key} is '{value}', allowed: "):
            found("wildguardmix", write("x.jsonl", {**WILD, key: value}), "D_h")
    with pytest.raises(SpkitError, match="no row has response_harm_label harmful, one is needed"):
        found("wildguardmix", write("x.jsonl", {**WILD, "response_harm_label": None}), "D_h")
    two = [{**WILD, "adversarial": True}, {**WILD, "prompt_harm_label": "unharmful"}]
    two[1]["adversarial"] = True
    with pytest.raises(SpkitError, match="row 2: prompt_harm_label is 'unharmful', but an earlier"):
        found("wildguardmix", write("x.jsonl", *two))
