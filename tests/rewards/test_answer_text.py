r"""One answer written in many ways is one answer, and another answer in the same clothes is another."""

import random
from itertools import islice

import pytest

from tests.rewards.test_math_answer import gold_answers, needs_data
from tests.support.dressed_answers import SPOILS, WAYS
from treepo.rewards.math_answer import equal_answers, grade_math
from treepo.tree import Verdict

EQUAL = r"""
10 | 10 \frac{\text{m}}{\text{s}}
10 | 10\ \mathrm{kg \cdot m/s^2}
10 | 10 \mathrm{~m} / \mathrm{s}^{2}
10 | 10\,\mu\text{m}
10 | 10 m
10 | \text{10 cm}
25 | 25^\circ\text{C}
25 | 25°C
1000 | \$1,000 \text{ USD}
1234567 | 1\,234~567
1234.5 | 1,234.5
5000000 | 5 \text{ million dollars}
5 \text{ cm} | 5 \text{ centimeters}
5 \text{ cm} | 5
7:30 | 7:30 \text{ PM}
12:30 | 12{:}30
3:2 | 6:4
\frac{1}{2} | ½
\frac{3}{2} | 1½
-\frac{3}{2} | -1 1/2
\frac{3}{2} | 1\tfrac12
\frac{3}{2} | {3 \over 2}
\frac{1}{6} | 0.1\overline{6}
\frac{1}{7} | 0.(142857)
\frac{1}{2} | 50\%
62.5\% | 62.5
-8 | -8\%
x^2+1 | x²+1
2\pi | 2π
-5 | −5
12 | １２
\text{Tuesday} | \textbf{tuesday.}
C | \textbf{(C)}\ 14
A | (A)
5,7 | 5 \text{ or } 7
5,7 | \{7, 5\}
5,7 | x=5 \text{ or } x=7
3,-3 | \pm 3
(1,2) | (x,y)=\left( 1,\, 2 \right)
[1,2) | 1 \leq x < 2
(5,\infty) | x>5
1011_2 | 1011_{2}
1011 | 1011_2
x \neq 0 | 0 \ne x
\emptyset | \{\}
\sqrt{\frac{a}{b}} | \frac{\sqrt{a}}{\sqrt{b}}
\frac{\sqrt{n}}{n} | \frac{1}{\sqrt{n}}
\frac{1}{3} E_{1} | E_{1}/3
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{bmatrix}1 & 2 \\ 3 & 4\end{bmatrix}
6.02 \times 10^{23} | 6.02 x 10^23
e^x | \mathrm{e}^{x}
1,2,\ldots,n | 1, 2, ..., n
y'+y=0 | y^{\prime}+y=0
20! | 2432902008176640000
\sqrt{2} | 1.41421356
0.333333 | \frac{1}{3}
\frac{1}{3} | 0.333...
\frac{1}{6} | 0.1666\ldots
\frac{4}{33} | 0.1212…
\frac{1}{2} | \sin 30^\circ
\frac{1}{8} | \cos 20^{\circ} \cos 40^{\circ} \cos(80°)
2\cos 80^\circ | 2\sin{10}^\circ
\tan 22.5^\circ | \sqrt{2}-1
7 | {\bf 7}
7 | \bf{7}
7 | \huge\rm 7
7 | 7 {\rm cm}
\sqrt{7} | \sqrt{\bf 7}
7 | \colorbox{yellow}{$7$}
7 | \fcolorbox{red}{white}{7}
7 | \framebox{7}
7 | \textsc{7}
7 | \approx 7
7 | = 7。
7 | 7 \quad \blacksquare
7 | 7 \tag{2}
7 | 7\textdegree
7 \text{ cents} | 7¢
"""
DIFFERENT = r"""
10 | 10 \text{ million}
10 | 10 \text{ or more}
10 | \text{at least } 10
10 | \text{not } 10
10 | x > 10
10 | x^2 = 10
10 | 10 dozen
10 | 10 \text{ thirds}
10 | 10, 10
357 | 12 345
46 | 12 34
5 \text{ cm} | 5 \text{ m}
5 \text{ cm} | 5 \text{ cm}^2
\$5 | €5
7:30 \text{ am} | 7:30 \text{ pm}
12:30 | 2:05
3:15 | 1:05
12:00 | 11:00
50\% | 0.05
(1,2) | \{1,2\}
(6,5) | [6,5]
(1,2,3) | \{1,2,3\}
\{1,2\} | (1,2)
[1,2] | 1,2
5,7 | (7,5)
5,7 | 5,7,7
-2,-2 | -2
16,3,1,1 | 16,3,1
\pm 3 | 3
1011_2 | 1011_3
\frac{1}{3} | 0.333
\frac{1}{3} | 0.\overline{33}4
1234 | (1,234)
1234 | 1, 234
Tuesday | Tuesyad
dog | god
yes | \text{No}
C | \textbf{(D)}\ 14
x=5 | y=5
x \neq 0 | x > 0
x | \sqrt{x^2}
\sqrt{x^2} | -x
\log(x^2) | 2\log x
\frac{x}{2^{70}} | \frac{x}{2^{71}}
\{\frac{1}{2^{70}},1\} | \{\frac{1}{2^{71}},1\}
(\frac{1}{2^{70}},1) | (\frac{1}{2^{71}},1)
[\frac{1}{2^{70}},1] | [\frac{1}{2^{71}},1]
x=\frac{1}{2^{70}} | x=\frac{1}{2^{71}}
\begin{pmatrix}\frac{1}{2^{70}}&1\end{pmatrix} | \begin{pmatrix}\frac{1}{2^{71}}&1\end{pmatrix}
\frac{\sqrt{2}}{10^{30}} | \frac{\sqrt{3}}{10^{30}}
e^{-100} | e^{-101}
0 | \frac{1}{3^{80}}
1/19! | 1/18!
0.123456789 | 0.123456798
1234567.5 | 1234567.6
6m | 6
N=n | N=n+1
0=1 | x=x+1
\frac{1}{3} E_{1} | \frac{1}{3} E_{2}
(-\infty,-5) | (+\infty,-5)
y'+y=0 | y+y=0
2, 4, \ldots, 2n | 2, 4, 2n
\infty | -\infty
\sin 30 | \sin 30^\circ
\frac{1}{2} | \sin 31^\circ
\cos 20^\circ | \cos 70^\circ
\frac{1}{3} | 0.334...
\frac{1}{3} | 0.33...
\pi | 3.14...
7 | \approx 7.3
7 | {\bf 8}
5 \text{ cents} | €5
"""


def pairs(table: str) -> list[tuple[str, str]]:
    return [(gold, other) for gold, _, other in (line.partition(" | ") for line in table.split("\n") if line)]


@pytest.mark.parametrize(("gold", "other"), pairs(EQUAL))
def test_one_answer_written_differently(gold: str, other: str) -> None:
    assert equal_answers(gold, other)


@pytest.mark.parametrize(("gold", "other"), pairs(DIFFERENT))
def test_two_answers_that_look_alike(gold: str, other: str) -> None:
    assert not equal_answers(gold, other)


@pytest.mark.parametrize(("decimal", "equal"), [("0.142857", True), ("0.142859", False), ("0.14", False)])
def test_a_decimal_equals_an_exact_number_within_a_millionth(decimal: str, equal: bool) -> None:
    assert equal_answers(r"\frac{1}{7}", decimal) == equal
    assert equal_answers(r"\frac{1}{7} \cdot 10^{-9}", rf"{decimal} \cdot 10^{{-9}}") == equal
    assert equal_answers(r"\{\frac{10^9}{7}, 1\}", rf"\{{{decimal} \cdot 10^9, 1\}}") == equal


@pytest.mark.parametrize(
    "other", ["0.(?)", r"0.\overline{?}", "1 ?/?", r"1\frac{?}{?}", "?:00", r"?~\text{cm}"]
)
def test_numbers_of_thousands_of_digits_are_no_error(other: str) -> None:
    assert not equal_answers(r"\frac{1}{3}", other.replace("?", "3" * 5000))


def wrong_verdicts(answers: list[str]) -> tuple[int, list[str]]:
    """The number of dressed answers, and those that were graded wrong."""
    wrong, count = [], 0
    for name, dress in WAYS.items():
        for answer in answers:
            dressed = dress(answer.replace("$", "").strip())
            if dressed is None:
                continue
            count += 1
            if grade_math(rf"so \boxed{{{dressed}}}", answer)[0] is not Verdict.CORRECT:
                wrong.append(f"{name}: {dressed} for {answer}")
    return count, wrong


@needs_data
def test_dressed_gold_answers_of_a_sample_are_correct() -> None:
    count, wrong = wrong_verdicts(random.Random(0).sample(gold_answers(), 150))
    assert wrong == []
    assert count > 1500


@needs_data
@pytest.mark.slow
def test_every_gold_answer_is_correct_in_every_dress() -> None:
    count, wrong = wrong_verdicts(gold_answers())
    assert wrong == []
    assert count > 25_000


def accepted_misses(of_a_kind: int) -> tuple[int, list[tuple[str, str]]]:
    """The number of near misses, and those that were graded right."""
    rng = random.Random(1)
    answers = list(dict.fromkeys(answer.replace("$", "").strip() for answer in gold_answers()))
    misses: list[tuple[str, str]] = []
    for spoil in SPOILS.values():
        spoilt = ((answer, spoil(answer, rng)) for answer in rng.sample(answers, len(answers)))
        found = ((answer, miss) for answer, miss in spoilt if miss is not None and miss != answer)
        misses += islice(found, of_a_kind)
    verdicts = [grade_math(rf"\boxed{{{miss}}}", answer)[0] for answer, miss in misses]
    return len(misses), [
        pair for pair, verdict in zip(misses, verdicts, strict=True) if verdict is not Verdict.WRONG
    ]


@needs_data
def test_near_misses_of_a_sample_are_wrong() -> None:
    assert accepted_misses(of_a_kind=6) == (6 * len(SPOILS), [])


@needs_data
@pytest.mark.slow
def test_near_misses_are_wrong() -> None:
    count, accepted = accepted_misses(of_a_kind=40)
    assert accepted == []
    assert count > 250
