r"""Reads an answer that a response states in words: "18 dollars every day, because ...", "$x = 5$.", "(B)".

A statement is read to the end of its sentence. Mathematics at its beginning is taken alone, a unit included;
a sentence of words gives its last number.
"""

import re

from treepo.rewards.answer_text import read_answer

_PLAIN = r"\d{1,3}(?:(?:,|\{,\}|\\,)\d{2,3}){0,9}(?:,|\{,\}|\\,)\d{3}(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_EXPONENT = r"(?:\{[-+−]?\d+\}|[-+−]?\d+)"
_SLASHED = r"\d+ ?/ ?\d+(?![\d/])"
_LATEX_FRACTION = r"\\[dtc]?frac ?(?:\{ ?-?\d+ ?\}|\d) ?(?:\{ ?\d+ ?\}|\d)"
_SIGNED = (
    r"(?:(?<![\w)}\]])[-−])?(?:\\?[$£€¥₹] ?(?=[\d.]))?"
    rf"(?:(?:\d+ ?)?{_LATEX_FRACTION}|(?:\d+ )?(?<!/){_SLASHED}|\d+(?::\d+)+(?!\d)"
    rf"|(?:{_PLAIN})(?:[eE][-+]?\d+|\^{_EXPONENT})?(?: ?(?:\\times|\\cdot|×|\*|x) ?10 ?\^ ?{_EXPONENT})?)"
    r"(?: ?\\?%| (?:hundred|thousand|million|billion|trillion)\b)?"
)
_START = r"(?<![A-Za-z0-9_^])(?<![0-9]\.)(?<![\^_]\{)"
_NUMBER = re.compile(
    rf"^[ \t>*#-]*\d{{1,2}}[.)](?=[ \t]+\S)"  # an item of a list, not a number
    rf"|(?P<number>{_START}{_SIGNED})",
    re.MULTILINE,
)
_NUMBERS = re.compile(rf"{_SIGNED}(?:(?:, ?(?:and |or )?| (?:and|or) ){_SIGNED})*")

_LEAD = re.compile(
    r"\A(?:[\s:=≈*_`\"'“”>,]|[-–—]\s|\$*\\(?:boxed|fbox)\s*\{?"
    r"|(?:therefore|thus|hence|then|so|simply|just|exactly|precisely|approximately|about|around|roughly|nearly"
    r"|equal to|equals|given by|found to be|indeed|actually|clearly|option|choice)\b)+",
    re.IGNORECASE,
)
_SAYS_NOTHING = re.compile(
    r"(?:not|correct|incorrect|wrong|right|reasonable|unclear|unknown|obvious|clear|simple|straightforward"
    r"|valid|below|above|as follows|as|found|obtained|given|shown|calculated|written|in|based)\b",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"\n|</|[.!?](?=[\s\"'”)*_\]]|$)|[。！？]")
_FORMULA = (
    r"(?:\\\((.+?)\\\)|\\\[(.+?)\\\]|\$\$(.+?)\$\$"
    r"|\$([^\s$](?:[^$\n]*[^\s$\\])?)\$(?!\d))"  # not "$5 or $6"
)
_SPAN = re.compile(_FORMULA, re.DOTALL)
_AND_SPAN = re.compile(rf",? ?(?:and|or)? ?{_FORMULA}", re.DOTALL)
_CHOICE = re.compile(r"\([A-J]\)|[A-J](?=[):]|$)")
_YES_OR_NO = re.compile(r"(?:yes|no|true|false)(?=$|[,;:—–])", re.IGNORECASE)
_MATHEMATICS = re.compile(
    r"[\\(\[{|√π∞<>≤≥+−-]|(?:sqrt|sin|cos|tan|log|ln|exp|pi)\b"
    r"|[A-Za-z](?:\([\w, +*/^−-]*\))?\s*(?:[=^_+*/<>≤≥−-]|\\|$|,? (?:and|or) [A-Za-z]\b)|[A-Za-z]['′]"
)
_PROSE = re.compile(
    r"[,;:]?\s+\(?(?!(?:mod|pi|sqrt|sin|cos|tan|log|ln|exp)\b|(?:and|or)\s+(?![A-Za-z]{2}))[A-Za-z]{2}"
    r"|[,;]?\s+(?:i\.e|e\.g)\b"
)
_MEASURES = re.compile(
    r"\s+(?:(?:or|and) (?:more|less|fewer|greater|above|below)\b|(?:less|more|greater|fewer) than\b"
    r"|dozens?\b|times\b|squared\b|cubed\b|factorial\b|[A-Za-z]+,? (?:and )?\d+ [A-Za-z]+$)"
)
_RATE = re.compile(r"\s*[A-Za-z]{1,5}(?:\^\{?\d\}?)?(?: ?/ ?[A-Za-z]{1,5}(?:\^\{?\d\}?)?)+")
_PERCENT = re.compile(r" ?\\?%")
_REASON = re.compile(r"[,;:]\s|\s(?:because|since|as)\s")
_MOST_WORDS = 3  # of an answer in words; a longer sentence says something else


def last_number(text: str) -> str | None:
    r"""The last number with its sign; numbers of list items and in names or exponents are none.

    >>> last_number("1. He ate 3/4 of it.\n2. The garden x_1 has 1,200 m^2.")
    '1,200'
    """
    numbers = [found["number"] for found in _NUMBER.finditer(text) if found["number"]]
    return numbers[-1] if numbers else None


def stated(text: str) -> str | None:
    """The answer with which `text` begins, after a colon or filling words; None if it says nothing."""
    text = _LEAD.sub("", text)
    if (span := _spans(text)) is not None:
        return span
    end = _SENTENCE_END.search(text)
    clause = text[: end.start() if end else len(text)].strip().rstrip("*_`\"'”.,;: ")
    if not clause or _SAYS_NOTHING.match(clause):
        return None
    for known in (_CHOICE, _YES_OR_NO):
        if (found := known.match(clause)) is not None:
            return clause if known is _CHOICE else found[0]
    if (numbers := _NUMBERS.match(clause)) is not None:
        return _quantity(clause, numbers[0])
    if _MATHEMATICS.match(clause):
        return _before_prose(clause)
    if (number := last_number(clause)) is not None:
        return number
    words = _REASON.split(clause, maxsplit=1)[0]
    return words if len(words.split()) <= _MOST_WORDS else None


def _spans(text: str) -> str | None:
    r"""The formulas with which `text` begins, such as `$x = 5$ and $y = 3$`."""
    first = _SPAN.match(text)
    if first is None:
        return None
    end = first.end()
    while (span := _AND_SPAN.match(text, end)) is not None:
        end = span.end()
    if (percent := _PERCENT.match(text, end)) is not None:
        end = percent.end()
    if end > first.end():
        return text[:end]
    return next(filter(None, first.groups())).strip()


def _quantity(clause: str, numbers: str) -> str:
    """A statement that begins with numbers: with a unit, as an expression, or the numbers alone."""
    rest = clause[len(numbers) :]
    if not rest or _MEASURES.match(rest) or read_answer(clause).unit is not None:
        return clause
    if _RATE.fullmatch(rest):
        return numbers
    return _before_prose(clause)


def _before_prose(clause: str) -> str:
    prose = _PROSE.search(clause)
    return (clause[: prose.start()] if prose else clause).rstrip("*_`,;: ")
