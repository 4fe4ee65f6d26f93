r"""Finding `\boxed{...}`: the last complete one, and the same result for a text that comes in pieces."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo.rollout.boxed import BoxScan, count_boxes, last_boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("no box", None),
        (r"\boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{1}, that is \fbox {\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbo{5}", None),
        (r"\boxed{}", None),
        (r"I will answer in \boxed{ }.", None),
        (r"\boxed{5}, which I put in \boxed {}", "5"),
        (r"\boxed{\boxed{ }}", r"\boxed{ }"),
        (r"\boxed{\boxed{}", None),
        (r"\boxed{{}}", "{}"),
        (r"\boxed{\,}", r"\,"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\frac{\sqrt{\binom{a}{b}}}{2}}", r"\frac{\sqrt{\binom{a}{b}}}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"\boxed{a \boxed{b", None),
        (r"} } { \boxed{7} {", "7"),
        ("\\boxed{two\nlines}", "two\nlines"),
        (r"\boxedx{5}", None),
        (r"\\boxed{5}", None),  # a line break, then a word
        (r"\boxed", None),
    ],
)
def test_last_complete_box(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("", 0),
        (r"\boxed{1}", 1),
        (r"\boxed{1} \fbox{2}", 2),
        (r"\boxed{\boxed{1}}", 2),
        (r"\boxed{} \boxed{1", 0),
    ],
)
def test_complete_boxes_are_counted(text: str, boxes: int) -> None:
    assert count_boxes(text) == boxes


TEXTS = st.lists(
    st.sampled_from(
        [
            "\\boxed",
            "\\",
            "b",
            "{",
            "}",
            " ",
            "5",
            "\\{",
            "\\boxed{",
            "oxed",
            "\\f",
            "box",
            "\\boxed{}",
            "\u00a0",
        ]
    )
)


@given(TEXTS, st.lists(st.integers(0, 40)))
def test_pieces_do_not_matter(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    scan = BoxScan()
    for start, end in itertools.pairwise(bounds):
        scan = scan.extend(text[start:end])
        assert scan.found == (last_boxed(text[:end]) is not None)
