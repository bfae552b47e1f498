"""Formulas in disjunctive normal form, sorted by what they say about the inputs.

A `Region` is an or over its entries; an entry says that all of its input rows hold and all rows of
one of its ands of output rows. Rows are known by their numbers. Dicts without values are sets that
keep their order. An or over outputs stays beside the thousands of bounds on the inputs instead of
being multiplied with them.
"""

import itertools
from collections.abc import Iterable
from typing import TypeAlias

from jaxcert.errors import VnnlibError

MAX_ROWS = 4_000_000
"""How many rows a formula may have once it is written as an or of ands."""

Rows: TypeAlias = frozenset[int]
Ands: TypeAlias = dict[Rows, None]
Region: TypeAlias = dict[Rows, Ands]

NO_ROWS: Rows = frozenset()
ALWAYS: Ands = {NO_ROWS: None}
EVERYTHING: Region = {NO_ROWS: ALWAYS}
NOTHING: Region = {}


class TooManyRows(VnnlibError):
    """An or of ands would be longer than `MAX_ROWS`."""


def on_inputs(number: int) -> Region:
    """The region of one row about inputs."""
    return {frozenset((number,)): ALWAYS}


def on_outputs(number: int) -> Region:
    """The region of one row about outputs."""
    return {NO_ROWS: {frozenset((number,)): None}}


def any_of(parts: Iterable[Region]) -> Region:
    """The union of regions.

    >>> [sorted(rows) for ands in any_of([on_outputs(1), on_outputs(2)]).values() for rows in ands]
    [[1], [2]]
    """
    union: Region = {}
    for part in parts:
        for inputs, ands in part.items():
            union.setdefault(inputs, {}).update(ands)
    return union


def all_of(parts: list[Region]) -> Region:
    """The intersection of regions: ands without an or inside are joined at once, others multiply.

    Raises:
      TooManyRows: before a product that might be too long is formed.
    """
    plain = [part for part in parts if _size(part) == 1]
    region: Region = {
        NO_ROWS.union(*itertools.chain.from_iterable(plain)): {
            NO_ROWS.union(
                *(rows for part in plain for ands in part.values() for rows in ands)
            ): None
        }
    }
    for part in parts:
        if _size(part) != 1:
            _require_affordable(_cost(region) * _size(part) + _cost(part) * _size(region))
            region = any_of(
                {inputs | more_inputs: {a | b: None for a in ands for b in more_ands}}
                for inputs, ands in region.items()
                for more_inputs, more_ands in part.items()
            )
    return region


def _require_affordable(rows: int) -> None:
    if rows > MAX_ROWS:
        raise TooManyRows(
            f"found a formula with up to {rows:,} rows once it is written as an or of ands; "
            f"expected at most {MAX_ROWS:,}"
        )


def _size(region: Region) -> int:
    """The number of ands, input rows included, in the or."""
    return sum(map(len, region.values()))


def _cost(region: Region) -> int:
    """The number of rows that are stored, counting an empty and as one."""
    return sum(len(inputs) + sum(len(a) or 1 for a in ands) for inputs, ands in region.items())
