r"""What counts as the answer of a response: `reward.answer`.

    boxed            the content of the last \boxed{...}
    boxed_or_last    that; without a box, what follows the last "the answer is" or "Answer:"; without either,
                     the last number
    after:"TEXT"     what follows the last TEXT, such as "#### "

The order of `boxed_or_last` is that of the official scorer (`extract_answer`). It departs from that scorer in
what it reads: a statement ends with its sentence ("The answer is 18 dollars, because ..."), and a number
keeps its sign, thousands, fraction, power and percent sign, where the official pattern reads 4 of 3/4 and 2
of 5 cm^2. An answer is always a piece of the response; nothing is computed.
"""

import re

from treepo.rewards.stated_answer import last_number, stated
from treepo.rollout.boxed import last_boxed

BOXED, BOXED_OR_LAST, AFTER = "boxed", "boxed_or_last", 'after:"TEXT"'
RULES = (BOXED, BOXED_OR_LAST, AFTER)
_FAR = 2000  # characters after a marker that are read
_MARKER = re.compile(
    r"(?:\banswers?\b[*_]{0,3}"
    r"(?: (?:to|of|for|in) [^.!?:=\n]{1,80}?|, [^,.!?:=\n]{1,40},)?\s{0,3}[*_]{0,3}\s?"
    r"(?:\b(?:is|are|was|be|would be|should be|must be)\b|[:=])|答案(?:是|为|：|:))",
    re.IGNORECASE,
)


def check_rule(rule: str) -> str:
    """Return the value of `reward.answer`. Raises ValueError if it is none."""
    if rule not in (BOXED, BOXED_OR_LAST) and not _text_of(rule):
        raise ValueError(f"should be one of {', '.join(RULES)} with a text of your own, found {rule!r}")
    return rule


def described(rule: str) -> str:
    """The rule as a reader of a report understands it."""
    if rule == BOXED:
        return r"the last \boxed{...}"
    if rule == BOXED_OR_LAST:
        return r'the last \boxed{...}, else what follows "the answer is", else the last number'
    return f'what follows the last "{_text_of(rule)}"'


def extract(response: str, rule: str) -> str | None:
    r"""The text of a response's answer; None if it has none.

    >>> extract("She makes $9 x 2 = 18$ dollars.\nThe answer is **18 dollars** a day.", "boxed_or_last")
    '18 dollars'
    """
    if rule == BOXED:
        return last_boxed(response)
    if rule == BOXED_OR_LAST:
        return last_boxed(response) or _last_statement(response) or last_number(response)
    _, mark, rest = response.rpartition(_text_of(rule))
    line = rest.strip()[:_FAR].split("\n", 1)[0].strip()
    return (last_boxed(line) or stated(rest[:_FAR]) or line or None) if mark else None


def _text_of(rule: str) -> str:
    """The text of an `after` rule, without quotes and spaces around it; empty if it is none."""
    if not rule.startswith("after:"):
        return ""
    text = rule.removeprefix("after:").strip()
    return text.removeprefix('"').removesuffix('"').strip() if text[:1] == text[-1:] == '"' else text


def _last_statement(response: str) -> str | None:
    """What the last statement of an answer states; one that says nothing ("is wrong") is passed over."""
    for marker in reversed(list(_MARKER.finditer(response))):
        if (answer := stated(response[marker.end() : marker.end() + _FAR])) is not None:
            return answer
    return None
