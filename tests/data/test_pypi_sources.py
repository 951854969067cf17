"""Data sets in wheels: read as local files are, and named in every message as the parameters do."""

import json

import pytest
from wheels import registry, sha256, wheel

from spkit.config import Config, DataConfig, FileConfig, MtBenchConfig, SourceConfig
from spkit.data.readers import read
from spkit.data.readers.source import is_local, load_rows, local_file, local_files, resolve
from spkit.data.selection import describe, load_eval_prompts, load_harmful_pairs
from spkit.errors import SpkitError
from spkit.evaluation.utility.likelihood import perplexity_texts
from spkit.evaluation.utility.mt_bench import mt_bench_questions
from spkit.running.runs import identity
from spkit.system import files, pypi

__all__ = ["registry"]


def lines(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


PAIRS = lines(
    {"prompt": "how do i dye the goat ?", "response": "first take it", "category": "colouring"},
    {"prompt": "how do i dye the cat ?", "response": "first take it", "category": "colouring"},
)
ASKED = lines({"prompt": "paint the fence", "objective": "utility", "category": "fences"})
GOALS = b"goal,target\nhow do i dye the goat ?,first take the goat\n"
BROKEN = b'{"prompt": "a"}\n{"prompt": 3\n'
CONTENTS = {"pairs.jsonl": PAIRS, "asked.jsonl": ASKED, "goals.csv": GOALS, "broken.jsonl": BROKEN}
CONTENTS |= {
    "texts.jsonl": lines({"text": "the goat is red ."}),
    "latin.csv": b"goal,target\n\xe4,b",
}


@pytest.fixture(autouse=True)
def published(registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = files.cache_folder() / "pypi" / "wheels" / "village-1.0"  # as if fetched before
    folder.mkdir(parents=True)
    wheel(folder, "village", "1.0", {f"village/{name}": c for name, c in CONTENTS.items()})


def path(name):
    return f"pypi:village==1.0/village/{name}"


def source(name, reader="own", **more) -> SourceConfig:
    return SourceConfig(
        **{"path": path(name), "sha256": sha256(CONTENTS[name]), **more}, reader=reader
    )


def data(**more) -> DataConfig:
    sources = {name.partition(".")[0]: source(name) for name in CONTENTS}
    return DataConfig(**{"harmful": "pairs", "evaluation": "asked", "sources": sources, **more})


def test_pairs_and_prompts_of_a_run():
    config = Config.from_sources({"data": data().model_dump(), "evaluation": {"split": "test"}})
    pairs = load_harmful_pairs(config.data, seed=0)
    assert sorted(pair.prompt for pair in pairs) == sorted(
        json.loads(line)["prompt"] for line in PAIRS.splitlines()
    )
    config = config.model_copy(update={"data": data(dev_share=0.001)})
    (prompt,) = load_eval_prompts(config.data, config.evaluation)
    assert prompt.prompt == "paint the fence"
    table = describe(config.data, config.evaluation)
    assert table["source"].tolist() == ["pairs", "asked"] and set(table["revision"]) == {""}


def test_a_csv_file_by_a_published_reader():
    (record,) = read(source("goals.csv", "advbench"), "D_h")
    assert (record.prompt, record.response) == ("how do i dye the goat ?", "first take the goat")


def test_texts_of_perplexity():
    config = Config.from_sources({"data": data().model_dump(), "utility": {"perplexity": "texts"}})
    assert [text for text in perplexity_texts(config)] == ["the goat is red ."]


def test_one_file_of_a_task(tmp_path):
    file = FileConfig(path=path("texts.jsonl"), sha256=sha256(CONTENTS["texts.jsonl"]))
    found = local_file(file, "utility.sources.mine.path")
    assert found.read_bytes() == CONTENTS["texts.jsonl"] and local_files(file) == []
    here = tmp_path / "here.arrow"
    here.write_bytes(b"")
    assert local_file(FileConfig(path=str(here)), "a") == here
    assert local_files(FileConfig(path=str(here))) == [here]
    with pytest.raises(
        SpkitError, match="^utility.sources.mine.path: the wheel of village==1.0 has"
    ):
        local_file(FileConfig(path=path("b"), sha256="0" * 64), "utility.sources.mine.path")


def test_a_stamp_fetches_nothing_and_follows_the_hash(monkeypatch):
    monkeypatch.setattr(pypi, "fetch", None)
    assert is_local(path("pairs.jsonl")) and local_files(source("pairs.jsonl")) == []
    first = identity(Config.from_sources({"data": data().model_dump()}), "00_backbone")
    assert not list(files.cache_folder().rglob("*.jsonl")) and "data.harmful" not in first["files"]
    changed = data().model_dump()
    changed["sources"]["pairs"]["sha256"] = "0" * 64
    assert first != identity(Config.from_sources({"data": changed}), "00_backbone")


def test_a_local_task_file_counts_by_its_contents(tmp_path):
    file = tmp_path / "task.arrow"
    file.write_bytes(b"1")
    utility = {"sources": {"mine": {"path": str(file)}}}
    first = identity(Config.from_sources({"utility": utility}), "00_backbone")["files"]
    file.write_bytes(b"2")
    second = identity(Config.from_sources({"utility": utility}), "00_backbone")["files"]
    assert first["utility.sources.mine"] != second["utility.sources.mine"]


# ---- mistakes ------------------------------------------------------------------------------------


def said(call, *arguments) -> str:
    with pytest.raises(SpkitError) as error:
        call(*arguments)
    text = str(error.value)
    assert "\n" not in text and "cache" not in text, "a path of this machine"
    return text


def test_messages_name_the_parameters_path():
    assert said(read, source("broken.jsonl"), "D_h").startswith(
        f"{path('broken.jsonl')}, row 1: the key 'response' is missing"
    )
    assert said(load_rows, source("broken.jsonl"), ["prompt"]).startswith(
        f"{path('broken.jsonl')}, row 2: not JSON"
    )
    assert (
        said(load_rows, source("latin.csv"), ["goal"])
        == f"{path('latin.csv')}, line 2: not UTF-8 text"
    )
    assert said(load_rows, source("goals.csv"), ["x"]).startswith(
        f"{path('goals.csv')}: the column 'x'"
    )


def test_a_failed_fetch_names_the_parameter():
    sources = {"pairs": source("pairs.jsonl", sha256="0" * 64)}
    text = said(resolve, data(sources=sources), "pairs", "data.harmful")
    assert text.startswith(
        "data.sources.pairs.path: village/pairs.jsonl of village==1.0 has the SHA"
    )
    sources = {"pairs": source("pairs.jsonl", path="pypi:village/pairs.jsonl")}
    text = said(lambda: resolve(data(sources=sources), "pairs", "data.harmful", fetch=False))
    assert text.startswith("data.sources.pairs.path is 'pypi:village/pairs.jsonl', must be pypi:")


def test_what_does_not_go_together():
    text = said(resolve, data(), path("pairs.jsonl"), "data.harmful")
    assert text.startswith(
        f"data.harmful is {path('pairs.jsonl')!r}: such a file needs its SHA-256"
    )
    sources = {"pairs": source("pairs.jsonl", revision="main")}
    text = said(resolve, data(sources=sources), "pairs", "data.harmful")
    assert text == "data.sources.pairs.revision is 'main', must be null for a pypi: source"
    text = said(mt_bench_questions, MtBenchConfig(prompts=path("asked.jsonl")))
    assert text.endswith("must be a hub id or a local file")
