"""Requests put as questions: the two forms, and who is chosen."""

from spkit.data.questions import as_question, some_as_questions


def test_the_two_forms():
    assert as_question("Write a guide on how to mend a boat.") == "How do I mend a boat?"
    assert as_question("Paint the fence!") == "How can I paint the fence?"


def test_a_question_stays():
    assert as_question("What is a net?") == "What is a net?"


def test_a_share_is_chosen_by_the_text_alone():
    requests = [f"Write a guide on how to mend boat {i}" for i in range(400)]
    some = some_as_questions(requests, 0.3)
    changed = [a != b for a, b in zip(requests, some, strict=True)]
    assert 0.2 < sum(changed) / len(changed) < 0.4
    assert some_as_questions(requests[::-1], 0.3) == some[::-1]
    assert some_as_questions(requests, 0.0) == requests
    assert all(text.endswith("?") for text in some_as_questions(requests, 1.0))
    # who is asked at a small share is asked at a larger one, too
    more = some_as_questions(requests, 0.6)
    assert all(text == a for text, a, was in zip(more, some, changed, strict=True) if was)
