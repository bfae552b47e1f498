"""The property to decide in the form that a search works with.

Every property is a conjunction of clauses, each of which says that at each point of the set at
least one of its rows is positive. A point breaks the property if and only if all rows of some
clause are at most 0 there.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.sets import Array, InputSet
from jaxcert.specs import AllOf, AnyOf, Property, Spec

MOST_CLAUSES = 10_000


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Question:
    """For n sets: does every clause of rows hold at every point?

    Attributes:
      region: n sets.
      matrix, offset: the rows C y + d, (n, s, k) and (n, s).
      clauses: which rows each clause has, bool (n, c, s); a clause without rows is padding.
    """

    region: InputSet
    matrix: Any
    offset: Any
    clauses: Any

    @property
    def rows(self) -> Spec:
        """The rows as a spec."""
        return Spec(self.matrix, self.offset)


def question(region: InputSet, prop: Property, n: int, k: int) -> Question:
    """A property of k outputs on n sets as a question, in numpy's float64.

    Raises:
      ValueError: wrong shapes, rows that are not finite, or more than `MOST_CLAUSES` clauses.
    """
    specs: list[tuple[np.ndarray, np.ndarray]] = []
    groups = _conjunctive(prop, specs, n, k)
    matrix = np.concatenate([m for m, _ in specs], 1)
    offset = np.concatenate([d for _, d in specs], 1)
    if not (np.isfinite(matrix).all() and np.isfinite(offset).all()):
        raise ValueError("the rows of a property must be finite numbers")
    clauses = np.zeros((len(groups), matrix.shape[1]), bool)
    for clause, rows in zip(clauses, groups, strict=True):
        clause[list(rows)] = True
    return Question(region, matrix, offset, np.broadcast_to(clauses, (n, *clauses.shape)))


def _conjunctive(prop: Property, specs: list, n: int, k: int) -> list[frozenset[int]]:
    """The clauses of a property as sets of places in `specs`, which is filled up."""
    if isinstance(prop, Spec):
        start = sum(m.shape[1] for m, _ in specs)
        specs.append(_per_set(prop, n, k))
        return [frozenset([start + i]) for i in range(specs[-1][0].shape[1])]
    if not isinstance(prop, AllOf | AnyOf):
        raise TypeError(f"a property is a Spec, an AllOf or an AnyOf, got {type(prop).__name__}")
    if not prop.parts:
        raise ValueError(f"an {type(prop).__name__} without parts states nothing")
    parts = [_conjunctive(part, specs, n, k) for part in prop.parts]
    if isinstance(prop, AllOf):
        found = list(dict.fromkeys(itertools.chain(*parts)))
    else:
        found = [frozenset()]
        for part in parts:
            found = list(dict.fromkeys(a | b for a in found for b in part))
            _require_few(len(found))
    _require_few(len(found))
    return found


def _require_few(count: int) -> None:
    if count > MOST_CLAUSES:
        raise ValueError(
            f"the property has more than {MOST_CLAUSES} clauses when its AnyOf groups are "
            "multiplied out; state it as several properties"
        )


def _per_set(spec: Spec, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    matrix = np.asarray(spec.matrix, np.float64)
    if matrix.ndim not in (2, 3) or matrix.shape[-1] != k or matrix.shape[:-2] not in ((), (n,)):
        raise ValueError(
            f"the rows of a spec must be (s, {k}) or ({n}, s, {k}) for {n} sets and {k} outputs, "
            f"got {matrix.shape}"
        )
    matrix = np.broadcast_to(matrix, (n, *matrix.shape[-2:]))
    offset = np.broadcast_to(np.asarray(spec.offset, np.float64), matrix.shape[:2])
    return matrix, offset


def rows_at(question: Question, outputs: Array, index: Array) -> Array:
    """C y + d (m, s) for outputs (m, k), row i under question index[i]."""
    matrix = jnp.asarray(question.matrix, outputs.dtype)[index]
    offset = jnp.asarray(question.offset, outputs.dtype)[index]
    return jnp.sum(matrix * outputs[:, None, :], 2) + offset


def shortfall(rows: Array, clauses: Array) -> Array:
    """How far each clause is from being broken, (m, c): its largest row, at most 0 if broken."""
    largest = jnp.max(jnp.where(clauses, rows[:, None, :], -jnp.inf), 2)
    return jnp.where(jnp.any(clauses, 2), largest, jnp.inf)
