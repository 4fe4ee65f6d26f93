r"""Twenty ways in which models write one answer, and ways to get it wrong by a little.

Each takes an answer without dollar signs and returns another text for it, or None where the way makes no
sense: no unit on a list, no thousands in 12.
"""

import random
import re
from collections.abc import Callable

Dress = Callable[[str], str | None]

_NUMBER = re.compile(r"[-+]?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?")
_LONG = re.compile(r"-?[1-9]\d{3,}(\.\d+)?")


def is_number(answer: str) -> bool:
    return _NUMBER.fullmatch(answer) is not None


def _is_list(answer: str) -> bool:
    return "," in answer and not is_number(answer)


def _has_unit_already(answer: str) -> bool:
    return re.search(r"%|circ|=|\\geq|infty|\[|\(0,", answer) is not None


def _number(template: str) -> Dress:
    return lambda answer: template.replace("?", answer) if is_number(answer) else None


def _quantity(template: str) -> Dress:
    def dress(answer: str) -> str | None:
        takes = is_number(answer) or not (_is_list(answer) or _has_unit_already(answer))
        return template.replace("?", answer) if takes else None

    return dress


def _anything(template: str) -> Dress:
    return lambda answer: template.replace("?", answer)


def _thousands(separator: str) -> Dress:
    def dress(answer: str) -> str | None:
        if _LONG.fullmatch(answer) is None:
            return None
        whole, point, rest = answer.partition(".")
        return f"{int(whole):,}".replace(",", separator) + point + rest

    return dress


def _sized_brackets(answer: str) -> str | None:
    if not re.search(r"[()]", answer) or r"\left" in answer:
        return None
    return answer.replace("(", r"\left(").replace(")", r"\right)")


def _replaced(pattern: str, by: str) -> Dress:
    return lambda answer: re.sub(pattern, by, answer) if re.search(pattern, answer) else None


WAYS: dict[str, Dress] = {
    "unit after a tie": _quantity(r"?~\text{cm}"),
    "square unit": _quantity(r"?\,\mathrm{m}^2"),
    "words": _quantity(r"? \text{ square units}"),
    "plain unit": _number("? minutes"),
    "symbol of a unit": _number(r"?\ \Omega"),
    "number and unit as text": _number(r"\text{? km}"),
    "colour": _anything(r"\textcolor{red}{?}"),
    "dollars": _number(r"\$?"),
    "degree": _number(r"?^\circ"),
    "thousands with commas": _thousands("{,}"),
    "thousands with thin spaces": _thousands(r"\,"),
    "bold": _anything(r"\mathbf{?}"),
    "bold in markdown": _anything("**?**"),
    "sized brackets": _sized_brackets,
    "dfrac": _replaced(r"\\frac", r"\\dfrac"),
    "tfrac": _replaced(r"\\frac", r"\\tfrac"),
    "a/b": _replaced(r"^\\frac\{(-?\d+)\}\{(\d+)\}$", r"\1/\2"),
    "percent": _replaced(r" ?\\?%", r"\\text{ percent}"),
    "trailing period": _anything(r"?\;."),
    "dollar signs": _anything("$?$"),
}

Spoil = Callable[[str, random.Random], str | None]


def _other_digit(answer: str, rng: random.Random) -> str | None:
    places = [found.start() for found in re.finditer(r"\d", answer)]
    if not places:
        return None
    at = rng.choice(places)
    return answer[:at] + str((int(answer[at]) + rng.choice([1, 9])) % 10) + answer[at + 1 :]


def _other_sign(answer: str, _: random.Random) -> str | None:
    if _is_list(answer) or "=" in answer or answer in ("0", "0.0"):
        return None
    return answer[1:] if answer.startswith("-") else rf"-\left({answer}\right)"


def _open_or_closed(answer: str, _: random.Random) -> str | None:
    found = re.fullmatch(r"([(\[])([^()\[\],]*,[^()\[\],]*)[)\]]", answer)
    return found and (f"[{found[2]}]" if found[1] == "(" else f"({found[2]})")


def _set_for_tuple(answer: str, _: random.Random) -> str | None:
    found = re.fullmatch(r"\(([^()]*,[^()]*)\)", answer)
    return found and rf"\{{{found[1]}\}}"


def _one_less(answer: str, rng: random.Random) -> str | None:
    elements = re.split(r",(?![^(]*\))", answer)
    if not _is_list(answer) or len(elements) < 2:
        return None
    elements.pop(rng.randrange(len(elements)))
    return ",".join(elements)


def _one_more(answer: str, _: random.Random) -> str | None:
    return None if "=" in answer else f"{answer}, 9876"


def _scaled(answer: str, _: random.Random) -> str | None:
    return rf"{answer} \text{{ million}}" if re.fullmatch(r"[1-9]\d*", answer) else None


def _hedged(answer: str, _: random.Random) -> str | None:
    return rf"{answer} \text{{ or more}}" if is_number(answer) else None


def _times_root(answer: str, _: random.Random) -> str | None:
    return None if "," in answer or "=" in answer or answer == "0" else rf"{answer} \sqrt{{2}}"


SPOILS: dict[str, Spoil] = {
    "digit": _other_digit,
    "sign": _other_sign,
    "open for closed": _open_or_closed,
    "set for tuple": _set_for_tuple,
    "one less": _one_less,
    "one more": _one_more,
    "scaled": _scaled,
    "hedged": _hedged,
    "times a root": _times_root,
}
