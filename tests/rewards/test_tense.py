"""Tests of the reward for the present tense."""

from raywarp.rewards.tense import present


def test_the_present_tense_is_counted() -> None:
    texts = [
        "It's a film that is, is, is and has heart.",
        "It was loved, and it shows",
        "A breed of need, indeed",
        "We laughed",
        "",
    ]
    assert present(texts) == [3.0, -1.0, 1.0, -1.0, 0.0]
