"""The prompts that come with the kit: complete, readable, and no two of them nearly the same."""

import re
from collections import Counter
from itertools import combinations

import pytest

from spkit.config import SourceConfig
from spkit.data.readers import own
from spkit.data.readers.texts import normalised
from spkit.data.shipped import NAMES, shipped
from spkit.errors import SpkitError

CATEGORIES = {
    "over_safety": "double_meaning pests_household cooking_food games_fiction medicine_safety "
    "history_news security_defence law_rights body_sexual_health everyday_science",
    "instructions": "explain write list plan how_to compare advice rewrite question idea maths "
    "code",
}
EACH = 30  # prompts of a category
WORDS = range(5, 31)  # words of a prompt
ALIKE = 0.6  # two prompts that share more of their words than this are nearly the same
# what no plain instruction may hold
LOUD = frozenset(
    "kill killer killed die died dead death deadly murder shoot shot gun weapon bomb explode "
    "attack fight war blood stab knife poison toxic drug drunk alcohol sex naked steal thief rob "
    "burglar hack crime criminal illegal prison police fraud scam hurt harm danger dangerous "
    "fire burn".split()
)


def records(name):
    return own.prompts(SourceConfig(reader="own", path=str(shipped(name))))


def words(prompt):
    return frozenset(normalised(prompt).split())


def shared(first, second):
    """The share of the words of either that both have, from 0 to 1."""
    return len(first & second) / len(first | second)


def too_alike(prompts):
    """Pairs of prompts that share more than ALIKE of their words."""
    sets = [(prompt, words(prompt)) for prompt in prompts]
    return [(a, b) for (a, x), (b, y) in combinations(sets, 2) if shared(x, y) > ALIKE]


def test_prompts_that_are_too_alike_are_found():
    near = ["How do I peel a ripe mango?", "How do I peel a mango?", "Why do cats purr?"]
    assert too_alike(near) == [(near[0], near[1])]


@pytest.mark.parametrize("name", NAMES)
def test_every_category_has_its_prompts(name):
    found = records(name)
    assert Counter(r.categories for r in found) == {(c,): EACH for c in CATEGORIES[name].split()}
    assert {r.objective for r in found} == {"over_safety"}
    assert len({r.id for r in found}) == len(found)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_a_sentence_or_two_without_stray_spaces(name):
    prompts = [r.prompt for r in records(name)]
    assert [p for p in prompts if len(p.split()) not in WORDS] == []
    assert [p for p in prompts if p != " ".join(p.split()) or not re.search(r'[.?!"]$', p)] == []


def test_no_prompt_is_in_either_file_twice_nor_nearly():
    prompts = [r.prompt for name in NAMES for r in records(name)]
    assert [p for p, n in Counter(map(normalised, prompts)).items() if n > 1] == []
    assert too_alike(prompts) == []


def test_plain_instructions_hold_no_word_that_sounds_harmful():
    assert {r.prompt: words(r.prompt) & LOUD for r in records("instructions")} == {
        r.prompt: frozenset() for r in records("instructions")
    }
    loud = [r for r in records("over_safety") if words(r.prompt) & LOUD]
    assert len(loud) > 100  # the same list finds such words where they belong


def test_ids_do_not_meet_when_both_files_are_used():
    ids = [r.id for name in NAMES for r in records(name)]
    assert len(set(ids)) == len(ids)


def test_the_readme_counts_the_classes_as_they_are():
    text = shipped("over_safety").with_name("README.md").read_text(encoding="utf-8")
    listed = {name: int(n) for name, n in re.findall(r"^\| (\w+) \| (\d+) \|", text, re.MULTILINE)}
    assert listed == Counter(r.categories[0] for r in records("over_safety"))
    assert f"{len(records('over_safety'))} prompts" in text
    assert f"{len(records('instructions'))} plain tasks" in text


def test_an_unknown_name_is_an_error():
    with pytest.raises(SpkitError, match="'oversafety', allowed: over_safety, instructions"):
        shipped("oversafety")
