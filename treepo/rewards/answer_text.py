r"""Reduces the text of an answer to plain mathematics before math-verify parses it.

Typography (colour, bold, spaces, sizes), notation of one value (thousands, mixed numbers, repeating decimals)
and units are taken off here, because math-verify reads them as factors or not at all: to it, `10~\text{cm}`
is a product, `12\,345` is 12 + 345 and `\varnothing` a variable. Nothing here decides whether two answers are
equal; what would change a value ("5 or more", "5 million") stays or is computed.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from treepo.rewards.answer_units import split_unit

_SPACES = re.compile(
    r"(?<!\\)\\[,;:> ]|\\(?:(?:thin|med|thick|en)space|nobreakspace|q?quad)(?![a-zA-Z])"
    r"|\\[hmv]space\*?\{[^{}]*\}|~|\s"
)
_NO_SPACES = re.compile(r"\\!|[\u200b-\u200d\u2060\ufeff]|\\(?:allowbreak|nobreak|relax)(?![a-zA-Z])")
_SIZES = re.compile(
    r"\\(?:left|right)\."
    r"|\\(?:left|right|middle|[bB]ig{1,2}[lrm]?|limits|strut|mathstrut"
    r"|(?:display|text|script|scriptscript)style"
    r"|tiny|(?:script|footnote|normal)size|small|large|Large|LARGE|huge|Huge)(?![a-zA-Z])"
)
_DELIMITERS = re.compile(r"(?<!\\)\$|(?<!\\)\\[()\[\]]")
_COLOUR = re.compile(r"\\(?:(?:text|math)?color\s*(?:\[\w+\])?|colorbox|fcolorbox\s*\{[^{}]*\})\s*\{[^{}]*\}")
_FONT = re.compile(r"((?<![\w}\]^])\{\s*)?\\(?:(rm|sc)|bf|it|sf|tt|sl|em)(?![a-zA-Z])\s*(\{)?")
_STYLED = re.compile(
    r"\\(?P<words>text(?:rm|normal|bf|it|sf|tt|up|md|sc|sl)?|mathrm|[mh]box|framebox|emph|operatorname)\s*\{"
    r"|\\(?:mathbf|mathit|mathsf|mathtt|mathnormal|boldsymbol|bm|pmb|underline|ensuremath|mathord)\s*\{"
)
_MARKDOWN = re.compile(r"(\*\*|__|\*|`)(.+)\1", re.DOTALL)

_WORDS = {
    r"\\[dtc]frac|\\nicefrac|\\sfrac": r"\\frac",
    r"\\[dt]binom": r"\\binom",
    r"\\leqslant|\\le": r"\\leq",
    r"\\geqslant|\\ge": r"\\geq",
    r"\\neq": r"\\ne",
    r"\\[lr]vert|\\[lr]?mid": "|",
    r"\\lbrace": r"\\{",
    r"\\rbrace": r"\\}",
    r"\\lbrack": "[",
    r"\\rbrack": "]",
    r"\\langle|\\lparen": "(",
    r"\\rangle|\\rparen": ")",
    r"\\varnothing": r"\\emptyset",
    r"\\cdotp|\\ast|\\bullet": r"\\cdot",
    r"\\infin|\\infinity": r"\\infty",
    r"\\(?:l|c|d)?dots[cbmio]?|\\textellipsis": r"\\ldots",
    r"\\percent": r"\\%",
    r"\\(?:text)?degree": r"^{\\circ}",
    r"\\(?:pounds|textsterling)": "£",
    r"\\(?:euro|texteuro)": "€",
    r"\\textdollar": r"\\$",
}
_SYNONYMS = [(re.compile(rf"(?:{old})(?![a-zA-Z])"), new) for old, new in _WORDS.items()]
_UNICODE = {
    letter: latex
    for letters, latex in {
        "−‐‑‒–—﹣－": "-",
        "×✕": r"\times ",
        "÷⁄∕": "/",
        "·⋅∙": r"\cdot ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "∅": r"\emptyset ",
        "±": r"\pm ",
        "√": r"\sqrt ",
        "ℝ": r"\mathbb{R}",
        "≤": r"\leq ",
        "≥": r"\geq ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "°º˚": r"^{\circ}",
        "′": "'",
        "…": r"\ldots ",
        "。": ".",
        "⟨": "(",
        "⟩": ")",
        "\u2126": r"\Omega ",
        "\u00b5": r"\mu ",
    }.items()
    for letter in letters
}
_POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_INDICES = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-")

_SHORT_FRACTION = re.compile(r"\\frac ?(?:\{ ?(\d+) ?\}|(\d)) ?(?:\{ ?(\d+) ?\}|(\d))(?!\d)")
_OVER = re.compile(r"\{([^{}]+)\\over(?![a-zA-Z])([^{}]+)\}")
_MIXED = re.compile(
    r"(?<![\w.,/^}])(\d{1,50})"
    r"(?: *\+? *\\frac\{(\d{1,50})\}\{(\d{1,50})\}| (\d{1,50})/(\d{1,50}))(?![\w./^!])"
)
_REPEATING = re.compile(
    r"(?<![\d.])(\d{0,50})\.(\d{0,50})"
    r"(?:\\(?:overline|bar|dot) ?(?:\{ ?(\d{1,50}) ?\}|(\d))|\((\d{1,50})\))(?![\d(\\])"
)
# 0.1666..., but not 3.14...: three times one digit, or two times several.
_GOES_ON = re.compile(r"(?<![\d.])(\d{0,50}\.\d{0,50}?)(?:(\d)\2\2|(\d{2,20}?)\3) ?\\ldots(?! ?[\w,])")
_SPACED_THOUSANDS = re.compile(r"(?<![\w.,/^ }])(?<![\w.,/^}] )(\d{1,3})((?: \d{3})+)(?![ \w/]|,\d)(\.\d+)?")
_BRACED_COMMA = re.compile(r"(?<=\d)\{, ?\}(?=\d{3}(?!\d))")
_THOUSANDS = re.compile(r"(?:[^=,(\[{]*= ?)?[-+]?\d{1,3}(?:,\d{3})+(?!\d)(?!\s*,)")
_POINTLESS = re.compile(r"(?<=\d)\.(?![\d.])")  # 7. and 1./3: LaTeX's grammar refuses the whole text for it
_FIRST_MARK = re.compile(r"^(?:=|\\approx(?![a-zA-Z])|\\therefore(?![a-zA-Z])) *(?=.)")
_LAST_MARK = re.compile(
    r"(?:\\\\|(?<!\\)[.,;:]|\\(?:tag|label) ?\{[^{}]*\}"
    r"|(?<=.)\\(?:nonumber|notag|qed|blacksquare|square|checkmark)(?![a-zA-Z]))\s*$"
)
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+) ?[eE] ?([+-]? ?\d+)(?![\w.^{])")
_TIMES = re.compile(r"(?<=\d) ?(?:[xX*]|\\times) ?(?=10 ?\^)")
_AND_OR = re.compile(r",? ?(?:\\text\{ ?(?:and|or) ?\}|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])) ?")
_PERCENT = re.compile(
    r" ?(?:\\text\{ ?(?:percent|per cent|percentage|pct) ?\}|\b(?:percent|per cent|pct)\b|\\?%)"
)
_UNIT_FRACTION = re.compile(r"\\frac ?\{ ?(\\text\{[^{}]*\}) ?\} ?\{ ?(\\text\{[^{}]*\}) ?\}")
_PRIME = re.compile(r"(?<=[A-Za-z])'+")  # math-verify drops it, and y' would be y
_DEGREE = re.compile(r"(?<=[\d})]) ?\{?\}?\^ ?\{? ?\\circ ?\}?")
_ANGLE = re.compile(r"(\d{1,50})(?:\.(\d{1,50}))? ?(?:\{\}|(\}))? ?\^ ?(?:\{ ?\\circ ?\}|\\circ(?![a-zA-Z]))")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")


@dataclass(frozen=True, slots=True)
class AnswerText:
    """value: plain LaTeX without its unit. unit: its name, "" if it is not a known one, None without."""

    value: str
    unit: str | None = None

    @property
    def key(self) -> str:
        """The value without the spaces that mean nothing: equal keys are equal answers."""
        return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", self.value)


def read_answer(text: str) -> AnswerText:
    r"""Reduce the text of an answer.

    >>> read_answer(r"\textcolor{red}{12\,345}~\text{cm}.")
    AnswerText(value='12345', unit='cm')
    """
    text = _plain(text)
    value, unit = split_unit(text)
    return AnswerText(_numbers(value), unit)


def _plain(text: str) -> str:
    """Without colour, bold, sizes and kinds of spaces; one name for each symbol."""
    text = _ascii(text)
    text = _SIZES.sub("", _NO_SPACES.sub("", _DELIMITERS.sub("", text)))
    text = _FONT.sub(_as_command, text)
    text = _unwrap(_SPACES.sub(" ", _COLOUR.sub("", text)).strip())
    if (bold := _MARKDOWN.fullmatch(text)) and bold[1] not in bold[2]:
        text = bold[2]
    text = re.sub(r" {2,}", " ", text)
    for pattern, replacement in _SYNONYMS:
        text = pattern.sub(replacement, text)
    text = _UNIT_FRACTION.sub(r"\1/\2", re.sub(r"\.{3,}", r"\\ldots", text).replace("{:}", ":"))
    text = _PRIME.sub(lambda found: rf"^{{{r'\prime' * len(found[0])}}}", text)
    text = re.sub(r"\\\{ *\\\}", r"\\emptyset", text.replace("**", "^"))
    if _TRIGONOMETRIC.search(text):
        text = _ANGLE.sub(_radians, text)
    else:
        text = _DEGREE.sub(r"\\text{degree}", text)
        text = re.sub(r"\\text\{degree\}(?! *(?:$|[A-Za-z\\]))", "", text)  # within a list: no unit to keep
    text = _PERCENT.sub(r"\\%", text)
    text = _AND_OR.sub(",", text)
    while (shorter := _LAST_MARK.sub("", _FIRST_MARK.sub("", text)).strip()) != text:
        text = shorter
    return re.sub(r" {2,}", " ", text)


def _as_command(font: re.Match[str]) -> str:
    r"""`\mathbf{` for `{\bf ` and `\bf{`; nothing for a font that holds to the end of the answer."""
    command = r"\mathrm{" if font[2] else r"\mathbf{"
    return command * ((font[1] is not None) + (font[3] is not None))


def _ascii(text: str) -> str:
    """Unicode digits, operators, fractions, powers and letters as LaTeX writes them."""
    if text.isascii():
        return text
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda found: f"^{{{found[0].translate(_POWERS)}}}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉₊₋]+", lambda found: f"_{{{found[0].translate(_INDICES)}}}", text)
    return "".join(_UNICODE.get(letter) or _letter(letter) for letter in text)


def _letter(letter: str) -> str:
    name = unicodedata.name(letter, "")
    if (
        name.startswith("VULGAR FRACTION")
        and len(parts := unicodedata.normalize("NFKC", letter).split("⁄")) == 2
    ):
        return rf"\frac{{{parts[0]}}}{{{parts[1]}}}"
    if name.startswith(("GREEK SMALL LETTER ", "GREEK CAPITAL LETTER ")) and name.count(" ") == 3:
        command = name.rpartition(" ")[2]
        return "\\" + (command.lower() if "SMALL" in name else command.capitalize()) + " "
    return letter if letter in "£€¥₹" else unicodedata.normalize("NFKC", letter)


def _unwrap(text: str) -> str:
    r"""Styles give way to their contents; words in any font become `\text{...}`, numbers in it are bare."""
    while True:
        for found in _STYLED.finditer(text):
            end = _closing(text, found.end())
            if end is None:
                continue
            inside = text[found.end() : end]
            if found["words"] and not _mathematical(inside):
                inside = rf"\text{{{inside}}}"
            elif text[: found.start()].rstrip().endswith(("^", "_")):
                inside = f"{{{inside}}}"
            elif found.start() and text[found.start() - 1].isalpha() and inside[:1].isalpha():
                inside = f" {inside}"  # \pi\mathbf{r} is not \pir
            if (changed := text[: found.start()] + inside + text[end + 1 :]) != text:
                text = changed
                break
        else:
            break
    while text.startswith("{") and _closing(text, 1) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _mathematical(words: str) -> bool:
    r"""Whether words are no words: `\text{10 cm}`, `\textbf{(A)}`, `\mathrm{e}^x`, `\text{x = 5}`."""
    words = words.strip()
    return words in ("e", "i") or bool(re.search(r"[=<>]|^[A-Za-z]\^|^[-+\\$€£(\[]*\d|^\([A-Z]\)", words))


def _closing(text: str, start: int) -> int | None:
    """The position at which the group that is open at `start` closes."""
    depth = 1
    for found in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    return None


def _numbers(text: str) -> str:
    """One notation for each number: reads 12 345, 1 1/2, 0.(3), 4.5e33 and 7. as their writers mean them."""
    text = _OVER.sub(r"\\frac{\1}{\2}", text)
    text = _SHORT_FRACTION.sub(
        lambda found: rf"\frac{{{found[1] or found[2]}}}{{{found[3] or found[4]}}}", text
    )
    text = _REPEATING.sub(_repeating, _GOES_ON.sub(_period, text))
    text = _SCIENTIFIC.sub(lambda found: rf"{found[1]} \times 10^{{{found[2].replace(' ', '')}}}", text)
    text = _TIMES.sub(r" \\times ", text)
    text = _BRACED_COMMA.sub(",", text)
    text = _SPACED_THOUSANDS.sub(lambda found: found[0].replace(" ", ""), text)
    if found := _THOUSANDS.match(text):
        rest = text[found.end() :]
        if "," not in rest or rest.startswith((r"\%",)):
            text = found[0].replace(",", "") + rest
    text = _MIXED.sub(_mixed, text)
    return _POINTLESS.sub("", text).strip()


def _mixed(found: re.Match[str]) -> str:
    whole, above, below = int(found[1]), int(found[2] or found[4]), int(found[3] or found[5])
    if not 0 < above < below or ("+" in found[0] and found.start()):
        return found[0]
    return rf"\frac{{{whole * below + above}}}{{{below}}}"


def _period(found: re.Match[str]) -> str:
    return rf"{found[1]}\overline{{{found[2] or found[3]}}}"


def _radians(degrees: re.Match[str]) -> str:
    """An angle whose sign of degrees math-verify would drop, in radians."""
    value = Fraction(f"{degrees[1]}.{degrees[2] or 0}") / 180
    return rf"\frac{{{value.numerator}\pi}}{{{value.denominator}}}{degrees[3] or ''}"


def _repeating(found: re.Match[str]) -> str:
    whole, fixed = found[1] or "0", found[2]
    period = found[3] or found[4] or found[5]
    value = Fraction(
        int(whole + fixed + period) - int(whole + fixed), (10 ** len(period) - 1) * 10 ** len(fixed)
    )
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
