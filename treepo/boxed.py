r"""Boxed answers: `\boxed{...}` in a response, whatever the depth of the braces inside.

`\boxed {5}` and `\fbox{5}` count too; a brace behind a backslash is text, not structure. Only complete
boxes count: a response that is cut inside its last box has the answer of the box before. The official
recipe looks at the last segment only and at three levels of braces.
"""

import re
from dataclasses import dataclass

# `rest` is an end that more text may complete to a box.
_MARKS = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*\{)"
    r"|(?P<rest>\\(?:b|bo|box|boxe|boxed\s*|f|fb|fbo|fbox\s*)?\Z)"
    r"|\\.|[{}]",
    re.DOTALL,
)


def last_boxed(text: str) -> str | None:
    r"""What stands in the box that opens last among the complete ones; None where there is none.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}, not \boxed{2")
    '\\frac{1}{2}'
    """
    last_start, last_end = -1, -1
    open_braces: list[int] = []  # where a box's contents start, -1 for a brace that opens no box
    for mark in _MARKS.finditer(text):
        if mark["box"]:
            open_braces.append(mark.end())
        elif mark[0] == "{":
            open_braces.append(-1)
        elif mark[0] == "}":
            start = open_braces.pop() if open_braces else -1
            if start > last_start:
                last_start, last_end = start, mark.start()
    return None if last_start < 0 else text[last_start:last_end]


@dataclass(frozen=True, slots=True)
class BoxScan:
    r"""What has to be remembered of a text to go on looking for its first complete box.

    depth: braces open since the innermost box was opened, that one included; 0 outside of a box. The
    innermost box closes first, so no other brace matters. rest: an end that more text may complete to a
    box ("\box").
    """

    found: bool = False
    depth: int = 0
    rest: str = ""

    def extend(self, text: str) -> "BoxScan":
        """The scan of the text so far with `text` after it."""
        if self.found or not (self.depth or self.rest or "\\" in text):
            return self
        depth, rest = self.depth, ""
        for mark in _MARKS.finditer(self.rest + text):
            if mark["rest"]:
                rest = mark["rest"]
            elif mark["box"]:
                depth = 1
            elif depth and mark[0] in ("{", "}"):
                depth += 1 if mark[0] == "{" else -1
                if depth == 0:
                    return BoxScan(found=True)
        return BoxScan(depth=depth, rest=rest)
