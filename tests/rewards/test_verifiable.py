"""Tests of the rewards that check a completion, with answers worked by hand."""

import pytest

from raywarp.config.rewards import RewardConfig
from raywarp.rewards.functions import call_of, load_function
from raywarp.rewards.score import reward_fingerprint
from raywarp.rewards.verifiable import final_answer, is_equal, length, math_answer, think_format


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ("48 / 2 = 24, so 48 + 24 = 72.\n#### 72", "clips: <<48/2=24>>24 … #### 72", True),
        ("The answer is 72.", "#### 72", True),
        ("I think it is 72 apples", "#### 72", True),
        ("First 72, then 73", "#### 72", False),
        ("The answer is $1,250.50", "1250.5", True),
        (r"thus \boxed{\frac{1}{2}}", "0.5", True),
        (r"thus \boxed{\dfrac{-3}{4}}", r"\boxed{-\frac{3}{4}}", True),
        (r"\boxed{3} no, \boxed{\sqrt{x^{2}}}", r"\sqrt{x^{2}}", True),
        (r"\boxed{\text{Monday}}", "monday", True),
        (r"\boxed{(1, 2)}", r"\boxed{(1,2)}", True),
        (r"\boxed{(1, 2)}", r"\boxed{(2,1)}", False),
        ("<think>it is 5</think> 6", "5", False),
        ("no number at all", "5", False),
        ("50%", "50", True),
        ("-3", "3", False),
        ("1/0", "1/0", True),
    ],
)
def test_final_answers_are_compared_as_what_they_are(text: str, reference: str, same: bool) -> None:
    assert is_equal(text, reference) is same
    assert math_answer([text], [reference]) == [float(same)]


def test_an_unclosed_box_is_no_answer_and_a_missing_reference_does_not_apply() -> None:
    assert final_answer(r"so 7 and \boxed{8") == "8"
    assert final_answer("nothing") is None
    assert math_answer(["7", "7"], [None, "7"]) == [None, 1.0]


def test_the_format_is_whole_and_each_part_is_there_once() -> None:
    right = "<think>a\nb</think>\n<answer>c</answer>"
    wrong = [right + " more", right.replace("</think>", ""), right + right, "<answer>c</answer>"]
    assert think_format([right, *wrong]) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_length_is_counted_in_tokens() -> None:
    assert length([[1, 2, 3], []]) == [0.03, 0.0]


@pytest.mark.parametrize("name", ["math_answer", "think_format", "length"])
def test_a_configuration_can_name_them(name: str) -> None:
    path = f"raywarp.rewards.verifiable:{name}"
    call_of(path, load_function(path), ["answer", "level"])
    assert reward_fingerprint(RewardConfig(function=path)) == f"verifiable.{name}.1"
