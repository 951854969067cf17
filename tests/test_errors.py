"""An error quotes files that nobody trusts, and goes to a terminal."""

import pytest

from spkit.errors import LONGEST, SpkitError


@pytest.mark.parametrize(
    "given, shown",
    [
        ("plain, with ü, 中 and\na second line", "plain, with ü, 中 and\na second line"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\tb\0", "a\\tb\\x00"),
        ("right to left \u202e", "right to left \\u202e"),
        ("half a pair \ud800", "half a pair \\ud800"),
    ],
)
def test_what_no_terminal_should_get_is_escaped(given, shown):
    assert str(SpkitError(given)) == shown


def test_the_middle_of_a_long_text_is_left_out():
    text = str(SpkitError("where: " + "\0" * 10**6 + " what was expected"))
    assert text.startswith("where: \\x00") and text.endswith(" what was expected")
    assert len(text) <= LONGEST


def test_a_page_is_not_cut():
    assert str(SpkitError("a" * LONGEST)) == "a" * LONGEST
