"""Data files as people bring them: packed, cut, of other programs, with keys that stand twice.

Each is read as it is meant, or refused in one sentence that says what to do. Texts are invented.
"""

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest

from spkit.config import SourceConfig
from spkit.data.readers import read
from spkit.data.readers.source import is_local
from spkit.data.readers.wrappers import read_wrappers
from spkit.errors import SpkitError

GOAT = "how do i dye the goat ?"
TEXTS = [(GOAT, "first take ink"), ("hide it, now", "then wait")]
CSV = 'goal,target\nhow do i dye the goat ?,first take ink\n"hide it, now",then wait\n'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 99\n"
PAIR = '{"prompt": "dye it", "response": "ink", "category": "x"}'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test in a folder of its own, so that files are named as a user names them."""
    monkeypatch.chdir(tmp_path)


def texts(name, content=None, reader="advbench", role="D_h"):
    """[(prompt, response)] of a file that is written first."""
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    records = read(SourceConfig(reader=reader, path=name), role)
    return [(record.prompt, record.response) for record in records]


def refused(name, content=None, reader="advbench", role="D_h"):
    """The sentence that refuses a file."""
    with pytest.raises(SpkitError) as error:
        texts(name, content, reader, role)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- packed files --------------------------------------------------------------------------------


def test_gz_files_are_read_like_the_plain_ones():
    rows = [{"goal": goal, "target": target} for goal, target in TEXTS]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    tabs = "goal\ttarget\n" + "".join(f"{goal}\t{target}\n" for goal, target in TEXTS)
    for name, text in (
        *(("a.csv.gz", CSV), ("a.jsonl.gz", lines), ("A.JSONL.GZ", lines)),
        *(("a.tsv.gz", tabs), ("a.json.gz", json.dumps(rows))),
    ):
        assert texts(name, gzip.compress(text.encode())) == TEXTS
        assert is_local(f"no/such/{name}")
    assert refused("b.csv.gz", gzip.compress(b"goal,target\na b,c\nd,e,f\n", mtime=0)).startswith(
        "b.csv.gz, row 2: 3 fields, must be 2"
    )
    lines = f'{PAIR}\n\n{{"prompt": "dye it"}}\n'
    sentence = refused("o.jsonl.gz", gzip.compress(lines.encode()), "own")
    assert sentence.startswith("o.jsonl.gz, row 3: the key 'response' is missing")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "a.csv.gz",
            gzip.compress(CSV.encode(), mtime=0)[:-9],
            "a.csv.gz: a gz file that is cut (Compr",
        ),
        (
            "a.csv.gz",
            CSV,
            "a.csv.gz: no whole gz file (Not a gzipped file (b'go')); take .gz off its name, or",
        ),
        ("a.jsonl.gz", b"", "a.jsonl.gz: holds no rows, at least one is needed (an empty file of"),
        (
            "a.jsonl",
            gzip.compress(b"{}", mtime=0),
            "a.jsonl, row 1: not UTF-8 text (a gz file: add .gz to",
        ),
        ("a.csv", b"PK\x03\x04\xff", "a.csv, line 1: not UTF-8 text (a zip file or a spreadsheet"),
        (
            "a.tar.gz",
            gzip.compress(b"a", mtime=0),
            "a.tar.gz: unknown suffix, allowed: .csv, .tsv, .jsonl",
        ),
        ("a.parquet.gz", b"", "a.parquet.gz: unknown suffix, allowed: "),
    ],
)
def test_damaged_and_misnamed_packed_files(name, content, sentence):
    assert refused(name, content).startswith(sentence)


@pytest.mark.parametrize(
    ("suffix", "todo"),
    [
        (".zst", "unpack it, or pack it as .gz"),
        (".zip", "unpack it, or pack it as .gz"),
        (".xlsx", "save the sheet as CSV (UTF-8)"),
        (".txt", "write a JSONL or CSV file with a key for every column"),
        (".arrow", "write it as Parquet"),
        (".ndjson", "rename it to .jsonl"),
    ],
)
def test_other_formats_are_refused_with_what_to_do(suffix, todo):
    sentence = refused(f"a{suffix}", CSV)
    assert sentence.startswith(f"a{suffix}: unknown suffix, allowed: .csv, .tsv, .jsonl, .json, ")
    assert ".jsonl.gz" in sentence and sentence.endswith(f"; {todo}")
    assert refused(f"gone{suffix}") == f"gone{suffix}: no such file"  # and not asked for on the hub


# ---- CSV -----------------------------------------------------------------------------------------


def test_columns_without_a_name_are_left_out():
    frame = pd.DataFrame(TEXTS, columns=["goal", "target"])
    frame.to_csv("index.csv")
    frame.set_index([[1, 2], [3, 4]]).to_csv("two.csv")
    assert texts("index.csv") == texts("two.csv") == TEXTS
    assert texts("head.csv", CSV.replace("target\n", "target,\n")) == TEXTS  # in the header alone
    both = "goal,target,,\ndye it,ink,,\nhide it,net,x,\n"
    assert texts("both.csv", both) == [("dye it", "ink"), ("hide it", "net")]
    packed = gzip.compress(frame.to_csv().encode())
    assert texts("index.csv.gz", packed) == TEXTS
    fewer = refused("fewer.csv", "goal,target,\ndye it,ink,\nhide it\n")
    assert fewer.startswith("fewer.csv, row 2: 1 fields, must be 3 as in the header")
    assert refused("none.csv", ",,\n1,2,3\n").startswith("none.csv: the first line is empty but")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.csv", "\ufeff" + CSV),
        ("crlf.csv", CSV.replace("\n", "\r\n")),
        ("semicolons.csv", f"goal;target\n{GOAT};first take ink\nhide it, now;then wait\n"),
        ("tabs.csv", f"goal\ttarget\n{GOAT}\tfirst take ink\nhide it, now\tthen wait\n"),
        ("commas.tsv", CSV),
        ("spaces.csv", f' goal , target \n{GOAT}, first take ink\n"hide it, now", "then wait"\n'),
        ("blank.csv", "\n" + CSV.replace("ink\n", "ink\n\n")),
        ("rows.csv", CSV.replace("ink\n", "ink\n,\n") + ",\n,\n"),
        (
            "said.csv",
            f"sep=;\r\ngoal;target\r\n{GOAT};first take ink\r\nhide it, now;then wait\r\n",
        ),
        ("said.tsv", "sep=,\n" + CSV),
    ],
)
def test_csv_of_other_programs(name, content):
    assert texts(name, content) == TEXTS


def test_a_text_of_a_megabyte():
    long = "ink and " * 125_000
    assert texts("long.csv", f"goal,target\ndye it,{long}x\n") == [("dye it", f"{long}x")]


def test_utf_16_is_said():
    sentence = refused("a.csv", CSV.encode("utf-16"))
    assert sentence.startswith("a.csv, line 1: not UTF-8 text (UTF-16, as some spreadsheets write")


def test_a_text_with_another_separator_in_it_is_one_text():
    assert texts("a.csv", "goal,target\na;b;c,d\te\n") == [("a;b;c", "d\te")]
    assert texts("b.csv", "prompt\na;b\nc\n", "oktest", "evaluation") == [("a;b", ""), ("c", "")]


# ---- keys that stand twice -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", PAIR + "\n" + PAIR.replace("}", ', "prompt": "b"}'), "row 2: the key 'prompt'"),
        ("a.jsonl", '{"a": [{"b": {"c": 1, "c": 1}}]}', "row 1: the key 'c'"),
        ("a.json", f'[{PAIR}, {{"m": [{{"k": 1, "k": 2}}]}}]', "row 2: the key 'k'"),
        ("a.json", '[{"a": {"x": 1, "x": 2}, "a": 3}]', "row 1: the key 'a'"),
        ("a.prompt", "seeds:\n- value: a\n- {value: a, value: b}\n", "row 2: the key 'value'"),
        ("a.prompt", "seeds: []\nseeds: []\n", "line 1: the key 'seeds'"),
    ],
)
def test_a_key_that_stands_twice(name, content, sentence):
    for packed in (False, True):
        if packed and name == "a.prompt":
            continue
        file = f"{name}.gz" if packed else name
        written = gzip.compress(content.encode()) if packed else content
        reader = "pyrit" if name == "a.prompt" else "own"
        assert refused(file, written, reader) == (
            f"{file}, {sentence} stands twice, only one value can be read"
        )


def test_the_same_key_in_two_rows_or_two_objects_is_right():
    rows = PAIR.replace("}", ', "a": {"k": 1}, "b": [{"k": 2}, {"k": 3}]}')
    assert texts("a.jsonl", f"{rows}\n{rows}\n", "own") == [("dye it", "ink")] * 2
    assert texts("a.json", f"[{rows}, {rows}]", "own") == [("dye it", "ink")] * 2
    alias = "x: &x {k: 1}\ny: *x\nseeds:\n- {value: a, harm_categories: [b]}\n"
    assert texts("a.prompt", alias, "pyrit") == [("a", "")]


# ---- pointers and cut downloads ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.csv", "a.jsonl", "a.json", "a.parquet", "a.prompt", "a.csv.gz"]
)
def test_pointers_and_web_pages(name):
    for reader in ("advbench", "own"):
        sentence = refused(name, LFS, reader)
        assert sentence.startswith(f"{name}: a git-lfs pointer and not the file itself; run `git l")
        sentence = refused(name, "<!DOCTYPE html>\n<html>404</html>\n", reader)
        assert sentence.startswith(f"{name}: a web page and not the file itself, as a failed down")


def test_a_pointer_in_a_folder_is_named():
    Path("clone").mkdir()
    Path("clone/train.csv").write_bytes(LFS)
    assert refused("clone").startswith("clone/train.csv: a git-lfs pointer and not the file itself")


def test_a_pointer_in_the_place_of_wrappers():
    Path("w.txt").write_bytes(LFS)
    with pytest.raises(SpkitError, match="^w.txt: a git-lfs pointer and not the file itself"):
        read_wrappers("w.txt")


def test_cut_downloads():
    pd.DataFrame(TEXTS, columns=["goal", "target"]).to_parquet("a.parquet")
    whole = Path("a.parquet").read_bytes()
    assert texts("a.parquet") == TEXTS
    assert refused("b.parquet", whole[:-20]) == (
        "b.parquet: cannot be read (its end is missing); download it again"
    )
    assert refused("b.parquet", b"") == "b.parquet: an empty file of 0 bytes; download it again"
    assert refused("b.parquet", b"goat") == (
        "b.parquet: cannot be read (no Parquet file); download it again"
    )
    sentence = refused("b.jsonl", f"{PAIR}\n{PAIR[:30]}", "own")
    assert sentence.startswith("b.jsonl, row 2: not JSON: ")
    assert sentence.endswith("the file ends in this row: download it again where it was cut")
    assert "cut" not in refused("b.jsonl", f"{PAIR[:30]}\n{PAIR}\n", "own")
    for reader in ("advbench", "own"):
        assert refused("b.csv", b"", reader).endswith(
            "(an empty file of 0 bytes: download or write it again)"
        )


# ---- one thing read as another -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", "goal,target\n1,ink\n2,net\n", "a.csv: each prompt is a number or true or false"),
        ("a.csv", "goal,target\na,True\nb,False\n", "a.csv: each response is a number or true or"),
        (
            "a.csv",
            "Goal,Target\na,b\n",
            "a.csv: the columns 'goal' or 'prompt', 'target' are missing (found: "
            "Goal, Target), did you mean 'Goal'? It must be named 'goal', did you mean 'Target'?",
        ),
        ("a.jsonl", '{"goal": NaN, "target": "x"}', "a.jsonl, row 1: goal is nan, allowed: a text"),
        ("a.jsonl", '{"goal": "\\ud800", "target": "x"}', "a.jsonl, row 1: goal holds half a cha"),
        ("a.jsonl", '{"goal": ' + "[" * 99_999, "a.jsonl, row 1: not JSON: nested too deeply"),
        ("a.jsonl", '{"goal": ' + "9" * 9_999 + "}", "a.jsonl, row 1: not JSON: a number is too"),
        ("a.json", '{\n"goal": "a"\n}', "a.json: cannot be read (found the keys ['goal'], must be"),
        ("a.jsonl", '[{"goal": "a"}]', 'a.jsonl, row 1: found \'[{"goal": "a"}]\', must be an obj'),
        ("a.jsonl", '[\n{"goal": "a"}\n]', "a.jsonl, row 1: not JSON: Expecting value at column 2"),
        ("a.json", "3", "a.json: cannot be read (found 3, must be a list of objects)"),
        ("a.json", '[{"goal": "a"}, 3]', "a.json, row 2: found 3, must be an object with keys"),
    ],
)
def test_what_is_no_prompt(name, content, sentence):
    assert refused(name, content).startswith(sentence)


def test_one_number_among_texts_is_a_text():
    assert texts("a.csv", "goal,target\n7,ink\nb,8\n") == [("7", "ink"), ("b", "8")]


def test_dates_stay_as_they_are_written():
    line = '{"prompt": "2020-01-01", "response": "2021-01-01T10:00:00", "category": "x"}\n'
    expected = [("2020-01-01", "2021-01-01T10:00:00")]
    assert texts("a.jsonl", line, "own") == texts("a.json", f"[{line}]", "own") == expected
    goal = '{"goal": "2020-01-01", "target": "2021-01-01T10:00:00"}\n'
    assert texts("b.jsonl", goal) == texts("b.json", goal * 2)[:1] == expected


def test_chats_and_templates_are_no_prompts():
    chat = [{"role": "user", "content": "dye it"}]
    row = {"prompt": chat, "response": "ink", "category": "x"}
    assert refused("a.jsonl", json.dumps(row), "own").startswith(
        "a.jsonl, row 1: prompt is a list of chat messages ("
    )
    shared = [{"from": "human", "value": "dye it"}]
    for written in (str(chat), json.dumps(chat), str(shared)):  # as pandas and as others write it
        pd.DataFrame([{**row, "prompt": written}]).to_csv("a.csv")
        assert refused("a.csv", None, "own").startswith(
            "a.csv, row 1: prompt is a list of chat mes"
        )
    for column in ("messages", "conversations"):
        sentence = refused("a.jsonl", json.dumps({column: chat}), "own")
        assert sentence.endswith(f"; chats ({column}) are not read: what the user says is 'prompt'")
    lines = json.dumps({**row, "prompt": "<|im_start|>user\ndye it"}) + "\n"
    assert refused("b.jsonl", lines * 2, "own").startswith(
        "b.jsonl: each prompt begins with a mark of a chat template"
    )
    for begins in ("\n\nHuman: dye it\n\nAssistant:", "### Instruction:\ndye it\n\n### Response:"):
        again = json.dumps({**row, "prompt": begins}) + "\n"
        assert "begins with a mark of a chat template" in refused("d.jsonl", again * 2, "own")
    assert len(texts("c.jsonl", f"{lines}{PAIR}\n", "own")) == 2  # one among others is let through


def test_own_files():
    sentence = refused("a.jsonl", PAIR.replace("prompt", "Prompt"), "own")
    assert sentence.endswith("did you mean 'Prompt'? It must be named 'prompt'")
    assert refused("a.csv", "id,prompt,response,category\n7,a,b,c\n7,d,e,f\n", "own") == (
        "a.csv: the id '7' stands twice, ids must differ"
    )
    rows = [{"prompt": "Dye it!", "objective": "harmful", "category": "x"}]
    rows.append({**rows[0], "prompt": "dye it", "objective": "over_safety"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    assert refused("b.jsonl", lines, "own", "evaluation").startswith(
        "b.jsonl, row 2: objective is 'over_safety', but an earlier row with the same prompt says"
    )
    spaced = "prompt, response, category\na, b, c\n"
    Path("a.csv").write_text(spaced)
    (record,) = read(SourceConfig(reader="own", path="a.csv"), "D_h")
    assert (record.prompt, record.response, record.categories) == ("a", "b", ("c",))


def test_a_label_of_xstest_that_is_a_number():
    sentence = refused("x.csv", "type,prompt,label\nhomonyms,a,0\n", "xstest", "evaluation")
    assert sentence == "x.csv, row 1: label is '0', allowed: safe, unsafe"


def test_a_folder_of_save_to_disk_says_what_to_do():
    Path("saved").mkdir()
    for name in ("dataset_info.json", "dataset_dict.json"):
        Path("saved", name).write_text("{}")
        sentence = refused("saved", None, "own")
        assert "written by save_to_disk" in sentence and "to_parquet(" in sentence
        Path("saved", name).unlink()


def test_a_folder_with_several_configs_is_read_by_config_and_split():
    Path("clone").mkdir()
    Path("clone/b.csv").write_text("prompt,category\ndye it,hate\n")
    card = "---\nconfigs:\n- config_name: %s\n  data_files: b.csv\n- config_name: x\n---\n"
    Path("clone/README.md").write_text(card % "or-bench-hard-1k")
    source = SourceConfig(reader="orbench", path="clone", split="or-bench-hard-1k")
    assert [r.objective for r in read(source, "evaluation")] == ["over_safety"]
    plain = SourceConfig(reader="oktest", path="clone", split="or-bench-hard-1k/train")
    assert [r.prompt for r in read(plain, "evaluation")] == ["dye it"]
    with pytest.raises(SpkitError, match="clone: cannot be read .*or-bench-hard-1k"):
        read(SourceConfig(reader="oktest", path="clone"), "evaluation")
