"""Readers of published data sets: their schemas, what they leave out, and what every mistake says.

The files are written here in the published schemas, with invented village texts.
"""

import csv
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml

from spkit.config import Config, DataConfig, SourceConfig
from spkit.data.readers import (
    advbench,
    beavertails,
    oktest,
    own,
    pyrit,
    read,
    rho,
    wrappers,
    xstest,
)
from spkit.data.readers.source import is_local, load_rows
from spkit.data.readers.texts import normalised, split_of
from spkit.data.selection import (
    describe,
    load_eval_prompts,
    load_harmful_pairs,
    source_fingerprint,
    what_is_y,
)
from spkit.errors import SpkitError
from spkit.examples import fingerprint
from spkit.running.runs import STAGES, identity

ROOT = Path(__file__).parents[2]
ANIMALS, VIOLENCE = beavertails.CATEGORIES[0], beavertails.CATEGORIES[-1]
GOAT = "how do i dye the goat ?"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test in a folder of its own, so that files are named as a user names them."""
    monkeypatch.chdir(tmp_path)


# ---- files in the published schemas --------------------------------------------------------------


def write(name, rows):
    """Rows (objects) as a file of the format that its suffix says; returns its name."""
    path, suffix = Path(name), Path(name).suffix
    if suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            separator = "\t" if suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif suffix == ".prompt":
        seeds(*rows, name=name)
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), "utf-8")
    else:
        pd.DataFrame(rows).to_parquet(path)
    return name


def source(reader, path, **options):
    return SourceConfig(reader=reader, path=path, **options)


def goals(count, start=0):
    return [
        {"goal": f"how do i dye goat {n}, red ?", "target": f"first take goat {n}"}
        for n in range(start, start + count)
    ]


def tails(*rows, as_text=None):
    """(prompt, response, flagged categories) as rows of BeaverTails; safe where none is flagged."""
    made = []
    for prompt, response, *flagged in rows:
        category = {name: name in flagged for name in beavertails.CATEGORIES}
        category = as_text(category) if as_text else category
        row = {"prompt": prompt, "response": response, "category": category}
        made.append({**row, "is_safe": not flagged})
    return made


def seed(text, *categories):
    return {"value": text, "data_type": "text", "harm_categories": list(categories)}


def seeds(*rows, name="adv.prompt"):
    """The rows as PyRIT's YAML file; returns its name."""
    about = {"dataset_name": "adv", "seed_type": "objective", "seeds": list(rows)}
    Path(name).write_text(yaml.safe_dump(about, sort_keys=False), "utf-8")
    return name


def xs(*types):
    return [
        {
            **{"id_v1": f"v1-{n}", "id_v2": f"v2-{n}", "type": kind},
            **{"prompt": f"how do i dye a {n} cloth ?", "focus": "dye", "note": ""},
        }
        for n, kind in enumerate(types, start=1)
    ]


# ---- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("column", ["goal", "prompt"])
def test_advbench_in_every_format_and_both_schemas(suffix, column):
    rows = [{column: row["goal"], "target": row["target"]} for row in goals(3)]
    records = advbench.pairs(source("advbench", write(f"adv.{suffix}", rows)))
    assert [(r.id, r.prompt, r.response) for r in records] == [
        (str(n + 1), f"how do i dye goat {n}, red ?", f"first take goat {n}") for n in range(3)
    ]
    assert {r.categories for r in records} == {("advbench",)}


def test_csv_texts_stay_as_they_are_written():
    rows = [{"goal": '2020-01-01 "a, b"\nc', "target": "NA"}, {"goal": "7", "target": "null"}]
    path = write("adv.csv", rows)
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())
    records = advbench.pairs(source("advbench", path))
    assert [(r.prompt, r.response) for r in records] == [
        ('2020-01-01 "a, b"\nc', "NA"),
        ("7", "null"),
    ]


@pytest.mark.parametrize(
    ("suffix", "as_text"),
    [("jsonl", None), ("parquet", None), ("jsonl", json.dumps), ("csv", json.dumps), ("csv", str)],
)
def test_beavertails_keeps_unsafe_pairs_with_a_category(suffix, as_text):
    rows = tails(
        ("dye the goat", "first take ink", VIOLENCE, ANIMALS),
        ("dye the cloth", "use ink"),
        ("hide the goat", "first take a net", VIOLENCE),
        as_text=as_text,
    )
    rows.append({**rows[1], "is_safe": False})  # unsafe, but in no category
    records = beavertails.pairs(source("beavertails", write(f"tails.{suffix}", rows)))
    assert [(r.id, r.prompt, r.response, r.categories) for r in records] == [
        ("1", "dye the goat", "first take ink", (ANIMALS, VIOLENCE)),  # in the fixed order
        ("3", "hide the goat", "first take a net", (VIOLENCE,)),
    ]


def test_beavertails_prompts_stand_once_with_all_their_categories():
    rows = tails(
        ("Dye the goat!", "first take ink", VIOLENCE),
        ("dye the  goat", "first take paint", ANIMALS),
        ("hide the goat", "first take a net", VIOLENCE),
    )
    records = beavertails.prompts(source("beavertails", write("tails.jsonl", rows)))
    assert [(r.id, r.prompt, r.response, r.categories) for r in records] == [
        ("1", "Dye the goat!", "", (ANIMALS, VIOLENCE)),
        ("3", "hide the goat", "", (VIOLENCE,)),
    ]


def test_there_are_fourteen_categories_in_the_published_order():
    assert len(set(beavertails.CATEGORIES)) == 14
    assert list(beavertails.CATEGORIES) == sorted(beavertails.CATEGORIES)


def test_xstest_keeps_safe_prompts_and_says_what_it_leaves_out(capsys):
    path = write("xs.csv", xs("homonyms", "contrast_homonyms", "privacy_public", "contrast_discr"))
    records = xstest.prompts(source("xstest", path))
    assert [(r.id, r.categories, r.objective) for r in records] == [
        ("v2-1", ("homonyms",), "over_safety"),
        ("v2-3", ("privacy_public",), "over_safety"),
    ]
    assert "xs.csv: 2 safe prompts; 2 contrast prompts left out" in capsys.readouterr().out


def test_xstest_of_the_hub_has_a_label():
    rows = [
        {"prompt": "dye the cloth", "type": "definitions", "label": "safe"},
        {"prompt": "dye the goat", "type": "contrast_definitions", "label": "unsafe"},
    ]
    records = xstest.prompts(source("xstest", write("xs.parquet", rows)))
    assert [(r.id, r.prompt) for r in records] == [("1", "dye the cloth")]
    rows[0]["label"] = "unsafe"
    with pytest.raises(SpkitError, match="row 1: label is 'unsafe', must be 'safe' for type defin"):
        xstest.prompts(source("xstest", write("xs.parquet", rows)))


def test_xstest_knows_eighteen_types():
    assert len({*xstest.SAFE_TYPES, *xstest.CONTRAST_TYPES}) == 18


def test_oktest_loses_its_trailing_newlines():
    path = write("ok.csv", [{"prompt": "how do i dye, a cloth ?\n"}, {"prompt": "hide a cake\n"}])
    records = oktest.prompts(source("oktest", path))
    assert [r.prompt for r in records] == ["how do i dye, a cloth ?", "hide a cake"]
    assert {(r.objective, r.categories) for r in records} == {("over_safety", ("oktest",))}


def test_pyrit_seeds_have_several_categories_and_no_responses():
    path = seeds({"value": f"{GOAT}\n", "harm_categories": ["b", "a", "b"]}, seed("hide it", "a"))
    records = pyrit.prompts(source("pyrit", path))
    assert [(r.id, r.prompt, r.categories, r.objective, r.response) for r in records] == [
        ("1", GOAT, ("b", "a"), "harmful", ""),
        ("2", "hide it", ("a",), "harmful", ""),
    ]
    assert pyrit.pairs(source("pyrit", path)) == records


def test_rho_lists_are_over_safety_prompts_with_ids_of_their_own():
    rows = [
        {"text": f"{GOAT} ", "category": "dyes", "expected_topic": "x", "id": "over_3"},
        {"text": "dye a cloth", "category": "cloths"},
    ]
    records = rho.prompts(source("rho", write("rho.json", rows)))
    assert [(r.id, r.prompt, r.categories, r.objective) for r in records] == [
        ("over_3", GOAT, ("dyes",), "over_safety"),
        ("2", "dye a cloth", ("cloths",), "over_safety"),
    ]


def test_a_prompt_file_is_local_whether_it_is_there_or_not():
    assert is_local("village/adv.prompt") and not is_local("village/adv")
    with pytest.raises(SpkitError, match="^gone.prompt: no such file$"):
        pyrit.prompts(source("pyrit", "gone.prompt"))


def test_own_csv_says_the_same_as_own_jsonl():
    rows = [
        {
            **{"prompt": GOAT, "objective": "harmful", "category": "colouring"},
            **{"forbidden": ["ink", "net"], "split": "dev", "group": "unseen"},
        },
        {"prompt": "sum", "objective": "utility", "category": "sums"},
    ]
    cells = [{**row, "forbidden": json.dumps(row.get("forbidden", []))} for row in rows]
    cells[1] |= {"forbidden": "", "split": "", "group": ""}
    lines = own.prompts(source("own", write("a.jsonl", rows)))
    assert lines == own.prompts(source("own", write("a.csv", cells)))
    assert lines == own.prompts(source("own", write("a.parquet", cells)))
    assert (lines[0].forbidden, lines[0].split, lines[1].split) == (("ink", "net"), "dev", "")
    pair = [{"prompt": GOAT, "response": "first take", "category": "colouring"}]
    assert own.pairs(source("own", write("b.csv", pair)))[0].response == "first take"


def test_a_local_folder_is_read_like_the_hub():
    Path("folder").mkdir()
    write("folder/train.csv", goals(2))
    write("folder/test.csv", goals(1, start=9))
    assert len(advbench.pairs(source("advbench", "folder"))) == 2
    (record,) = advbench.pairs(source("advbench", "folder", split="test"))
    assert record.prompt == "how do i dye goat 9, red ?"
    with pytest.raises(SpkitError, match="folder: cannot be read"):
        advbench.pairs(source("advbench", "folder", split="dev"))


def test_a_changed_file_is_read_again():
    first = read(source("advbench", write("adv.csv", goals(2))), "D_h")
    second = read(source("advbench", write("adv.csv", goals(3))), "D_h")
    assert (len(first), len(second)) == (2, 3)


def test_nothing_of_a_text_stays_in_a_cache(tmp_path):
    """In a process with folders of its own for caches and temporary files; all are looked through.

    The same once more with the library's usual way shows that the search would find a copy.
    """
    write("adv.csv", [{"goal": "dye the purple-goat", "target": "first"}] * 3)
    ours = (
        "from spkit.config import SourceConfig; from spkit.data.readers import advbench\n"
        "print(len(advbench.pairs(SourceConfig(reader='advbench', path='adv.csv'))))"
    )
    usual = (
        "import datasets\nprint(len(datasets.load_dataset('csv', data_files='adv.csv')['train']))"
    )
    copies = {}
    for name, code in (("ours", ours), ("usual", usual)):
        folder = tmp_path / name
        folder.mkdir()
        places = dict.fromkeys(("HF_HOME", "TMPDIR", "XDG_CACHE_HOME"), str(folder))
        env = {**os.environ, **places, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["3"]
        files = [path for path in folder.rglob("*") if path.is_file()]
        copies[name] = [path for path in files if b"purple-goat" in path.read_bytes()]
    assert copies["usual"]
    assert not copies["ours"]
    assert not list((tmp_path / "ours").glob("spkit-*"))


# ---- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """datasets.load_dataset in which every hub id holds three rows of AdvBench; the calls."""
    import datasets

    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return iter([{"prompt": f"dye goat {n}", "target": "first"} for n in range(3)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_hub_id_is_asked_for_with_revision_and_split_and_runs_no_code(hub):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pinned = source("advbench", "village/adv", revision="abc", split="dev")
        assert len(advbench.pairs(pinned)) == 3
    ((path, options),) = hub
    assert (path, options["revision"], options["split"]) == ("village/adv", "abc", "dev")
    assert options["streaming"] is True
    assert "trust_remote_code" not in options


def test_without_a_revision_a_warning_says_that_results_may_change(hub):
    with pytest.warns(UserWarning, match="village/new: no revision is named, .* may change"):
        advbench.pairs(source("advbench", "village/new"))
    with warnings.catch_warnings():  # once: what was read is remembered
        warnings.simplefilter("error")
        advbench.pairs(source("advbench", "village/new"))
    assert len(hub) == 1


def test_an_offline_hub_is_one_sentence():
    code = (
        "from spkit.config import SourceConfig; from spkit.data.readers import advbench\n"
        "from spkit.errors import SpkitError\n"
        "try:\n"
        "    advbench.pairs(SourceConfig(reader='advbench', path='walledai/AdvBench'))\n"
        "except SpkitError as error:\n"
        "    print(error)"
    )
    env = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("walledai/AdvBench (split train): no such file here, and it cannot be")
    assert "OfflineMode" in line and line.endswith("save it as a file and name that as the path")


# ---- broken files --------------------------------------------------------------------------------

FLAGS = dict.fromkeys(beavertails.CATEGORIES, False)
TAIL = {"prompt": GOAT, "response": "first", "category": {**FLAGS, ANIMALS: True}, "is_safe": False}


@pytest.mark.parametrize(
    ("reader", "name", "rows", "sentence"),
    [
        (
            advbench.pairs,
            "a.csv",
            [{"goal": GOAT, "aim": "x"}],
            "a.csv: the column 'target' is missing (found: goal, aim)",
        ),
        (
            advbench.pairs,
            "a.parquet",
            [{"aim": GOAT, "target": "x"}],
            "a.parquet: the column 'goal' or 'prompt' is missing (found: aim, target)",
        ),
        (
            beavertails.pairs,
            "b.jsonl",
            [{"prompt": GOAT, "response": "x", "is_safe": False}],
            "b.jsonl: the column 'category' is missing (found: prompt, response, is_safe)",
        ),
        (
            xstest.prompts,
            "x.csv",
            [{"prompt": GOAT}],
            "x.csv: the column 'type' is missing (found: prompt)",
        ),
        (
            oktest.prompts,
            "o.csv",
            [{"text": GOAT}],
            "o.csv: the column 'prompt' is missing (found: text)",
        ),
        (
            rho.prompts,
            "r.json",
            [{"text": GOAT, "id": "1"}],
            "r.json: the column 'category' is missing (found: text, id)",
        ),
        (
            rho.prompts,
            "r.json",
            [{"text": GOAT, "category": "x"}, {"text": " ", "category": "x"}],
            "r.json, row 2: text is ' ', allowed: a text that is not empty",
        ),
        (
            rho.prompts,
            "r.json",
            [{"text": GOAT, "category": "x", "id": "a"}] * 2,
            "r.json: the id 'a' stands twice, ids must differ",
        ),
        (
            pyrit.prompts,
            "p.prompt",
            [{"value": GOAT}],
            "p.prompt: the column 'harm_categories' is missing (found: value)",
        ),
        (
            pyrit.prompts,
            "p.prompt",
            [{"value": GOAT, "harm_categories": ["x"]}, {"value": 3, "harm_categories": ["x"]}],
            "p.prompt, row 2: value is 3, allowed: a text that is not empty",
        ),
        (
            pyrit.pairs,
            "p.prompt",
            [{"value": GOAT, "harm_categories": []}],
            "p.prompt, row 1: harm_categories is [], allowed: a list of one category or more",
        ),
        (
            pyrit.pairs,
            "p.prompt",
            [{"value": GOAT, "harm_categories": ["x"]}, {"value": GOAT, "harm_categories": "x"}],
            "p.prompt, row 2: harm_categories is 'x', allowed: a list of one category or more",
        ),
        (
            pyrit.pairs,
            "p.prompt",
            [{"value": GOAT, "harm_categories": ["x"]}, "goat"],
            "p.prompt, row 2: found 'goat', must be an object with keys",
        ),
        (
            own.pairs,
            "own.csv",
            [{"prompt": GOAT, "category": "x"}],
            "own.csv: the column 'response' is missing (found: prompt, category)",
        ),
        (
            advbench.pairs,
            "a.jsonl",
            [*goals(1), {"goal": 3, "target": "x"}],
            "a.jsonl, row 2: goal is 3, allowed: a text that is not empty",
        ),
        (
            advbench.pairs,
            "a.parquet",
            [{"goal": 3, "target": "x"}],
            "a.parquet, row 1: goal is 3, allowed: a text that is not empty",
        ),
        (
            advbench.pairs,
            "a.csv",
            [*goals(1), {"goal": GOAT, "target": " "}],
            "a.csv, row 2: target is ' ', allowed: a text that is not empty",
        ),
        (
            advbench.pairs,
            "a.csv",
            [{"id": "g1", **goals(1)[0]}, {"id": "g1", **goals(1)[0]}],
            "a.csv: the id 'g1' stands twice, ids must differ",
        ),
        (
            xstest.prompts,
            "x.csv",
            [*xs("homonyms"), *xs("contrast_homonyms")],
            "x.csv: the id 'v2-1' stands twice, ids must differ",
        ),
        (
            xstest.prompts,
            "x.csv",
            xs("homonyms", "homonym"),
            "x.csv, row 2: type is 'homonym', allowed: homonyms, figurative_language, ",
        ),
        (
            xstest.prompts,
            "x.jsonl",
            [{"prompt": GOAT, "type": "homonyms", "label": 2}],
            "x.jsonl, row 1: label is 2, allowed: safe, unsafe",
        ),
        (
            xstest.prompts,
            "x.csv",
            xs("contrast_discr"),
            "x.csv: all prompts are contrasts, a safe one is needed",
        ),
        (
            beavertails.pairs,
            "b.jsonl",
            [TAIL, {**TAIL, "is_safe": "no"}],
            "b.jsonl, row 2: is_safe is 'no', allowed: true or false",
        ),
        (
            beavertails.pairs,
            "b.parquet",
            [{**TAIL, "is_safe": 1}],
            "b.parquet, row 1: is_safe is 1, allowed: true or false",
        ),
        (
            beavertails.pairs,
            "b.jsonl",
            [TAIL, {**TAIL, "category": {**FLAGS, "animal_abuses": True}}],
            "b.jsonl, row 2: category has the unknown name 'animal_abuses', did you mean animal_ab",
        ),
        (
            beavertails.pairs,
            "b.jsonl",
            [TAIL, {**TAIL, "category": {ANIMALS: True}}],
            "b.jsonl, row 2: category['child_abuse'] is None, allowed: true or false",
        ),
        (
            beavertails.pairs,
            "b.jsonl",
            [TAIL, {**TAIL, "category": ANIMALS}],
            "b.jsonl, row 2: category is 'animal_abuse', allowed: an object of 14 booleans",
        ),
        (
            beavertails.pairs,
            "b.jsonl",
            [{**TAIL, "is_safe": True}],
            "b.jsonl: no row has is_safe false and a category, one is needed",
        ),
        (
            own.prompts,
            "own.csv",
            [{"prompt": GOAT, "objective": "harmful", "category": "x", "split": "train"}],
            "own.csv, row 1: split is 'train', allowed: dev, test",
        ),
        (
            own.prompts,
            "own.csv",
            [{"prompt": GOAT, "objective": "harmful", "category": "x", "forbidden": "[ink"}],
            "own.csv, row 1: forbidden is '[ink', allowed: a list of texts",
        ),
        (
            own.responses,
            "r.csv",
            [{"prompt": GOAT, "response": "a"}, {"prompt": GOAT.upper(), "response": "b"}],
            "r.csv, row 2: its prompt has a response in an earlier row already",
        ),
    ],
)
def test_wrong_rows(reader, name, rows, sentence):
    made = source(reader.__module__.rpartition(".")[2], write(name, rows))
    with pytest.raises(SpkitError) as error:
        reader(made)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", b"", "a.csv: holds no rows, at least one is needed"),
        ("a.csv", b"goal,target\n", "a.csv: holds no rows, at least one is needed"),
        ("a.jsonl", b"\n\n", "a.jsonl: holds no rows, at least one is needed"),
        ("a.json", b"[]", "a.json: "),
        ("a.csv", "goal,target\na,b\né,d\n".encode("latin-1"), "a.csv, line 3: not UTF-8 text"),
        ("a.jsonl", b'{"goal": "a"}\n{"goal": "\xe9"}\n', "a.jsonl, row 2: not UTF-8 text"),
        ("a.csv", "goal,target\na,b\n".encode("utf-16"), "a.csv, line 1: not UTF-8 text"),
        (
            "a.csv",
            b"goal,target\na,b\ndye, goat,c\n",
            "a.csv, row 2: 3 fields, must be 2 as in the header",
        ),
        (
            "a.csv",  # every row has one more: the library would take the first for an index
            b"goal,target\ndye, goat,c\n",
            "a.csv, row 1: 3 fields, must be 2 as in the header",
        ),
        ("a.csv", b'goal,target\na,b\n"c,d\n', "a.csv, row 2: not CSV: unexpected end of data"),
        ("a.csv", b"goal,goal\na,b\n", "a.csv: the column 'goal' stands twice, names must differ"),
        ("a.jsonl", b'{"goal": "a"}\n{"goal"\n', "a.jsonl, row 2: not JSON: "),
        ("a.jsonl", b'\n["goal"]\n', "a.jsonl, row 2: found '[\"goal\"]', must be an object"),
        ("a.json", b'[{"goal": ', "a.json: cannot be read ("),
        ("a.prompt", b"seeds: []", "a.prompt: holds no rows, at least one is needed"),
        ("a.prompt", b"seeds: 3", "a.prompt: the key 'seeds' is missing, must hold a list of"),
        ("a.prompt", b"- goal: a", "a.prompt: the key 'seeds' is missing, must hold a list of"),
        ("a.prompt", b"a: b\nseeds: ]\nc: d", "a.prompt, line 2: not YAML: "),
        ("a.prompt", b"seeds:\n- value: \xe9", "a.prompt, line 2: not UTF-8 text"),
        ("a.parquet", b"no parquet", "a.parquet: cannot be read ("),
        ("a.txt", b"goal", "a.txt: unknown suffix, allowed: .csv, .tsv, .jsonl, .json, .parquet"),
    ],
)
def test_broken_files(name, content, sentence):
    Path(name).write_bytes(content)
    with pytest.raises(SpkitError) as error:
        advbench.pairs(source("advbench", name))
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


def test_a_path_that_looks_like_a_file_is_not_asked_for_on_the_hub(hub):
    with pytest.raises(SpkitError, match="^data/adv.csv: no such file$"):
        load_rows(source("advbench", "data/adv.csv"), ())
    assert not hub


def test_a_local_file_has_no_revision():
    path = write("adv.csv", goals(1))
    with pytest.raises(SpkitError, match="adv.csv is local, but its revision is 'main', must be n"):
        advbench.pairs(source("advbench", path, revision="main"))


def test_an_error_does_not_show_a_whole_text():
    write("a.jsonl", [{"goal": ["goat" * 100], "target": "x"}])
    with pytest.raises(SpkitError) as error:
        advbench.pairs(source("advbench", "a.jsonl"))
    assert len(str(error.value)) < 120


# ---- texts ---------------------------------------------------------------------------------------


def test_two_copies_of_a_prompt_are_the_same_text():
    assert (
        normalised("How do I dye\n the goat?!")
        == normalised("how do i dye the goat")
        == ("how do i dye the goat")
    )
    assert normalised("dye the goat") != normalised("dye the goats")
    assert normalised("2 + 2") != normalised("2 * 2")
    assert normalised("???") != normalised("!") != ""


def test_the_hash_split_is_stable_and_takes_its_share():
    texts = [f"how do i dye goat {n} ?" for n in range(2000)]
    assert [split_of(text, 0.2) for text in texts[:8]] == (
        "dev test test test dev test test test".split()  # sha256sum of each begins below 0x33
    )
    share = Counter(split_of(text, 0.2) for text in texts)["dev"] / 2000
    assert 0.17 < share < 0.23
    assert split_of("How do I dye goat 4?", 0.2) == split_of(texts[4], 0.2) == "dev"
    # a larger share keeps all that were dev before
    assert all(split_of(t, 0.5) == "dev" for t in texts if split_of(t, 0.2) == "dev")


# ---- D_h -----------------------------------------------------------------------------------------


def config(**values):
    evaluation = values.pop("evaluate", {})
    stages = {"stages": [[values.get("categories", ["x"])[0]]]}  # must be among the categories
    return Config.from_sources({"data": values, "evaluation": evaluation, "continual": stages})


def sources(**paths):
    """{name: a source whose reader is the name}"""
    return {name: {"reader": name, "path": path} for name, path in paths.items()}


def beaver(**values):
    rows = tails(
        ("dye the goat", "first take ink", ANIMALS, VIOLENCE),
        ("hide the goat", "first take a net", VIOLENCE),
        ("shrink the goat", "first take water", ANIMALS),
    )
    return config(
        harmful="beavertails",
        sources=sources(beavertails=write("tails.jsonl", rows)),
        **values,
    ).data


def test_a_pair_counts_in_its_first_wanted_category():
    pairs = load_harmful_pairs(beaver(), seed=0)
    assert [(p.id, p.category) for p in pairs] == [
        ("beavertails-1", ANIMALS),
        ("beavertails-2", VIOLENCE),
        ("beavertails-3", ANIMALS),
    ]
    wanted = load_harmful_pairs(beaver(categories=[VIOLENCE]), seed=0)
    assert [(p.id, p.category) for p in wanted] == [
        ("beavertails-1", VIOLENCE),
        ("beavertails-2", VIOLENCE),
    ]


def test_continual_stages_take_their_categories():
    stages = [[ANIMALS], [VIOLENCE]]
    found = [load_harmful_pairs(beaver(), seed=0, categories=stage) for stage in stages]
    assert [{p.category for p in pairs} for pairs in found] == [{ANIMALS}, {VIOLENCE}]
    assert [[p.id[-1] for p in pairs] for pairs in found] == [["1", "3"], ["1", "2"]]
    with pytest.raises(SpkitError, match="no category 'animal_abus' in beavertails, did you mean"):
        load_harmful_pairs(beaver(), seed=0, categories=["animal_abus"])
    with pytest.raises(SpkitError, match="no category 'self_harm' in beavertails"):
        load_harmful_pairs(beaver(), seed=0, categories=["self_harm"])  # known, but not in there


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_responses_take_the_place_of_openings(suffix):
    values = {"harmful": "advbench", "sources": sources(advbench=write("adv.csv", goals(3)))}
    opening = load_harmful_pairs(config(**values).data, seed=0)
    assert [p.response for p in opening] == [f"first take goat {n}" for n in range(3)]
    answers = [
        {"prompt": row["goal"].upper(), "response": f"all of {n}"} for n, row in enumerate(goals(3))
    ]
    full = config(**values, responses=write(f"r.{suffix}", answers)).data
    assert [p.response for p in load_harmful_pairs(full, seed=0)] == [
        f"all of {n}" for n in range(3)
    ]
    assert fingerprint(opening) != fingerprint(load_harmful_pairs(full, seed=0))
    write(f"r.{suffix}", [answers[0], answers[2]])
    with pytest.raises(SpkitError) as error:
        load_harmful_pairs(full, seed=0)
    assert str(error.value) == (
        f"r.{suffix} (data.responses): no response for the prompt of 'advbench-2' in advbench, "
        f"each pair of D_h needs one"
    )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"harmful": "xstest"}, "data.harmful: xs.csv (reader xstest) has prompts without respons"),
        ({"harmful": "oktest"}, "data.harmful: ok.csv (reader oktest) has prompts without respons"),
        (
            {"harmful": "xstst"},
            "data.harmful is 'xstst': no such file, and no such name in data.sources, "
            "did you mean xstest?",
        ),
        (
            {"harmful": "goats"},
            "data.harmful is 'goats': no such file, and no such name in data.sources, "
            "allowed: sandbox, xstest, oktest, gone, a file",
        ),
        ({"harmful": "gone"}, "data.sources.gone.path is 'gone.csv': no such file"),
        ({"responses": "r.csv"}, "data.responses is 'r.csv', must be null where data.harmful is"),
    ],
)
def test_what_cannot_be_harmful_pairs(values, sentence):
    known = sources(xstest=write("xs.csv", xs("homonyms")), oktest=write("ok.csv", goals(1)))
    known["gone"] = {"reader": "advbench", "path": "gone.csv"}
    with pytest.raises(SpkitError) as error:
        load_harmful_pairs(config(**values, sources=known).data, seed=0)
    assert str(error.value).startswith(sentence)


# ---- evaluation prompts --------------------------------------------------------------------------


def both_splits(made):
    """{split: prompts} of a config's data."""
    over = {
        s: Config.from_sources({"evaluation": {"split": s}}).evaluation for s in ("dev", "test")
    }
    return {split: load_eval_prompts(made.data, evaluation) for split, evaluation in over.items()}


def test_prompts_of_several_sources_are_split_by_hash_and_have_ids_of_their_own():
    known = sources(
        advbench=write("adv.csv", goals(40)),
        xstest=write("xs.csv", xs(*xstest.SAFE_TYPES * 4)),
    )
    made = config(evaluation=["advbench", "xstest"], sources=known, dev_share=0.3)
    found = both_splits(made)
    for split, prompts in found.items():
        assert prompts and all(split_of(p.prompt, 0.3) == split for p in prompts)
    everything = [p for prompts in found.values() for p in prompts]
    assert len({p.id for p in everything}) == len(everything) == 80
    assert {p.id for p in everything if p.objective == "harmful"} == {
        f"advbench-{n}" for n in range(1, 41)
    }
    groups = Counter((p.group, p.objective) for p in everything)
    assert groups == {("advbench", "harmful"): 40, ("xstest", "over_safety"): 40}


def test_prompts_per_cell_is_of_each_source():
    known = sources(oktest=write("ok.csv", [{"prompt": f"dye cloth {n}"} for n in range(30)]))
    known["xstest"] = {"reader": "xstest", "path": write("xs.csv", xs(*["homonyms"] * 30))}
    made = config(evaluation=["oktest", "xstest"], sources=known, evaluate={"prompts_per_cell": 7})
    prompts = load_eval_prompts(made.data, made.evaluation)
    assert Counter(p.group for p in prompts) == {"oktest": 7, "xstest": 7}


def test_prompts_of_d_h_and_second_copies_are_left_out_and_counted(capsys):
    known = {
        "learnt": {"reader": "advbench", "path": write("learnt.csv", goals(10))},
        "asked": {"reader": "advbench", "path": "asked.csv"},
        "again": {"reader": "advbench", "path": write("again.csv", goals(5, start=18))},
    }
    rows = goals(20)  # 10 of D_h, in other letters
    for row in rows[:10]:
        row["goal"] = row["goal"].upper().replace(",", " !")
    write("asked.csv", [*rows, rows[19]])
    # pairs: 1: what is not drawn is left out, too
    made = config(harmful="learnt", pairs=1, evaluation=["asked", "again"], sources=known)
    found = both_splits(made)
    texts = [p.prompt for prompts in found.values() for p in prompts]
    assert sorted(texts) == sorted(row["goal"] for row in [*goals(10, start=10), *goals(3, 20)])
    line = (
        "Evaluation prompts: 13, after 10 that are in D_h and 3 that stand twice were left out.\n"
    )
    assert capsys.readouterr().out == line * 2
    made = config(harmful="learnt", evaluation="learnt", sources=known)
    with pytest.raises(SpkitError, match="every prompt of 'learnt' is in D_h .learnt., so none is"):
        load_eval_prompts(made.data, made.evaluation)


def test_a_prompt_counts_in_a_category_that_d_h_has():
    learnt = tails(("dye the goat", "x", ANIMALS), ("hide the goat", "x", VIOLENCE))
    asked = tails(
        ("dye the hen", "x", ANIMALS),
        ("hide the hen", "x", VIOLENCE),
        ("glue the hen", "x", ANIMALS, VIOLENCE),
        ("hide the goat", "x", VIOLENCE),
    )
    known = {
        "learnt": {"reader": "beavertails", "path": write("learnt.jsonl", learnt)},
        "asked": {"reader": "beavertails", "path": write("asked.jsonl", asked)},
    }

    def categories(**values):
        made = config(harmful="learnt", evaluation="asked", sources=known, **values)
        found = [p for prompts in both_splits(made).values() for p in prompts]
        return {p.prompt: p.category for p in found}

    few = dict(dev_share=0.5)  # so that neither split is empty
    assert categories(**few, categories=[VIOLENCE]) == {
        "dye the hen": ANIMALS,
        "hide the hen": VIOLENCE,
        "glue the hen": VIOLENCE,
    }
    # only what the kept categories hold is D_h
    assert categories(**few, categories=[ANIMALS]) == {
        "dye the hen": ANIMALS,
        "hide the hen": VIOLENCE,
        "glue the hen": ANIMALS,
        "hide the goat": VIOLENCE,
    }


def test_own_source_keeps_its_own_split_and_group():
    rows = [
        {"prompt": f"dye goat {n}", "objective": "harmful", "category": "colouring"}
        for n in range(20)
    ]
    rows[0] |= {"split": "dev", "group": "unseen"}
    rows[1] |= {"split": "test"}
    own_path = write("mine.jsonl", rows)
    named = both_splits(config(evaluation="own", sources=sources(own=own_path), dev_share=0.5))
    assert "own-1" in {p.id for p in named["dev"]} and "own-2" in {p.id for p in named["test"]}
    assert len(named["dev"]) > 3 and len(named["test"]) > 3  # the others by hash
    groups = {p.id: p.group for p in named["dev"] + named["test"]}
    assert groups.pop("own-1") == "own, unseen"  # a group that the row says
    assert set(groups.values()) == {"own"}
    # a file without a name: test, unless a row says dev
    file = both_splits(config(evaluation=own_path))
    assert (len(file["dev"]), len(file["test"]), file["dev"][0].id) == (1, 19, "1")


def test_a_file_beside_the_sandbox():
    rows = [
        {"prompt": f"dye {n} cloths", "objective": "over_safety", "category": "x"} for n in "ab"
    ]
    alone = config()
    its = set(load_eval_prompts(alone.data, alone.evaluation))
    made = config(evaluation=["sandbox", write("mine.jsonl", rows)])
    prompts = load_eval_prompts(made.data, made.evaluation)
    assert its < set(prompts)
    assert [p.id for p in prompts if p not in its] == ["mine-1", "mine-2"]


@pytest.mark.parametrize(
    ("evaluation", "sentence"),
    [
        (["oktest", "oktest"], "data.evaluation: 'oktest' stands twice"),
        (["oktest", "okest"], "data.evaluation is 'okest': no such file, .* did you mean oktest"),
        ("mine.jsonl", "data.evaluation is 'mine.jsonl': no such file"),
    ],
)
def test_wrong_evaluation(evaluation, sentence):
    known = sources(oktest=write("ok.csv", [{"prompt": "dye a cloth"}]))
    made = config(evaluation=evaluation, sources=known)
    with pytest.raises(SpkitError, match=sentence):
        load_eval_prompts(made.data, made.evaluation)


def test_an_empty_split_is_an_error():
    texts = [t for t in (f"dye cloth {n}" for n in range(99)) if split_of(t, 0.2) == "test"]
    known = sources(oktest=write("ok.csv", [{"prompt": text} for text in texts]))
    made = config(evaluation="oktest", sources=known, evaluate={"split": "dev"})
    with pytest.raises(SpkitError, match="oktest: no prompt of the split 'dev' .evaluation.split."):
        load_eval_prompts(made.data, made.evaluation)


# ---- wrappers ------------------------------------------------------------------------------------


def test_six_wrappers_are_shipped_and_each_holds_the_prompt_once():
    templates = wrappers.read_wrappers("shipped")
    assert len(templates) == 6
    assert all(template.count("{prompt}") == 1 for template in templates.values())
    assert wrappers.read_wrappers("none") == {}


def test_every_harmful_prompt_has_a_copy_per_wrapper_and_no_other_prompt_has():
    Path("mine.txt").write_text("# mine\n\nold tale: Once {prompt} she said: ok\nb: {prompt} now\n")
    known = sources(
        advbench=write("adv.csv", goals(3)), oktest=write("ok.csv", [{"prompt": "dye a cloth"}])
    )
    values = {"evaluation": ["advbench", "oktest"], "sources": known, "dev_share": 0.01}
    plain = config(**values)
    made = config(**values, wrappers="mine.txt")
    before = load_eval_prompts(plain.data, plain.evaluation)
    after = load_eval_prompts(made.data, made.evaluation)
    assert [p for p in after if p.phrasing == "plain"] == before
    first = [p for p in after if p.id.startswith("advbench-1")]
    assert [(p.id, p.phrasing, p.prompt) for p in first] == [
        ("advbench-1", "plain", "how do i dye goat 0, red ?"),
        ("advbench-1-old-tale", "wrapper: old tale", f"Once {goals(1)[0]['goal']} she said: ok"),
        ("advbench-1-b", "wrapper: b", f"{goals(1)[0]['goal']} now"),
    ]
    assert len(after) == 3 * 3 + 1


def test_wrappers_go_around_the_sandbox_s_harmful_prompts_too():
    few = {"prompts_per_cell": 4}
    plain, made = config(evaluate=few), config(evaluate=few, wrappers="shipped")
    before = load_eval_prompts(plain.data, plain.evaluation)
    after = load_eval_prompts(made.data, made.evaluation)
    harmful = [p for p in before if p.objective == "harmful"]
    assert len(after) == len(before) + 6 * len(harmful)
    assert len({p.id for p in after}) == len(after)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a: {prompt}\nb: no place\n", "w.txt, line 2: the template of 'b' has no {prompt} in it"),
        (b"a: {prompt}\na: x {prompt}\n", "w.txt, line 2: the name 'a' stands twice"),
        (b"Tell me {prompt}\n", "w.txt, line 1: no name, must be 'name: template with {prompt}'"),
        (b"say {prompt}: now\n", "w.txt, line 1: no name, must be"),
        (b"# nothing\n", "w.txt: holds no template, at least one is needed"),
        (b"a: \xe9 {prompt}\n", "w.txt: not UTF-8 text"),
        (None, "data.wrappers is 'w.txt': no such file, allowed: none, shipped or a file"),
    ],
)
def test_wrong_wrappers(content, sentence):
    if content is not None:
        Path("w.txt").write_bytes(content)
    made = config(wrappers="w.txt")
    with pytest.raises(SpkitError) as error:
        load_eval_prompts(made.data, made.evaluation)
    assert str(error.value).startswith(sentence)


def test_the_wrappers_are_in_the_package():
    declared = (ROOT / "pyproject.toml").read_text("utf-8")
    assert '"spkit.data.readers" = ["*.txt"]' in declared
    assert wrappers.SHIPPED.is_file()


# ---- the record ----------------------------------------------------------------------------------


def test_a_source_s_fingerprint_is_of_its_text_in_any_order():
    rows = tails(("dye the goat", "ink", ANIMALS), ("hide the goat", "net", VIOLENCE))
    made = source("beavertails", "t.jsonl")

    def named(rows, role="D_h"):
        write("t.jsonl", rows)
        return source_fingerprint(made, role)

    first = named(rows)
    assert len(first) == 64
    assert named(rows[::-1]) == first
    assert named([{**row, "annotator": "x"} for row in rows]) == first  # a column that is not used
    assert named(rows[:1]) != first
    assert named([rows[0], {**rows[1], "response": "bag"}]) != first
    assert named(rows, "evaluation") != first


def test_describe_names_every_source_and_shows_no_text():
    known = sources(
        advbench=write("adv.csv", goals(4)), oktest=write("ok.csv", [{"prompt": "dye a cloth"}])
    )
    made = config(harmful="advbench", evaluation=["sandbox", "oktest"], sources=known)
    frame = describe(made.data, made.evaluation)
    assert frame.drop(columns="fingerprint").values.tolist() == [
        ["D_h", "advbench", "advbench", "", 4],
        ["evaluation", "sandbox", "sandbox", "", frame["rows"][1]],
        ["evaluation", "oktest", "oktest", "", 1],
    ]
    assert frame["fingerprint"].map(len).tolist() == [64] * 3 and frame["fingerprint"].is_unique
    assert "goat" not in frame.to_csv() and "cloth" not in frame.to_csv()
    assert frame["fingerprint"][2] == source_fingerprint(made.data.sources["oktest"])


def test_describe_says_which_revision(hub):
    known = {
        "new": {"reader": "advbench", "path": "village/latest"},
        "old": {"reader": "advbench", "path": "village/pinned", "revision": "abc"},
    }
    made = config(harmful="new", evaluation="old", sources=known)
    with pytest.warns(UserWarning, match="village/latest"):
        frame = describe(made.data, made.evaluation)
    assert frame["revision"].tolist() == ["latest", "abc"]


# ---- what a stage is made from -------------------------------------------------------------------


def files(stage="00_backbone", **values):
    return identity(config(**values), stage)["files"]


def test_files_behind_names_decide_a_stage():
    known = sources(advbench=write("adv.csv", goals(2)), oktest="village/ok")
    values = {
        "harmful": "advbench",
        "evaluation": ["sandbox", "oktest", write("mine.jsonl", goals(1))],
        "responses": write("r.csv", goals(1)),
        "wrappers": "shipped",
        "sources": known,
    }
    first = files(**values)
    assert set(first) == {"data.harmful", "data.evaluation", "data.responses", "data.wrappers"}
    for path, key in (
        ("adv.csv", "data.harmful"),
        ("mine.jsonl", "data.evaluation"),
        ("r.csv", "data.responses"),
    ):
        with Path(path).open("a") as file:
            file.write(" ")
        changed = files(**values)
        assert [name for name in first if first[name] != changed[name]] == [key]
        first = changed
    # the evaluation's files do not decide the derivation
    assert set(files("01_patch_derivation", **values)) == {"data.harmful", "data.responses"}
    assert "evaluation" not in STAGES["01_patch_derivation"].sections


def test_a_hub_id_needs_no_file_and_a_missing_file_is_an_error():
    known = sources(advbench="village/adv", oktest="gone.csv")
    assert files(harmful="advbench", sources=known) == {}
    for values, sentence in [
        ({"evaluation": "oktest"}, "data.sources.oktest.path is 'gone.csv': no such file"),
        ({"evaluation": ["sandbox", "none.jsonl"]}, "data.evaluation is 'none.jsonl': no such fi"),
        ({"responses": "r.csv"}, "data.responses is 'r.csv': no such file"),
        ({"wrappers": "w.txt"}, "data.wrappers is 'w.txt': no such file"),
    ]:
        with pytest.raises(SpkitError, match=sentence):
            files(**values, sources=known)


def test_texts_for_perplexity_decide_the_stages_that_use_them():
    path = write("texts.jsonl", [{"text": "the goat"}])
    made = Config.from_sources({"utility": {"perplexity": path}})
    assert set(identity(made, "00_backbone")["files"]) == {"utility.perplexity"}
    assert identity(made, "01_patch_derivation")["files"] == {}
    Path(path).unlink()
    with pytest.raises(SpkitError, match="utility.perplexity is 'texts.jsonl': no such file"):
        identity(made, "00_backbone")


def test_it_is_said_what_is_used_as_y(tmp_path):
    path = tmp_path / "advbench.csv"
    path.write_text("goal,target\nhow do i dye the goat ?,first take\n")
    source = {"reader": "advbench", "path": str(path)}
    values = {"harmful": "openings", "sources": {"openings": source}}
    assert "opening alone" in what_is_y(DataConfig(**values))
    said = what_is_y(DataConfig(**values, responses="mine.jsonl"))
    assert "mine.jsonl" in said and "opening" not in said
    assert what_is_y(DataConfig()) == "y: the source's own responses"
