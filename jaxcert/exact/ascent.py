"""Good slopes and multipliers for proofs, by gradient ascent.

The bound of `enclosures.py` once more, for JAX: one row for each sub-domain, in float32, without
rounding. What comes out are hints for the checker.
"""

import dataclasses
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.exact.enclosures import Bounds
from jaxcert.pytrees import pytree

Array: TypeAlias = Any

CHUNK = 32  # sub-domains at a time
CANDIDATES = 4  # for a split, whose halves are bounded


@pytree
@dataclasses.dataclass(frozen=True)
class Hints:
    """What bounds of b sub-domains are improved by.

    Attributes:
      slopes: of the lines below kinks, (b, h) for the h entries of all kinks.
      multipliers: of the cuts, (b, h).
      weights: of the rows of the and, (b, r).
    """

    slopes: Array
    multipliers: Array
    weights: Array


@pytree
@dataclasses.dataclass(frozen=True)
class Rows:
    """For each of b sub-domains, r functions A v + d of a value v: (b, r, n) and (b, r)."""

    matrix: Array
    offset: Array


@pytree
@dataclasses.dataclass(frozen=True)
class Place:
    """Where hidden values may be.

    Attributes:
      box: of the inputs, (2, m).
      lower, upper: of the operands of all kinks, (h,) each.
    """

    box: Array
    lower: Array
    upper: Array


class Ascent:
    """Bounds of one net's values, compiled when they are first needed."""

    def __init__(self, bounds: Bounds):
        self.net, self.parts = bounds.net, bounds.parts
        self.least = jnp.asarray(bounds.least, jnp.float32)
        steps = [step and step.converted(_narrow) for step in bounds.net.steps]
        self.arrays = [step and (step.offset, [m.matrix for _, m in step.parts]) for step in steps]
        self._improved = jax.jit(self._ascend, static_argnums=(1,))
        self._expanded = jax.jit(self._expand, static_argnums=(1,))

    def improved(
        self, start: int, rows: Rows, where: Place, sign: Array, hints: Hints, steps: int
    ) -> tuple[Hints, Array, Array]:
        """Better hints for bounds of rows of the value `start`, weighted, in any number of
        sub-domains.

        Args:
          sign: of each hidden value that is cut at its kink, int8 (b, h): 1 where it is above, -1
            where it is below; 0 for those that are not cut.

        Returns:
          The hints with the best bounds that were met, these (b,), and the coefficients of the
          inputs there, (b, m).
        """
        found = []
        for i in range(0, len(sign), CHUNK):
            part = jax.tree.map(lambda a: a[i : i + CHUNK], (rows, sign, hints))  # noqa: B023
            part, count = _filled(part)
            result = self._improved(self.arrays, start, part[0], where, *part[1:], steps)
            found.append(jax.tree.map(lambda a: np.asarray(a)[:count], result))  # noqa: B023
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    def expanded(
        self, start: int, rows: Rows, where: Place, sign: Array, hints: Hints, steps: int
    ) -> tuple[Array, Array, tuple[Hints, Array, Array]]:
        """The hidden value to split in each of at most `CHUNK` sub-domains, (b,), -1 if there is
        none; the signs of the halves (2, b, h), first below, then above; and what `improved` says
        of these, (2, b, ...)."""
        (rows, sign, hints), b = _filled((rows, sign, hints))
        result = self._expanded(self.arrays, start, rows, where, sign, hints, steps)
        place, *halves = jax.tree.map(np.asarray, result)
        halves = jax.tree.map(lambda a: a.reshape(2, CHUNK, *a.shape[1:])[:, :b], halves)
        return place[:b], halves[0], halves[1]

    # --- The bound

    def _below(
        self, arrays: Any, start: int, rows: Rows, where: Place, sign: Array, hints: Hints
    ) -> tuple[Array, Array, Array]:
        """Bounds (b,), coefficients of the inputs (b, m) and of all kinks (b, h)."""
        net = self.net
        l, u = jnp.where(sign > 0, 0.0, where.lower), jnp.where(sign < 0, 0.0, where.upper)
        pending = {start: jnp.sum(hints.weights[..., None] * rows.matrix, 1)}
        low = jnp.sum(hints.weights * rows.offset, 1)
        seen = [jnp.zeros((len(sign), part.stop - part.start)) for part in self.parts]
        for v in range(start, 0, -1):
            if v not in pending:
                continue
            a, step = pending.pop(v), net.steps[v]
            assert step is not None
            for y, part in zip(net.kinks, self.parts, strict=True):
                if net.operand(y) == v:  # the cuts are at 0, so nothing is added to the bound
                    a = a - (sign * hints.multipliers)[:, part]
            if step.left is None:
                offset, matrices = arrays[v]
                low = low + a @ offset
                pulled = [_pull(a, matrix) for matrix in matrices]
            else:
                k = net.kinks.index(v)
                seen[k], part = a, self.parts[k]
                lines = _lines(l[:, part], u[:, part], hints.slopes[:, part], step.left)
                low = low + jnp.sum(jnp.minimum(a, 0) * lines[2], 1)
                pulled = [jnp.maximum(a, 0) * lines[0] + jnp.minimum(a, 0) * lines[1]]
            for (x, _), part in zip(step.parts, pulled, strict=True):
                pending[x] = pending[x] + part if x in pending else part
        a, (lower, upper) = pending[0], where.box
        low = low + jnp.maximum(a, 0) @ lower + jnp.minimum(a, 0) @ upper
        return low, a, jnp.concatenate(seen, 1)

    def _ascend(
        self, arrays: Any, start: int, rows: Rows, where: Place, sign: Array, hints: Hints,
        steps: Any,
    ) -> tuple[Hints, Array, Array]:  # fmt: skip
        """Adam, with multipliers in units of the coefficients of their kinks."""
        import optax  # here, because it takes longer to load than all the rest

        _, matrix, seen = self._below(arrays, start, rows, where, sign, hints)
        seen = [abs(seen[:, part]) for part in self.parts]
        unit = [jnp.broadcast_to(jnp.max(a, 1, keepdims=True), a.shape) for a in seen]
        unit = jnp.concatenate(unit, 1)
        unit = jnp.where(unit > 0, unit, 1.0)
        optimiser = optax.adam(optax.exponential_decay(0.1, 1, 0.97))

        def actual(p: Hints) -> Hints:
            return dataclasses.replace(p, multipliers=p.multipliers * unit)

        def loss(p: Hints):
            low, matrix, _ = self._below(arrays, start, rows, where, sign, actual(p))
            return -jnp.sum(low), (low, matrix)

        def step(_, carry):
            p, state, best = carry
            slope, (low, matrix) = jax.grad(loss, has_aux=True)(p)
            keep = low > best[1]
            best = jax.tree.map(lambda a, b: _chosen(keep, a, b), (p, low, matrix), best)
            updates, state = optimiser.update(slope, state)
            return self._allowed(jax.tree.map(jnp.add, p, updates), sign), state, best

        p = dataclasses.replace(hints, multipliers=hints.multipliers / unit)
        best = p, jnp.full(len(sign), -jnp.inf), matrix
        carry = p, optimiser.init(p), best  # type: ignore[arg-type]
        _, _, (p, low, matrix) = jax.lax.fori_loop(0, steps + 1, step, carry)
        return actual(p), low, matrix

    def _allowed(self, p: Hints, sign: Array) -> Hints:
        weights = jnp.maximum(p.weights, 1e-6)
        return Hints(
            jnp.clip(p.slopes, self.least, 1),
            jnp.where(sign != 0, jnp.maximum(p.multipliers, 0), 0),
            weights / jnp.sum(weights, 1, keepdims=True),
        )

    # --- Splits

    def _expand(
        self, arrays: Any, start: int, rows: Rows, where: Place, sign: Array, hints: Hints,
        steps: Any,
    ) -> tuple[Array, Array, tuple[Hints, Array, Array]]:  # fmt: skip
        """Splits of those among the kinks with the largest share in the gap between net and bound
        whose halves have the best bounds before any ascent."""
        below = functools.partial(self._below, arrays, start)
        _, _, seen = below(rows, where, sign, hints)
        l, u = jnp.where(sign > 0, 0.0, where.lower), jnp.where(sign < 0, 0.0, where.upper)
        slope, _, above = _lines(l, u, hints.slopes, self.least)
        gap = jnp.where(seen < 0, above, jnp.minimum((slope - self.least) * -l, (1 - slope) * u))
        gain = jnp.where((l < 0) & (u > 0), abs(seen) * gap + 1e-30, -1.0)
        _, places = jax.lax.top_k(gain, min(CANDIDATES, gain.shape[1]))
        entries = jnp.arange(gain.shape[1])

        def half(place: Array, side: Any) -> Array:
            return jnp.where(entries == place[:, None], side, sign).astype(sign.dtype)

        def worth(place: Array) -> Array:
            ends = [below(rows, where, half(place, side), hints)[0] for side in (-1, 1)]
            low, high = (jnp.minimum(end, 0) for end in ends)
            return jnp.minimum(low, high) + 0.1 * jnp.maximum(low, high)

        values = jax.lax.map(worth, places.T).T
        values = jnp.where(jnp.take_along_axis(gain, places, 1) > 0, values, -jnp.inf)
        best = jnp.take_along_axis(places, jnp.argmax(values, 1)[:, None], 1)[:, 0]
        signs = jnp.concatenate([half(best, side) for side in (-1, 1)])
        twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), (rows, hints))
        found = self._ascend(arrays, start, twice[0], where, signs, twice[1], steps)
        return jnp.where(jnp.max(gain, 1) > 0, best, -1), signs, found


def _filled(parts: Any) -> tuple[Any, int]:
    """Arrays of `CHUNK` sub-domains from some of fewer, and their number."""
    count = len(jax.tree.leaves(parts)[0])
    return jax.tree.map(lambda a: a[np.arange(CHUNK) % count], parts), count


def _narrow(a: Array) -> Array:
    return jnp.asarray(np.asarray(a, np.float32))


def _pull(a: Array, matrix: Array) -> Array:
    if matrix is None:
        return a
    return a * matrix if matrix.ndim == 1 else a @ matrix


def _chosen(keep: Array, new: Array, old: Array) -> Array:
    return jnp.where(keep.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def _lines(l: Array, u: Array, slopes: Array, left: Any) -> tuple[Array, Array, Array]:
    """Slopes below and above kinks, and how high the line above is at 0."""
    crosses = (l < 0) & (u > 0)
    width = jnp.where(crosses, u - l, 1.0)
    chord = jnp.where(crosses, left + (1 - left) * u / width, jnp.where(l >= 0, 1.0, left))
    return jnp.where(crosses, slopes, chord), chord, jnp.where(crosses, (left - chord) * l, 0.0)
