r"""The files around a property in VNN-COMP: lists of instances, and counterexamples as text.

The forms are those of the competition's rules (Brix et al., "The Fourth International Verification
of Neural Networks Competition", arXiv 2312.16760): `instances.csv` has lines `onnx,vnnlib,timeout`
with paths relative to its folder, a counterexample is `((X_0 0.1)\n(X_1 0.2)\n(Y_0 3.0))`.
"""

import csv
import dataclasses
import decimal
import math
import os
import pathlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from jaxcert.errors import VnnlibError
from jaxcert.io.unsafe import Case


@dataclasses.dataclass(frozen=True)
class Instance:
    """One line of an `instances.csv`: a network, a property of it, and seconds to decide."""

    network: pathlib.Path
    property: pathlib.Path
    timeout: float


class Printed(NamedTuple):
    """Numbers as they are printed, and the exact values of what is printed."""

    texts: tuple[str, ...]
    values: tuple[Fraction, ...]


def instances(path: str | os.PathLike[str]) -> list[Instance]:
    """The instances that a csv file lists; its paths exist as they stand or with `.gz` appended.

    Raises:
      VnnlibError: at a line that is not `onnx,vnnlib,timeout`.
      FileNotFoundError: at a line that names a file which does not exist.
    """
    path = pathlib.Path(path)
    found = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, skipinitialspace=True)
        for row in rows:
            if any(cell.strip() for cell in row):
                found.append(_instance(row, path.parent, f"{path}:{rows.line_num}"))
    return found


def _instance(row: list[str], folder: pathlib.Path, place: str) -> Instance:
    cells = [cell.strip() for cell in row]
    if len(cells) != 3:
        raise VnnlibError(f"{place}: found {len(cells)} columns; expected onnx,vnnlib,timeout")
    try:
        timeout = float(cells[2])
    except ValueError:
        timeout = math.nan
    if not timeout > 0:
        raise VnnlibError(f"{place}: found the timeout {cells[2]!r}; expected seconds > 0")
    network, prop = (_existing(folder / cell, place) for cell in cells[:2])
    return Instance(network, prop, timeout)


def _existing(path: pathlib.Path, place: str) -> pathlib.Path:
    compressed = path.with_name(path.name + ".gz")
    for candidate in (path, compressed):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{place}: neither {path} nor {compressed} exists")


def nearest_inside(case: Case, x: Sequence[float]) -> Printed:
    """An input as decimals that lie in the box of a case, exactly.

    Each is the shortest decimal that reads back as the float64; where that decimal lies outside of
    the box, by rounding or by more, it is the end of the box as the file gives it. An end that no
    decimal expresses, `(/ 1 3)`, is rounded inwards to 20 digits. Cuts, ends that do not belong to
    the box and boxes too narrow for 20 digits are left to `case.contains(values)`.

    >>> third, tenth = Fraction(1, 3), Fraction("0.1")
    >>> case = Case((third, Fraction(0)), (Fraction(1), tenth), (), ((),))
    >>> nearest_inside(case, [0.0, 0.1000000001]).texts
    ('0.33333333333333333334', '0.1')

    Raises:
      ValueError: where x is NaN or of another length.
    """
    if len(x) != len(case.lower):
        raise ValueError(f"expected {len(case.lower)} inputs, got {len(x)}")
    texts = tuple(map(_inside, map(float, x), case.lower, case.upper))
    return Printed(texts, tuple(map(Fraction, texts)))


def _inside(value: float, lower: Fraction, upper: Fraction) -> str:
    if math.isnan(value):
        raise ValueError("expected an input of numbers, got NaN")
    exact = Fraction(repr(value)) if math.isfinite(value) else None
    if value < 0 if exact is None else exact < lower:
        return decimal_text(lower, decimal.ROUND_CEILING)
    if exact is None or exact > upper:
        return decimal_text(upper, decimal.ROUND_FLOOR)
    return repr(value)


def decimal_text(number: Fraction, rounding: str = decimal.ROUND_HALF_EVEN) -> str:
    """A number as a decimal: exactly where there is one, else rounded to 20 digits.

    >>> decimal_text(Fraction("0.1")), decimal_text(Fraction(2, 3))
    ('0.1', '0.66666666666666666667')
    """
    top, bottom = decimal.Decimal(number.numerator), decimal.Decimal(number.denominator)
    try:
        exact = decimal.Context(prec=1100, traps=[decimal.Inexact])
        return str(exact.divide(top, bottom))
    except decimal.Inexact:
        return str(decimal.Context(prec=20, rounding=rounding).divide(top, bottom))


def counterexample_text(xs: Sequence[Any], ys: Sequence[Any]) -> str:
    r"""A counterexample in the form that VNN-COMP reads after the line `sat`.

    Args:
      xs: the inputs: texts of `nearest_inside`, or floats, which are printed to be read back as
        they are.
      ys: the outputs, likewise.

    >>> print(counterexample_text(["0.1", 0.25], [3]))
    ((X_0 0.1)
    (X_1 0.25)
    (Y_0 3.0))
    """
    named = [(f"X_{i}", x) for i, x in enumerate(xs)] + [(f"Y_{i}", y) for i, y in enumerate(ys)]
    pairs = (f"({name} {v if isinstance(v, str) else repr(float(v))})" for name, v in named)
    return "(" + "\n".join(pairs) + ")"
