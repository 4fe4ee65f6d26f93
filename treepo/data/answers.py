"""An answer column's value as the text of the gold answer."""

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from treepo.config.data import ColumnsConfig
from treepo.data.rows import BadRow, check_value, names_of, show
from treepo.rollout.boxed import last_boxed

_KEYS = ("ground_truth", "answer", "final_answer", "target", "value", "label")


def answer_of(value: Any, columns: ColumnsConfig) -> str:
    """Read the gold answer, by the rules of `columns`. Raises BadRow."""
    if isinstance(value, str) and value.lstrip().startswith('["'):
        value = _listed(value)
        check_value(value, columns.answer)
    scalar = _of_object(_last(value), columns)
    if isinstance(scalar, Decimal):  # the value of a decimal column of parquet
        scalar = format(scalar, "f")
    if isinstance(scalar, float) and math.isfinite(scalar) and scalar.is_integer():
        scalar = int(scalar)  # publishers write 27 as 27.0
    if (
        isinstance(scalar, bool)
        or not isinstance(scalar, str | int | float)
        or scalar in (math.inf, -math.inf)
    ):
        raise _no_answer(columns, value)
    text = str(scalar)
    if columns.answer_after is not None:
        _, mark, text = text.rpartition(columns.answer_after)
        if not mark:
            raise _no_answer(columns, value, f"without {columns.answer_after!r} in it")
    if columns.answer_boxed:
        boxed = last_boxed(text)
        if boxed is None:
            raise _no_answer(columns, value, r"without a complete \boxed{...} in it")
        text = boxed
    if not text.strip() or text == "nan":
        raise _no_answer(columns, value)
    return text.strip()


def _last(value: Any) -> Any:
    return value[-1] if isinstance(value, list) and value else value


def _of_object(value: Any, columns: ColumnsConfig) -> Any:
    """Of an object, the value of the only key with a name that publishers use; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    keys = [key for key in _KEYS if value.get(key) is not None]
    if len(keys) != 1:
        raise BadRow(
            "no answer",
            f"column {columns.answer!r} is an object with {names_of(value)}; name one of them, as "
            f"{columns.answer}.{keys[0] if keys else next(iter(value), 'key')}",
        )
    return _last(value[keys[0]])


def _listed(text: str) -> str | list[str]:
    """The list of texts that a publisher has stored as JSON text; any other text as it is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if all(isinstance(one, str) for one in value) else text


def _no_answer(columns: ColumnsConfig, value: Any, lack: str = "") -> BadRow:
    return BadRow(
        "no answer",
        f"column {columns.answer!r} is {show(value)} {lack}".rstrip()
        + "; allowed: text, a finite number, a list of them of which the last counts, or an object with one",
    )
