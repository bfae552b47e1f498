"""Linear terms of a property file, as exact sums."""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import TypeAlias

from jaxcert.io import sexpr
from jaxcert.io.sexpr import Atom, Node, Source

Variable: TypeAlias = tuple[str, int]
"""("X", i) or ("Y", j)."""

ONE: Variable = ("", 0)
"""Stands for the number 1, so that a sum is one dict."""

Sum: TypeAlias = dict[Variable, Fraction]

_NUMBER = re.compile(r"[+-]?(?=\.?[0-9])[0-9]{0,1000}\.?[0-9]{0,1000}([eE][+-]?[0-9]{1,4})?")
_EXPECTED = (
    "a linear term: a number, a declared X_i or Y_j, or a sum (+ ...), a difference (- ...), "
    "a product (* ...) or a quotient (/ ...) of them"
)
_FEWEST = {"+": 1, "-": 1, "*": 1, "/": 2}


def add(node: Node, scale: Fraction, total: Sum, declared: Mapping[str, Variable], source: Source):
    """Add `scale` times a linear term to `total`, in place.

    Args:
      node: the term.
      scale: its factor.
      total: the sum so far.
      declared: the variables by name.
      source: where errors point.

    Raises:
      VnnlibError: for a name that is not declared, a word that is no number, a product of
        variables or a division by anything but a number other than 0.
    """
    if isinstance(node, Atom):
        variable = declared.get(node.text)
        value = scale if variable else scale * _number(node, source)
        _accumulate(total, variable or ONE, value)
        return
    operator, arguments = source.application(node, _EXPECTED)
    if operator not in _FEWEST:
        source.wrong(node.at, sexpr.show(node), _EXPECTED)
    if len(arguments) < _FEWEST[operator]:
        found, expected = f"{operator} of {len(arguments)} terms", f"at least {_FEWEST[operator]}"
        source.wrong(node.at, found, expected)
    if operator in "+-":
        for position, argument in enumerate(arguments):
            # (- a) is -a, (- a b c) is a - b - c.
            minus = operator == "-" and (position > 0 or len(arguments) == 1)
            add(argument, -scale if minus else scale, total, declared, source)
        return
    factors: list[Sum] = []
    for argument in arguments:
        factor: Sum = {}
        add(argument, Fraction(1), factor, declared, source)
        factors.append({variable: a for variable, a in factor.items() if a})
    if operator == "/":
        factors = _inverted(arguments, factors, source)
    for variable, a in _product(node, factors, source).items():
        _accumulate(total, variable, scale * a)


def _accumulate(total: Sum, variable: Variable, value: Fraction) -> None:
    total[variable] = total[variable] + value if variable in total else value


def _number(atom: Atom, source: Source) -> Fraction:
    if not _NUMBER.fullmatch(atom.text):
        source.wrong(atom.at, f"{sexpr.show(atom)}, which is not declared", _EXPECTED)
    return Fraction(atom.text)


def _inverted(arguments: list[Node], factors: list[Sum], source: Source) -> list[Sum]:
    """The factors of (/ a b c): a, 1 / b and 1 / c."""
    for argument, factor in zip(arguments[1:], factors[1:], strict=True):
        if factor.keys() != {ONE}:
            source.wrong(argument.at, sexpr.show(argument), "a divisor that is a number, not 0")
    return [factors[0], *({ONE: 1 / factor[ONE]} for factor in factors[1:])]


def _product(node: Node, factors: list[Sum], source: Source) -> Sum:
    """The product of sums of which at most one is not a number."""
    scale, product = Fraction(1), {ONE: Fraction(1)}
    for factor in factors:
        if factor.keys() <= {ONE}:
            scale *= factor.get(ONE, 0)
        elif product.keys() == {ONE}:
            product = factor
        else:
            source.wrong(node.at, "a product of variables", "a number times a linear term")
    return {variable: scale * a for variable, a in product.items()}
