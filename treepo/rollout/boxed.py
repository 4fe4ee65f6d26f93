r"""Finds boxed answers, `\boxed{...}`, in a response, with braces inside to any depth.

`\boxed {5}` and `\fbox{5}` count too. An escaped brace is text, not structure. Only complete boxes count: if
a response ends inside its last box, its answer is the box before. An empty box ("I will put the answer in
\boxed{}") does not count. The official recipe looks at the last segment only and at three levels of braces.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# `rest`: the end of the text, if it may be the beginning of a box.
_MARKS = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)"
    r"|(?P<rest>\\(?:b|bo|box|boxe|boxed\s*|f|fb|fbo|fbox\s*)?\Z)"
    r"|\\.|[{}]",
    re.DOTALL,
)


def last_boxed(text: str) -> str | None:
    r"""Contents of the complete box that opens last; None if there is no complete box.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}, not \boxed{2")
    '\\frac{1}{2}'
    """
    start, end = max(_boxes(text), default=(-1, -1))
    return None if start < 0 else text[start:end]


def count_boxes(text: str) -> int:
    """Number of complete boxes, nested ones included."""
    return sum(1 for _ in _boxes(text))


def _boxes(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of the contents of each complete box, in the order in which they close."""
    open_braces: list[int] = []  # where a box's contents start, -1 for a brace that opens no box
    for mark in _MARKS.finditer(text):
        if mark["box"]:
            open_braces.append(mark.end())
        elif mark[0] == "{":
            open_braces.append(-1)
        elif mark[0] == "}":
            start = open_braces.pop() if open_braces else -1
            if start >= 0 and not _blank(text, start, mark.start()):
                yield start, mark.start()


@dataclass(frozen=True, slots=True)
class BoxScan:
    r"""State of the search for the first complete box in a text that arrives in pieces.

    depths: for each open box, outermost first, the number of braces open in it: its own counts, those of
    boxes inside it do not. blank: whether the innermost open box has only white space so far. rest: the end
    of the text, if it may be the beginning of a box ("\box").
    """

    found: bool = False
    depths: tuple[int, ...] = ()
    blank: bool = False
    rest: str = ""

    @property
    def idle(self) -> bool:
        """Whether no box has been found and none has begun."""
        return not (self.found or self.depths or self.rest)

    def extend(self, text: str) -> "BoxScan":
        """The state after `text` has been appended."""
        if self.found or (self.idle and "\\" not in text):
            return self
        text = self.rest + text
        depths, blank, rest, end = list(self.depths), self.blank, "", 0
        for mark in _MARKS.finditer(text):
            blank = blank and _blank(text, end, mark.start())
            end = mark.end()
            if mark["rest"]:
                rest = mark["rest"]
            elif mark["box"]:
                depths.append(1)
                blank = True
            elif mark[0] == "}" and depths:
                depths[-1] -= 1
                if depths[-1] == 0:
                    if not blank:
                        return BoxScan(found=True)
                    depths.pop()
                blank = False
            else:
                blank = False
                if mark[0] == "{" and depths:
                    depths[-1] += 1
        return BoxScan(depths=tuple(depths), blank=blank and _blank(text, end, len(text)), rest=rest)


def _blank(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` is only white space. Returns at the first other character."""
    return all(text[at].isspace() for at in range(start, end))
