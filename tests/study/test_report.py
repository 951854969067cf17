"""The committed tables of the study, and the pages that show them."""

from pathlib import Path

import pandas as pd
import pytest

from spkit.errors import SpkitError
from spkit.study import report
from spkit.study.tables import skill_table
from spkit.study.variants import NAMES

ROOT = Path(__file__).parents[2]
TABLES = ROOT / "docs" / "smollm2"
PAGES = ("README.md", "docs/real.md")


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_show_the_committed_tables(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- study: " in text
    assert report.filled(text, report.read(TABLES)) == text, "run make publish-real"


def test_every_row_is_there_and_the_command_names_no_folder():
    tables = report.read(TABLES)
    assert list(report.main_table(tables)["model"]) == list(NAMES)
    command = tables["about"].set_index("what").loc["command", "value"]
    assert command.startswith("spkit study params/smollm2-135m.yaml") and "/work" not in command


def test_an_unknown_block_and_a_missing_table(tmp_path):
    with pytest.raises(SpkitError, match="no block 'mian', did you mean main"):
        report.filled("<!-- study: mian -->\n<!-- end -->", report.read(TABLES))
    with pytest.raises(SpkitError, match="make real BUDGET=full"):
        report.read(tmp_path)


def skills(**values):
    rows = [
        {
            "kind": "lm-eval",
            "task": "t",
            "metric": "acc,none",
            "variant": v,
            "backbone": b,
            "value": x,
        }
        for v, own in values.items()
        for b, x in enumerate(own)
    ]
    return pd.DataFrame(rows)


def test_a_difference_of_skill_by_hand():
    # differences -0.02, -0.04, -0.03: mean -0.03, standard error 0.00577, t(0.975, 2) = 4.303
    frame = skill_table(skills(base=[0.5, 0.6, 0.7], ours=[0.48, 0.56, 0.67]), 0.95)
    own = frame[frame["variant"] == "ours"].iloc[0]
    assert own["difference"] == pytest.approx(-0.03)
    assert own["low"] == pytest.approx(-0.03 - 4.303 * 0.0057735, abs=1e-5)
    base = frame[frame["variant"] == "base"].iloc[0]
    assert base["low"] == base["high"] == base["difference"] == 0.0


def test_a_goal_is_told_as_it_is():
    tables = {
        "differences": pd.DataFrame(
            [
                ("ours", "harmful", "advbench", -9.0, -12.0, -3.0),
                ("ours", "refusal", "xstest", 1.0, -2.0, 4.0),
                ("ours", "refusal", "oktest", 5.0, 2.0, 8.0),
            ],
            columns="variant metric source difference low high".split(),
        ),
        "skills": pd.DataFrame(
            [("ours", "x", "kl", 0.2, 0.2), ("ours", "piqa", "acc,none", 0.5, -0.01)],
            columns="variant task metric mean difference".split(),
        ),
    }
    lines = report.goal(tables, "ours")
    assert "lower, its interval below zero" in lines[0]
    assert "no clear difference" in lines[1]
    assert "higher, its interval above zero" in lines[2]
    assert "KL 0.20 nats, above the goal of 0.1" in lines[3]
    assert "piqa -1.0 points, within the loss of 2 that is allowed" in lines[4]
