r"""Units of an answer: `5~\text{cm}`, `10\ \Omega`, `\$18`, `18 dollars`, `1011_2`, `7:30 \text{ p.m.}`.

A unit that one of two answers lacks does not count; two known units that differ make the answers different.
Words that change a value are no units: "2 or more" stays as it is, "5 million" is computed.
"""

import re

_NAMES = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram gm",
    "kg": "kilogram",
    "lb": "pound lbs",
    "oz": "ounce",
    "ml": "milliliter millilitre mL",
    "l": "liter litre L",
    "s": "second sec",
    "min": "minute mins",
    "h": "hour hr hrs",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years yr yrs",
    "degree": "degrees deg",
    "rad": "radian radians",
    "am": "a.m. A.M. AM a.m",
    "pm": "p.m. P.M. PM p.m",
    "$": "dollar USD",
    "cent": "cents ¢",
    "€": "euro EUR",
    "£": "GBP",
    "ohm": r"\Omega",
    "Hz": "hertz",
    "N": "newton",
    "J": "joule",
    "W": "watt",
    "V": "volt",
    "K": "kelvin",
    "km/h": "kmh kph",
    "mi/h": "mph",
}
_CANONICAL = {
    form: unit
    for unit, names in _NAMES.items()
    for name in (unit, *names.split())
    for form in (name, name + "s" if len(name) > 3 else name)
}
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# After a number, these say something else than a unit.
_NOT_UNITS = re.compile(
    r"\b(?:or|and|not|no|more|less|greater|fewer|larger|smaller|least|most|than|above|below|over|under|up|down|to"
    r"|between|except|excluding|negative|minus|plus|times|by|mod|modulo|choose|remainder|base|dozens?|score"
    r"|squared|cubed|factorial|hal(?:f|ves)|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?"
    r"|tenths?|hundredths?|thousandths?|if|when|where|for|with|mod|pi|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|inf"
    r"|infinity|approximately|about|is|are|does|cannot|impossible|none|unless|percent|undefined|hundreds|thousands"
    r"|millions|billions|alpha|beta|gamma|delta|theta|omega|lambda|sinh|cosh|tanh|arcsin|arccos|arctan)\b"
)
_WORD = r"\\text ?\{(?:[^{}]|\{[^{}]*\})*\}(?: ?\^ ?\{? ?-?\d ?\}?)?"
_TEXT_TAIL = re.compile(
    rf"(?<=[\w}})\]!|%])(?P<tail>(?: |/|\\cdot|\\times|\\mu|\\Omega|\\AA|{_WORD}|(?<=degree\}}) ?[CFK])++)$"
)
# Words without \text: short ones must be known, because they could be variables.
_PLAIN_TAIL = re.compile(r"(?<=[\d})])(?P<tail>(?: ?[A-Za-z][A-Za-z.]*+(?:\^\{?[23]\}?)?+(?: ?/)?+)++)$")
_SINGLE = frozenset("mgshLNJWVKCF")
_CURRENCY = re.compile(
    r"^(?P<sign>[-+]?) ?(?P<unit>\\?\$|€|£|¥|₹) ?(?=[\d.\\])|(?<=\d) ?(?P<after>\\?\$|€|£|¥|₹|¢)$"
)
_ORDINAL = re.compile(r"(?<=\d)(?:\^ ?\{? ?)?(?:\\text\{ ?(?:st|nd|rd|th) ?\}|(?:st|nd|rd|th)\b) ?\}?$")
_BASE = re.compile(r"(?<![\w.}])([0-9A-Z]+)_ ?\{? ?(\d+) ?\}?$")


def split_unit(text: str) -> tuple[str, str | None]:
    """The text before a unit and the unit: "" if it is an unknown one, None if there is none."""
    text = _ORDINAL.sub("", text)
    if (found := _CURRENCY.search(text)) is not None:
        rest = (found["sign"] or "") + text[: found.start()] + text[found.end() :]
        unit = (found["unit"] or found["after"]).removeprefix("\\")
        return split_unit(rest)[0], _CANONICAL.get(unit, unit)
    if (found := _BASE.fullmatch(text)) is not None:
        return found[1], f"base {found[2]}"
    found = _TEXT_TAIL.search(text)
    if found is None or not found["tail"].strip(" /"):
        found = _PLAIN_TAIL.search(text)
        if found is None or not all(map(_plain_unit, _words(found["tail"]))):
            return text, None
        if re.search(r"(?<!\\)\b[A-Za-z]", text[: found.start()]):
            return text, None  # a variable before: this is a product
    value, tail = text[: found.start()], found["tail"]
    words = _words(tail)
    scale = next((word for word in words if word in _SCALES), None)
    if scale is not None:
        words = [word for word in words if word != scale]
        value = rf"{value} \times 10^{{{_SCALES[scale]}}}"
    if _NOT_UNITS.search(" ".join(word for word in words if word[0] != "\\").lower()):
        return text, None
    return value.strip(), _canonical(tail, words) if words else None


def without_letter_unit(value: str) -> str | None:
    """10 for "10 m": a single letter that is a unit if it cannot be a variable. None if there is none."""
    found = re.fullmatch(r"(.*\d) ?([A-Za-z])(?: ?\^ ?\{?[23]\}?)?", value)
    if found is None or found[2] not in _SINGLE or re.search(r"(?<!\\)\b[A-Za-z]", found[1]):
        return None
    return found[1]


def _words(tail: str) -> list[str]:
    return re.findall(r"\\(?!text)[A-Za-z]+|[A-Za-z][A-Za-z.]*", re.sub(r"\\text ?\{", " ", tail))


def _plain_unit(word: str) -> bool:
    return (
        (len(word) > 1 and word in _CANONICAL) or (len(word) > 3 and word.isalpha()) or word in ("sq", "cu")
    )


def _canonical(tail: str, words: list[str]) -> str:
    """One name for each known unit, with its power: cm^2 for "square centimeters"."""
    if r"\mu" in tail or "/" in tail:
        return ""
    power = re.search(r"\^ ?\{? ?(-?\d)", tail)
    kinds = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3"}
    exponent = power[1] if power else next((kinds[word] for word in words if word in kinds), "1")
    names = [word for word in words if word not in kinds]
    if len(names) == 2 and names[0] == "degree" and names[1] in "CFK":
        return f"degree {names[1]}"
    if len(names) != 1:
        return ""
    unit = _CANONICAL.get(names[0]) or _CANONICAL.get(names[0].lower(), "")
    return f"{unit}^{exponent}" if unit and exponent != "1" else unit
