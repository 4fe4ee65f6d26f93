"""Compares two numbers, or two expressions with radicals, in the place of math-verify's own comparison.

Exact numbers are compared exactly. A decimal equals an exact number if it is within 1e-6 of it, relative to
it; two numbers of at most six decimals within 1e-9, the noise of arithmetic in floating point.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

from math_verify.grader import safe_sympy_doit
from sympy import (
    Abs,
    Add,
    Basic,
    Expr,
    Float,
    MatrixBase,
    MatrixExpr,
    Mul,
    Number,
    Pow,
    Rational,
    S,
    UnevaluatedExpr,
    log,
    posify,
    simplify,
)

# Two values are equal if their relative difference is at most 1 over this.
_DECIMAL_AND_EXACT = 10**6
_TWO_DECIMALS = 10**9
_EXACT = 10**50  # leaves 10 of _DIGITS to the rounding of their evaluation
_HUNDREDTH = UnevaluatedExpr(Rational(1, 100))
_NO_NUMBERS = (S.Infinity, S.NegativeInfinity, S.ComplexInfinity, S.NaN)
_DIGITS = 60


def equal_values(gold: Basic | MatrixBase, other: Basic | MatrixBase, *_: object) -> bool:
    """Whether two values are equal. False if it is undecided: math-verify then simplifies the difference."""
    if isinstance(gold, MatrixBase | MatrixExpr) and isinstance(other, MatrixBase | MatrixExpr):
        gold, other = safe_sympy_doit(gold), safe_sympy_doit(other)
        if not (isinstance(gold, MatrixBase) and isinstance(other, MatrixBase) and gold.shape == other.shape):
            return False
        return all(equal_values(*pair) for pair in zip(gold.flat(), other.flat(), strict=True))
    if not (isinstance(gold, Expr) and isinstance(other, Expr)):
        return False
    if _equal(gold, other):
        return True
    percent, other_percent = _percent(gold), _percent(other)
    if (percent is None) == (other_percent is None):
        return False
    return _equal(percent or gold, other_percent or other)  # 8% and 8


def _percent(value: Any) -> Any:
    """8 for 8%, which math-verify parses as 8 times an unevaluated 1/100; None for anything else."""
    if not value.is_Mul or _HUNDREDTH not in value.args:
        return None
    return Mul(*(factor for factor in value.args if factor != _HUNDREDTH))


def _equal(gold: Any, other: Any) -> bool:
    gold, other = safe_sympy_doit(gold), safe_sympy_doit(other)
    if gold == other:
        return True
    if gold.free_symbols or other.free_symbols:
        return _equal_where_real(gold, other)
    if not all(value.is_number and not value.has(*_NO_NUMBERS) for value in (gold, other)):
        return False
    if not (gold.has(Float) or other.has(Float)):
        return not (gold.is_Rational and other.is_Rational) and _close(gold, other, _EXACT)
    parts = _TWO_DECIMALS if _terminates(gold) and _terminates(other) else _DECIMAL_AND_EXACT
    if gold.has(Float) and not other.has(Float):
        gold, other = other, gold  # relative to the exact one
    return _close(_rational(gold), _rational(other), parts)


def _terminates(value: Any) -> bool:
    """Whether a number is a decimal, or can be written as one of at most six decimals."""
    return isinstance(value, Float) or (value.is_Rational is True and (value * 10**6).is_Integer is True)


def _rational(value: Any) -> Any:
    """Decimals as they are written: 0.1 is 1/10."""
    return value.xreplace({number: Rational(str(number)) for number in value.atoms(Float)})


def _close(gold: Any, other: Any, parts: int) -> bool:
    """Whether they differ by no more than a `parts`-th of `gold`."""
    difference, scale = Abs(gold - other) * parts, Abs(gold)
    if not (difference.is_Rational and scale.is_Rational):
        difference, scale = difference.evalf(_DIGITS), scale.evalf(_DIGITS)
    return bool(difference.is_comparable and scale.is_comparable and difference <= scale)


def _equal_where_real(gold: Any, other: Any) -> bool:
    """Whether expressions with radicals are equal at all real points at which either is real.

    1/sqrt(n) and sqrt(1/n) are, though sympy, which lets n be negative, does not simplify their difference.
    sqrt(x**2) and x are not.
    """
    symbols = sorted(gold.free_symbols | other.free_symbols, key=str)
    if not all(value.is_Add or value.is_Mul or value.is_Pow for value in (gold, other)) or len(symbols) > 4:
        return False
    powers = gold.atoms(Pow, log) | other.atoms(Pow, log)
    if all(isinstance(power, Pow) and power.exp.is_integer for power in powers):
        return False
    difference, _ = posify(Add(gold, -other))
    if simplify(difference) != 0:
        return False
    for signs in product((1, -1), repeat=len(symbols)):
        point = _point(symbols, signs)
        first, second = gold.subs(point).evalf(30), other.subs(point).evalf(30)
        if (first.is_real or second.is_real) and not abs(first - second) <= abs(first) * 1e-20:
            return False
    return True


def differ(gold: object, other: object) -> bool:
    """Whether two expressions have different values at one point. Then nothing has to be simplified.

    False if either is a symbol, which may stand for a word, or has no value there.
    """
    if not (isinstance(gold, Expr) and isinstance(other, Expr)) or gold.is_Symbol or other.is_Symbol:
        return False
    symbols = sorted(gold.free_symbols | other.free_symbols, key=str)
    if not symbols:
        return False
    point = _point(symbols, [1] * len(symbols))
    values: list[Any] = [value.subs(point).doit().evalf(30) for value in (gold, other)]
    if not all(isinstance(value, Number) or value.as_real_imag()[1].is_Float for value in values):
        return False
    first, second = values
    return bool(abs(first - second) > 1e-5 * max(abs(first), abs(second)))


def _point(symbols: Sequence[Any], signs: Sequence[int]) -> dict[Any, Any]:
    """A value for each symbol that no answer is likely to treat as special."""
    return {
        symbol: Rational(sign * (10007 + 211 * index), 8009 + 97 * index)
        for index, (symbol, sign) in enumerate(zip(symbols, signs, strict=True))
    }
