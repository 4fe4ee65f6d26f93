r"""Responses that a model may produce and that are hard on a grader, by name.

Most hang or exhaust sympy, Python's parser of integers or the stack; some only look as if they did.
"""


def _box(content: str) -> str:
    return rf"\boxed{{{content}}}"


def _nested(opening: str, closing: str, depth: int, core: str = "5") -> str:
    return _box(opening * depth + core + closing * depth)


_NUMBERS = {
    "tower of nines": _box("9^{9^{9^{9^{9}}}}"),
    "tower of tens": _box("10^{10^{10}}"),
    "negative tower": _box("2^{-2^{2^{2^{2^{2^2}}}}}"),
    "fractional tower": _box(r"(\frac{1}{2})^{10^{10^{10}}}"),
    "huge factorial": _box("10000000000!"),
    "factorial of a factorial": _box("((100!)!)!"),
    "huge binomial": _box(r"\binom{1000000000}{500000000}"),
    "huge power plus one": _box("3^{1000000000}+1"),
    "power of a power": _box("(7^{1000})^{1000000}"),
    "root of a power": _box(r"\sqrt{2^{10000000001}}"),
    "100k digits": _box("7" * 100_000),
    "1M digits": _box("7" * 1_000_000),
    "100k digits with commas": _box(",".join(["777"] * 33_333)),
    "ratio of long integers": _box(rf"\frac{{{'3' * 50_000}}}{{{'9' * 50_000}}}"),
    "endless decimals": _box("0." + "3" * 1_000_000),
    "endless zeros": _box("5." + "0" * 200_000),
    "dots": _box("0.333..." * 2000),
    "scientific giant": _box("1e999999999"),
    "scientific dwarf": _box("1e-999999999"),
    "scientific written out": _box(r"1 \times 10^{999999999}"),
    "nan": _box("nan"),
    "infinity": _box(r"\infty"),
    "complex infinity": _box(r"\frac{1}{0}"),
    "zero to the zero": _box("0^0"),
    "percent of percent": _box("5" + r"\%" * 5000),
    "gamma": _box(r"\Gamma(10^{10})"),
    "zeta": _box(r"\zeta(1)"),
    "trigonometric giant": _box(r"\sin(10^{10^{8}})"),
    "logarithm of a giant": _box(r"\log(10^{10^{10}})"),
    "modulus": _box(r"2^{2^{100}} \bmod 1000007"),
}

_EXPRESSIONS = {
    "long sum": _box("+".join(f"x^{{{i}}}" for i in range(3000))),
    "long product": _box("".join(f"(x-{i})" for i in range(2000))),
    "power of a sum": _box("(a+b+c+d)^{500}"),
    "sum of fractions": _box("+".join(rf"\frac{{1}}{{x+{i}}}" for i in range(400))),
    "infinite sum": _box(r"\sum_{n=1}^{\infty} \frac{\sin(n^2)}{n^{n}}"),
    "endless product": _box(r"\prod_{k=1}^{10^{12}} k^{k}"),
    "integral": _box(r"\int_0^{\infty} e^{-x^{x^{x}}} \sin(x^{x}) dx"),
    "limit": _box(r"\lim_{x \to 0} x^{x^{x^{x}}} \sin(1/x)^{1/x}"),
    "derivative": _box(r"\frac{d}{dx} x^{x^{x^{x^{x^{x}}}}}"),
    "matrix": _box(r"\begin{pmatrix}" + r"\\".join(["&".join("1" * 150)] * 150) + r"\end{pmatrix}"),
    "determinant": _box(r"\det\begin{pmatrix}" + r"\\".join(["&".join("abcdefgh")] * 8) + r"\end{pmatrix}"),
    "equation chain": _box("=".join(["x"] * 5000)),
    "inequality chain": _box("<".join(f"x_{{{i}}}" for i in range(500))),
    "huge set": _box(r"\{" + ",".join(map(str, range(20_000))) + r"\}"),
    "union of intervals": _box(r"\cup".join(f"({i},{i + 0.5})" for i in range(300))),
}

_NESTING = {
    "1 MB of opening braces": "\\boxed{" + "{" * 1_000_000,
    "1 MB of balanced braces": _nested("{", "}", 500_000),
    "1 MB of closing braces": "}" * 1_000_000 + r"\boxed{5}"[:-1],
    "deep parentheses": _nested("(", ")", 2000),
    "deep roots": _nested(r"\sqrt{", "}", 1000),
    "deep fractions": _nested(r"\frac{1}{1+", "}", 500),
    "deep powers": _nested("x^{", "}", 1000),
    "deep boxes": _nested(r"\boxed{", "}", 5000),
    "deep brackets": _nested(r"\left[", r"\right]", 1500),
    "deep absolute values": _nested(r"\left|", r"\right|", 500),
    "unclosed fractions": _box(r"\frac" * 20_000),
    "unclosed lefts": _box(r"\left(" * 20_000),
    "100k boxes": r"\boxed{5}" * 100_000,
    "100k boxes, none closed": r"\boxed{" * 100_000,
}

_TEXT = {
    "NUL bytes": "\0\\boxed{\0005\0}\0",
    "NUL bytes, many": _box("\0" * 100_000),
    "lone surrogates": _box("\ud800\udfff5\udc00"),
    "lone surrogates outside": "\udcff" * 1000 + _box("7"),
    "right-to-left marks": _box("\u202e5\u202c\u200f"),
    "combining marks": _box("5" + "\u0301" * 50_000),
    "digits of other scripts": _box("٥५௫５"),
    "emoji": _box("🧮" * 10_000),
    "control characters": _box("".join(map(chr, range(32))) * 100),
    "code": _box("__import__('os').system('sleep 600')"),
    "code in a power": _box("(lambda f: f(f))(lambda f: f(f))^{2}"),
    "code that exits": _box("exit()"),
    "format fields": _box("{0.__class__.__mro__[1].__subclasses__()}"),
    "dollars": _box("$" * 20_000),
    "backslashes": _box("\\\\" * 50_000),
    "ands and ors": _box("5 and 6 or " * 3000 + "7"),
    "spaces": _box(" " * 500_000 + "5"),
    "line breaks": _box("5\n" * 20_000),
    "operators": _box("+-*/^" * 5000),
    "text": _box(r"\text{" + "five " * 20_000 + "}"),
    "units": _box("5" + r"\mathrm{~cm}" * 3000),
    "a long response": "Let us think. " * 100_000 + _box("7"),
}

HOSTILE = _NUMBERS | _EXPRESSIONS | _NESTING | _TEXT
