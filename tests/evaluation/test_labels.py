"""One name, one method: what "SafePatching" is called where it is shown."""

import pandas as pd
import pytest

from spkit.comparison.methods import METHODS, balanced
from spkit.config import PatchingConfig
from spkit.evaluation.labels import BALANCED, OF_THE_RUN, SAFEPATCHING, labelled

FIXED = PatchingConfig(balance=None)
FOUND = PatchingConfig(balance=0.9)


def frame() -> pd.DataFrame:
    return pd.DataFrame({"model": ["base", SAFEPATCHING], "metric": "harmful", "k": [3, 1]})


def test_the_label_is_the_comparisons_name_of_that_method():
    assert BALANCED == balanced.NAME and BALANCED in METHODS and SAFEPATCHING in METHODS


@pytest.mark.parametrize("name", ["base", "SE only", "GA", "joint training", BALANCED])
def test_other_names_stay(name):
    assert labelled(name, FOUND) == labelled(name, FIXED) == name


def test_a_name():
    assert labelled(SAFEPATCHING, FOUND) == BALANCED
    assert labelled(SAFEPATCHING, FIXED) == SAFEPATCHING


@pytest.mark.parametrize("column", ["model", "method", "variant"])
def test_a_column_of_a_frame_and_nothing_else(column):
    given = frame().rename(columns={"model": column}).assign(note=SAFEPATCHING)
    made = labelled(given, FOUND)
    assert made[column].tolist() == ["base", BALANCED]
    assert made.drop(columns=column).equals(given.drop(columns=column))
    assert given[column].tolist() == ["base", SAFEPATCHING]  # a copy: files keep their bytes
    assert labelled(given, FIXED) is given


def test_an_index():
    table = frame().set_index("model")
    assert labelled(table, FOUND).index.tolist() == ["base", BALANCED]
    assert labelled(table, FOUND).index.name == "model"
    assert labelled(table["k"], FOUND).to_dict() == {"base": 3, BALANCED: 1}
    two = pd.concat({0: table, 1: table}, names=["seed"])
    assert labelled(two, FOUND).index.tolist() == [
        (seed, name) for seed in (0, 1) for name in ("base", BALANCED)
    ]


def test_a_categorical_column():
    given = frame().astype({"model": "category"})
    assert labelled(given, FOUND)["model"].tolist() == ["base", BALANCED]


@pytest.mark.parametrize("where", ["column", "index"])
def test_two_methods_never_get_one_label(where):
    given = pd.concat([frame(), frame().iloc[1:].assign(model=BALANCED)], ignore_index=True)
    given = given if where == "column" else given.set_index("model")
    made = labelled(given, FOUND)
    names = made["model"].tolist() if where == "column" else made.index.tolist()
    assert names == ["base", OF_THE_RUN, BALANCED]
    if where == "index":
        two = pd.concat({0: given}, names=["seed"])
        assert [name for _, name in labelled(two, FOUND).index] == names
