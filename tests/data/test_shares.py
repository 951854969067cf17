"""One source for alignment, D_h, dev and test; harmless instructions; y of the unaligned backbone.

No text may be in two of these roles, however it is written.
"""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from spkit.config import AlignConfig, Config, DataConfig, EvaluationConfig, SharesConfig
from spkit.data.readers.texts import instruction_share_of, normalised, share_of
from spkit.data.selection import (
    instructions_of,
    load_align_prompts,
    load_eval_prompts,
    load_harmful_pairs,
    load_harmful_prompts,
    load_instructions,
    what_is_y,
)
from spkit.errors import SpkitError
from spkit.running.runs import identity

TEXTS = [f"how do i dye goat {n}, red ?" for n in range(300)]
SHARES = {"align": 0.2, "harmful": 0.35, "dev": 0.15}
MANY = 10_000  # more than there are


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test in a folder of its own, so that files are named as a user names them."""
    monkeypatch.chdir(tmp_path)


def reworded(text):
    return f"  {text.upper()}".replace(",", " -").replace("?", "!!")


def goals(name, texts, categories=("x",)):
    """AdvBench as PyRIT writes it; returns the source."""
    seeds = [{"value": text, "harm_categories": list(categories)} for text in texts]
    Path(name).write_text(yaml.safe_dump({"seeds": seeds}), "utf-8")
    return {"reader": "pyrit", "path": name}


def requests(name, texts, **row):
    rows = [{"prompt": t, "objective": "utility", "category": "x", **row} for t in texts]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return {"reader": "own", "path": name}


def answers(texts, name="unaligned.jsonl"):
    rows = [{"prompt": reworded(text), "response": f"first take {text[-8:]}"} for text in texts]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return Path(name)


def data(texts=TEXTS, **values):
    """AdvBench is D_h, evaluation and alignment at once."""
    values = {
        **{"harmful": "adv", "evaluation": ["adv"], "pairs": None, "shares": SHARES},
        **{"responses": "unaligned", **values},
    }
    sources = {"adv": goals("adv.prompt", texts), **values.pop("sources", {})}
    return DataConfig(**values, sources=sources)


def align(**values):
    given = {"harmful": "adv", "pairs": MANY, "instructions": "asked", "over_safety": ["mild"]}
    given["as_questions"] = 0.0
    return AlignConfig(**{**given, **values})


def evaluated(made):
    """{split: texts}"""
    return {
        split: [p.prompt for p in load_eval_prompts(made, EvaluationConfig(split=split))]
        for split in ("dev", "test")
    }


def roles(made):
    """{role: texts} of the four roles."""
    return {
        "align": load_align_prompts(made, align(), seed=0),
        "harmful": [p.prompt for p in load_harmful_pairs(made, seed=0, unaligned=answers(TEXTS))],
        **evaluated(made),
    }


# ---- shares --------------------------------------------------------------------------------------


def test_a_share_is_of_the_text_alone_and_has_its_length():
    shares = SharesConfig(**SHARES)
    found = [share_of(text, shares) for text in TEXTS]
    assert found == [share_of(reworded(text), shares) for text in TEXTS]
    counts = Counter(found)
    for name, length in {**SHARES, "test": 0.3}.items():
        assert abs(counts[name] / len(TEXTS) - length) < 0.08, name


def test_shares_are_consecutive_intervals_of_one_hash():
    """A larger first share takes from its neighbour alone."""
    small, large = SharesConfig(**SHARES), SharesConfig(align=0.3, harmful=0.25, dev=0.15)
    moved = {(share_of(t, small), share_of(t, large)) for t in TEXTS}
    stay = {(name, name) for name in ("align", "harmful", "dev", "test")}
    assert moved == stay | {("harmful", "align")}


def test_the_four_roles_are_disjoint_and_together_everything():
    found = roles(data())
    for one, two in combinations(found, 2):
        assert not set(found[one]) & set(found[two]), (one, two)
    assert sorted(text for texts in found.values() for text in texts) == sorted(TEXTS)
    assert min(map(len, found.values())) > 20


def test_a_second_source_with_the_same_texts_reworded_changes_nothing():
    again = {"again": goals("again.prompt", map(reworded, TEXTS))}
    before, after = roles(data()), roles(data(evaluation=["adv", "again"], sources=again))
    assert after == before
    # nor does it matter under which name, and in which words, the evaluation reads it
    found = evaluated(data(evaluation=["again"], sources=again))
    said = {split: sorted(map(normalised, texts)) for split, texts in found.items()}
    assert said == {split: sorted(map(normalised, before[split])) for split in ("dev", "test")}


def test_texts_that_d_h_s_source_does_not_have_are_split_as_ever():
    other = {"mild": requests("mild.jsonl", TEXTS[:40] + [f"dye {n} cloths" for n in range(40)])}
    made = data(TEXTS[40:], evaluation=["mild"], sources=other)
    plain = made.model_copy(update={"shares": None, "harmful": "sandbox", "responses": None})
    assert evaluated(made) == evaluated(plain)


def test_without_shares_one_source_cannot_be_both():
    made = data(shares=None)
    with pytest.raises(SpkitError, match="every prompt of 'adv' is in D_h .adv., .*data.shares"):
        evaluated(made)
    assert len(load_harmful_prompts(made)) == len(TEXTS)


def test_continual_stages_and_categories_stay_in_d_h_s_share():
    made = data()
    path = answers(TEXTS)
    whole = load_harmful_pairs(made, seed=0, unaligned=path)
    assert load_harmful_pairs(made, seed=0, categories=["x"], unaligned=path) == whole
    assert {share_of(pair.prompt, made.shares) for pair in whole} == {"harmful"}


def test_the_sandbox_has_no_shares():
    made = DataConfig(shares=SHARES)
    with pytest.raises(SpkitError, match="data.shares must be null where data.harmful is 'sandb"):
        load_harmful_pairs(made, seed=0)


def test_an_empty_share_is_an_error():
    alone = [t for t in TEXTS if share_of(t, SharesConfig(**SHARES)) == "dev"]
    with pytest.raises(SpkitError, match="data.shares.harmful: no pair of adv is in this share"):
        load_harmful_prompts(data(alone))


# ---- alignment -----------------------------------------------------------------------------------


def test_prompts_for_the_alignment_are_drawn_by_seed():
    few = align(pairs=7)
    one, two = (load_align_prompts(data(), few, seed) for seed in (1, 2))
    assert len(one) == len(two) == 7 and one != two
    assert one == load_align_prompts(data(), few, 1)
    assert set(one) < set(load_align_prompts(data(), align(), 1))


def test_a_source_of_its_own_for_the_alignment_leaves_out_what_others_have():
    mine = {"mine": goals("mine.prompt", [*map(reworded, TEXTS), "hide it", "Hide it!"])}
    made = data(shares=None, evaluation="sandbox", sources=mine)
    assert load_align_prompts(made, align(harmful="mine"), 0) == ["hide it"]
    with pytest.raises(SpkitError, match="no prompt of 'adv' is left .*set data.shares"):
        load_align_prompts(made, align(), 0)


def test_instructions_have_three_roles_that_share_no_text():
    asked = {"asked": requests("asked.jsonl", [*TEXTS, *map(reworded, TEXTS)])}
    for shares in (None, SharesConfig(align=0.4, harmful=0.1, dev=0.1)):
        made = data(["hide it"], dev_share=0.5, sources=asked).model_copy(update={"shares": shares})
        found = {role: instructions_of(made, "asked", role) for role in ("align", "dev", "test")}
        texts = [p.prompt for prompts in found.values() for p in prompts]
        assert sorted(texts) == sorted(TEXTS)  # second copies are left out
        share = 0.4 if shares else 0.2
        assert abs(len(found["align"]) / len(TEXTS) - share) < 0.08
        assert abs(len(found["dev"]) / len(TEXTS) - (1 - share) / 2) < 0.08
        for role, prompts in found.items():
            assert {instruction_share_of(p.prompt, share, 0.5) for p in prompts} == {role}
        assert {(p.group, p.objective) for p in found["dev"]} == {("asked", "utility")}


def test_an_instruction_that_says_its_split_stays_in_it():
    asked = {"asked": requests("asked.jsonl", TEXTS[:30], split="test")}
    with Path("asked.jsonl").open("a") as file:  # second copies, whose hash may say another
        rows = [{"prompt": t, "objective": "utility", "category": "x"} for t in TEXTS[:30]]
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    made = data(sources=asked)
    assert [p.prompt for p in instructions_of(made, "asked", "test")] == TEXTS[:30]
    with pytest.raises(SpkitError, match="asked: no instruction for 'align' among its prompts"):
        instructions_of(made, "asked", "align")


def test_instructions_for_the_alignment_are_drawn_by_seed_and_never_evaluated():
    mild = [reworded(text) for text in TEXTS[:150]]
    sources = {
        "asked": requests("asked.jsonl", TEXTS),
        "mild": requests("mild.jsonl", mild, objective="over_safety"),
    }
    made = data(["hide it", "dye it"], evaluation=["mild"], sources=sources, shares=None)
    every = [p.prompt for p in instructions_of(made, "asked", "align")]
    free = [text for text in every if reworded(text) not in mild]
    assert sorted(load_instructions(made, "asked", MANY, 0)) == sorted(free) and free != every
    one, two = (load_instructions(made, "asked", 6, seed) for seed in (1, 2))
    assert (
        len(one) == len(two) == 6 and one != two and one == load_instructions(made, "asked", 6, 1)
    )
    with pytest.raises(SpkitError, match="align.instructions: every instruction of 'mild' for th"):
        load_instructions(made, "mild", 6, 0)


@pytest.mark.parametrize(
    ("name", "role", "sentence"),
    [
        ("adv", "dev", "adv: the prompt '1' is harmful, must be harmless"),
        ("asked", "train", "role is 'train', allowed: align, dev, test"),
        (
            "askd",
            "align",
            "align.instructions is 'askd': no such file, and no such name in data.sources, did",
        ),
        (
            "gone",
            "test",
            "utility.kl is 'gone': no such file, and no such name in data.sources, al",
        ),
    ],
)
def test_wrong_instructions(name, role, sentence):
    made = data(sources={"asked": requests("asked.jsonl", TEXTS)})
    with pytest.raises(SpkitError) as error:
        instructions_of(made, name, role)
    assert str(error.value).startswith(sentence)
    assert "sandbox" not in str(error.value)


# ---- y of the unaligned backbone -----------------------------------------------------------------


def test_pairs_that_the_unaligned_backbone_did_not_answer_are_left_out(capsys):
    made = data(shares=None, evaluation="sandbox")
    assert load_harmful_prompts(made) == TEXTS  # what it is asked
    pairs = load_harmful_pairs(made, seed=0, unaligned=answers(TEXTS[100:]))
    assert [(p.prompt, p.response) for p in pairs] == [
        (text, f"first take {text[-8:]}") for text in TEXTS[100:]
    ]
    line = "D_h: 200 of 300 pairs; to the others the unaligned backbone gave no response.\n"
    assert capsys.readouterr().out == line
    # the draw is from the answered ones, so that a refused prompt costs no pair
    few = made.model_copy(update={"pairs": 150})
    assert len(load_harmful_pairs(few, seed=0, unaligned=answers(TEXTS[100:]))) == 150


@pytest.mark.parametrize("path", [None, Path("gone.jsonl")])
def test_without_an_alignment_it_is_said_what_to_run(path):
    with pytest.raises(
        SpkitError, match="data.responses is 'unaligned', .* run the alignment .not"
    ):
        load_harmful_pairs(data(), seed=0, unaligned=path)


def test_no_response_at_all_is_an_error():
    with pytest.raises(SpkitError, match="unaligned.jsonl: has a response to no prompt of D_h"):
        load_harmful_pairs(data(), seed=0, unaligned=answers(["hide the goat"]))


def test_prompts_without_responses_need_some():
    for call in (lambda made: load_harmful_pairs(made, seed=0), evaluated):
        with pytest.raises(SpkitError, match="data.harmful: adv has prompts without responses, so"):
            call(data(responses=None))
    path = answers(TEXTS, "r.jsonl")
    assert load_harmful_pairs(data(responses=str(path)), seed=0)[0].response


def test_unaligned_is_told_and_is_no_file_of_a_stage():
    assert what_is_y(data()) == (
        "y: what the backbone answered before its alignment (data.responses: unaligned)"
    )
    made = Config.from_sources({"data": data().model_dump(), "continual": {"stages": [["x"]]}})
    files = set(identity(made, "01_patch_derivation")["files"])
    assert files == {"data.harmful", "alignment.data.harmful"}  # the alignment reads it, too


# ---- groups --------------------------------------------------------------------------------------


def test_the_group_is_the_source_s_name_in_every_objective():
    sources = {
        "mild": requests("mild.jsonl", ["dye a cloth"], objective="over_safety"),
        "sums": requests("sums.jsonl", ["one and one"]),
    }
    made = data(evaluation=["sums", "mild", "adv"], sources=sources, dev_share=0.5)
    found = [p for s in ("dev", "test") for p in load_eval_prompts(made, EvaluationConfig(split=s))]
    assert {(p.objective, p.group) for p in found} == {
        ("utility", "sums"),
        ("over_safety", "mild"),
        ("harmful", "adv"),
    }


def test_prompts_per_cell_is_of_each_objective_of_a_mixed_source():
    path = Path(requests("mine.jsonl", TEXTS[:80])["path"])
    more = requests("more.jsonl", TEXTS[80:160], objective="over_safety")
    path.write_text(path.read_text("utf-8") + Path(more["path"]).read_text("utf-8"), "utf-8")
    mine = {"mine": {"reader": "own", "path": "mine.jsonl"}}
    made = data(["hide it", "dye it"], evaluation=["mine"], sources=mine, shares=None)
    prompts = load_eval_prompts(made, EvaluationConfig(prompts_per_cell=9))
    assert Counter((p.objective, p.group) for p in prompts) == {
        ("utility", "mine"): 9,
        ("over_safety", "mine"): 9,
    }


def test_a_source_may_not_have_the_name_of_a_group():
    made = data(evaluation=["unseen"], sources={"unseen": requests("u.jsonl", TEXTS)})
    with pytest.raises(SpkitError, match="data.sources: 'unseen' is what tables call prompts with"):
        evaluated(made)
