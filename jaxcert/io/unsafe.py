"""The unsafe region that a property file describes: exactly, and in float64 for certifiers.

A file asserts what must *not* happen: an input x and y = f(x) make all of its assertions true. The
region is a union of cases, each a box of inputs cut by half-spaces and, on the outputs, an or of
ands of half-spaces. The property to prove is that no x of a case gives a y in its unsafe outputs.
"""

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np

from jaxcert.errors import VnnlibError
from jaxcert.specs import AllOf, AnyOf, Property, Spec

Conjunction: TypeAlias = "tuple[Row, ...]"


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """The condition a . v + c <= 0 on a vector v, or < 0 where it is strict.

    Attributes:
      terms: (index, coefficient) of the nonzero a, by index, scaled to coprime integers.
      offset: c.
      strict: whether v must not lie on the boundary.
    """

    terms: tuple[tuple[int, int], ...]
    offset: Fraction
    strict: bool = False

    @classmethod
    def scaled(cls, coefficients: Mapping[int, Fraction], offset: Fraction, strict: bool) -> "Row":
        """The row with these coefficients, not all zero; the positive scale is divided out.

        >>> Row.scaled({0: Fraction("0.1"), 2: Fraction("-0.3")}, Fraction("0.05"), False)
        Row(terms=((0, 1), (2, -3)), offset=Fraction(1, 2), strict=False)
        """
        exact = {i: a for i, a in sorted(coefficients.items()) if a}
        whole = math.lcm(*(a.denominator for a in exact.values()))
        integers = {i: a.numerator * (whole // a.denominator) for i, a in exact.items()}
        common = math.gcd(*integers.values())
        offset = offset if whole == common else offset * Fraction(whole, common)
        return cls(tuple((i, a // common) for i, a in integers.items()), offset, strict)

    def holds(self, values: Sequence[Fraction]) -> bool:
        """Whether the condition holds at a vector, exactly."""
        total = sum((a * values[i] for i, a in self.terms), self.offset)
        return total < 0 or (total == 0 and not self.strict)


@dataclasses.dataclass(frozen=True)
class Case:
    """One box of inputs with the outputs that are unsafe there.

    Attributes:
      lower: the exact lower ends of the inputs; `upper`: the upper ones, none below its lower end.
      cuts: conditions on the inputs that involve several of them, all of which hold in the case.
      unsafe: an or of ands of conditions on the outputs. An empty and holds for every output.
      open_ends: the ends of the box that do not belong to it, as strict rows (`(< X_0 1)`). A proof
        covers the closed box; only `contains` reads them.
    """

    lower: tuple[Fraction, ...]
    upper: tuple[Fraction, ...]
    cuts: tuple[Row, ...]
    unsafe: tuple[Conjunction, ...]
    open_ends: tuple[Row, ...] = ()

    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """The smallest float64 box around the exact one: lower and upper ends, (inputs,) each."""
        lower = np.array([rounded_down(end) for end in self.lower], np.float64)
        return lower, np.array([rounded_up(end) for end in self.upper], np.float64)

    def cut_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The cuts as `matrix @ x + offset <= 0`, (cuts, inputs) and (cuts,) in float64.

        The matrix is exact and the offset rounded down, so no x of the case is lost.

        Raises:
          VnnlibError: where no scale of a cut has coefficients that float64 represents.
        """
        return _float_rows(self.cuts, len(self.lower))

    def spec(self, k: int) -> Property:
        """The property to prove about the k outputs: no and of `unsafe` holds, strictly.

        An and fails where one of its rows does, a . y + c > 0. Ands of a single row, the usual
        form of robustness, become the rows of one `Spec`; each other one an `AnyOf`. Matrices are
        exact and offsets rounded down, so what is proved in float64 holds for the file's decimals.
        Arrays are NumPy's, because JAX outside of x64 would round them to float32.

        Raises:
          VnnlibError: where no scale of a row has coefficients that float64 represents.
        """
        single = [rows[0] for rows in self.unsafe if len(rows) == 1]
        parts: list[Property] = [Spec(*_float_rows(single, k))] if single else []
        for rows in self.unsafe:
            if not rows:  # nothing negates "always": a row that says -1 > 0
                parts.append(Spec(np.zeros((1, k)), np.full(1, -1.0)))
            elif len(rows) > 1:
                parts.append(AnyOf(tuple(Spec(*_float_rows([row], k)) for row in rows)))
        return parts[0] if len(parts) == 1 else AllOf(tuple(parts))

    def contains(self, x: Sequence[Fraction | float]) -> bool:
        """Whether an input lies in the case, exactly; floats stand for their exact values."""
        if len(x) != len(self.lower):
            raise ValueError(f"expected {len(self.lower)} inputs, got {len(x)}")
        values = _exact(x)
        return (
            values is not None
            and all(l <= v <= u for l, v, u in zip(self.lower, values, self.upper, strict=True))
            and all(row.holds(values) for row in self.cuts + self.open_ends)
        )

    def violated_by(self, y: Sequence[Fraction | float]) -> bool:
        """Whether outputs are unsafe, exactly; NaN and infinities never are."""
        values = _exact(y)
        return values is not None and any(
            all(r.holds(values) for r in rows) for rows in self.unsafe
        )


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a property file asserts: its unsafe region, the union of the cases.

    Attributes:
      inputs: how many inputs are declared; `outputs`: how many outputs.
      cases: at least one; none is known to be empty.
    """

    inputs: int
    outputs: int
    cases: tuple[Case, ...]

    def refuted_by(self, x: Sequence[Fraction | float], y: Sequence[Fraction | float]) -> bool:
        """Whether x with outputs y is a counterexample, exactly; that y = f(x) is not checked."""
        if len(y) != self.outputs:
            raise ValueError(f"expected {self.outputs} outputs, got {len(y)}")
        return any(case.contains(x) and case.violated_by(y) for case in self.cases)


def rounded_down(number: Fraction) -> float:
    """The largest float64 <= a number that is no subnormal, since XLA flushes those to zero.

    >>> rounded_down(Fraction("0.1")) < Fraction("0.1"), rounded_down(Fraction("0.5"))
    (True, 0.5)
    """
    try:
        nearest = number.numerator / number.denominator  # correctly rounded, as Python promises
    except OverflowError:
        return sys.float_info.max if number > 0 else -math.inf
    if abs(nearest) < sys.float_info.min:
        return 0.0 if number >= 0 else -sys.float_info.min
    top, bottom = nearest.as_integer_ratio()
    exceeds = top * number.denominator > number.numerator * bottom
    return math.nextafter(nearest, -math.inf) if exceeds else nearest


def rounded_up(number: Fraction) -> float:
    """The smallest float64 >= a number that is no subnormal."""
    return 0.0 - rounded_down(-number)


def _float_rows(rows: Sequence[Row], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows a . v + c <= 0 as a float64 matrix, exact, and offsets, rounded down.

    Coprime integers are the best scale: any other multiplies them by an odd number, which needs
    more bits, or by a power of two, which needs as many.
    """
    matrix = np.zeros((len(rows), width))
    offset = np.array([rounded_down(row.offset) for row in rows], np.float64)
    for r, row in enumerate(rows):
        if row.terms[-1][0] >= width:
            raise ValueError(f"a row is about entry {row.terms[-1][0]} of a vector of {width}")
        for i, a in row.terms:
            if a.bit_length() > 1000 or int(float(a)) != a:
                raise VnnlibError(
                    f"no scale of the row {dict(row.terms)} has coefficients that float64 "
                    "represents exactly; give them fewer digits in the file"
                )
            matrix[r, i] = a
    return matrix, offset


def _exact(values: Iterable[Any]) -> list[Fraction] | None:
    """The exact values of numbers, or None where one is NaN or infinite."""
    numbers = [v if isinstance(v, Fraction | int) else float(v) for v in values]
    if not all(isinstance(v, Fraction | int) or math.isfinite(v) for v in numbers):
        return None
    return [Fraction(v) for v in numbers]
