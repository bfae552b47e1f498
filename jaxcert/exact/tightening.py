"""Ranges of hidden values, tightened by branch and bound on each of them.

The range of one hidden value is a question of its own, with fewer functions in between than there
are up to the output, and every sub-domain of the search is the better for its answer. So a few
splits are spent on either end of the ranges around zero, one layer after the other, always on the
sub-domain with the least bound; the least of all is the new end.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.exact.beta_crown import Pass
from jaxcert.exact.branching import Options, split
from jaxcert.exact.domains import Candidates, Domains, Multipliers
from jaxcert.exact.inputs import first
from jaxcert.exact.model import Traceable
from jaxcert.exact.question import Question
from jaxcert.exact.ranges import Ranges
from jaxcert.floats import rounded_down, rounded_up
from jaxcert.sets import Array


@dataclasses.dataclass(frozen=True)
class Targets:
    """Ends of ranges: of which set, (t,), which hidden value, (t,), and its coefficient, 1 for the
    lower end and -1 for the upper one, (t,). In numpy."""

    owner: np.ndarray
    place: np.ndarray
    sign: np.ndarray

    def __len__(self) -> int:
        return len(self.owner)

    def part(self, start: int, size: int) -> "Targets":
        """So many of them, the last one again and again where there are no more."""
        index = np.minimum(np.arange(start, start + size), len(self) - 1)
        return Targets(self.owner[index], self.place[index], self.sign[index])


def targets(known: Ranges, owner: np.ndarray, gain: np.ndarray) -> list[Targets]:
    """Both ends of the ranges that matter, for each hidden variable, the most promising first.

    Args:
      known: the ranges of n sets.
      owner: of which set each of q questions is, (q,).
      gain: how much each hidden value matters to each question, (q, N).
    """
    worth = np.zeros(np.shape(known.lower))
    np.maximum.at(worth, owner, np.asarray(gain))
    found, start = [], 0
    for size, loose in zip(known.layout.sizes, known.loose, strict=True):
        mine = worth[:, start : start + size] * loose
        row, place = np.nonzero(mine > 2.0**-90)
        order = np.argsort(-mine[row, place], kind="stable")
        row, place = np.repeat(row[order], 2), np.repeat(place[order], 2) + start
        found.append(Targets(row, place, np.tile(np.array([1, -1], np.float32), len(order))))
        start += size
    return found


def beginning(known: Ranges, targets: Targets, like: Domains) -> Domains:
    """The whole set of each target as a sub-domain of which nothing is known."""
    t, lower, upper = len(targets), np.asarray(known.lower), np.asarray(known.upper)
    one: Any = np.ones((t, 1), np.float32)

    def none(a: Any) -> Any:
        return np.zeros((t, *a.shape[1:]), a.dtype)

    of_like: Multipliers = like.multipliers
    multipliers = Multipliers(none(of_like.share), none(of_like.hidden), one, none(of_like.cuts))
    nowhere: Any = np.full((t, like.next.place.shape[1]), -1, np.int32)
    following = Candidates(nowhere, none(like.next.cut), 1 + none(like.next.unit))
    low: Any = lower[targets.owner]
    high: Any = upper[targets.owner]
    bound: Any = np.full(t, -np.inf)
    return Domains(low, high, none(like.side), multipliers, bound, following, like.layout)


def bounds(
    model: Traceable, options: Options, splits: int, arrays: Any, question: Question,
    place: Array, sign: Array, start: Domains,
) -> Array:  # fmt: skip
    """Lower bounds (t,) of hidden values times their signs, after so many splits of each set. Only
    inside `enable_x64`.

    Args:
      question: t sets; what is asked of them does not matter.
      start: the sets as sub-domains.
    """
    t = len(place)
    question = dataclasses.replace(
        question,
        matrix=jnp.zeros_like(question.matrix[:, :1]),
        offset=jnp.zeros_like(question.offset[:, :1]),
        clauses=jnp.ones((t, 1, 1), bool),
    )
    both = jax.tree.map(lambda a: jnp.concatenate([a, a]), question)
    here = jnp.arange(start.lower.shape[1]) == place[:, None]
    goal = jnp.where(here, sign[:, None], 0.0).astype(jnp.float32)
    passes = functools.partial(Pass, model, arrays, both, goal=jnp.tile(goal, (2, 1)))
    each = jnp.arange(t)

    def once(i: Array, leaves: Domains) -> Domains:
        worst = first(-leaves.bound)
        chosen = jax.tree.map(lambda a: a[each, worst], leaves)
        halves, _ = split(passes, options, chosen)
        whole = chosen.next.place[:, 0] < 0  # then the first half is all of it
        bound = halves.bound.at[t:].set(jnp.where(whole, jnp.inf, halves.bound[t:]))
        halves = dataclasses.replace(halves, bound=bound)
        return jax.tree.map(
            lambda a, b: a.at[each, worst].set(b[:t]).at[each, i + 1].set(b[t:]), leaves, halves
        )

    leaves = jax.tree.map(
        lambda a: jnp.zeros((t, splits + 2, *a.shape[1:]), a.dtype).at[:, 0].set(a), start
    )
    leaves = dataclasses.replace(leaves, bound=leaves.bound.at[:, 1:].set(jnp.inf))
    leaves = jax.lax.fori_loop(0, splits + 1, once, leaves)
    return jnp.min(leaves.bound, 1)


def entered(known: Ranges, targets: Targets, values: Array) -> Ranges:
    """The ranges with new lower ends, or negated upper ends; those that are no better stay."""
    lower, upper = np.array(known.lower), np.array(known.upper)
    low, high = (
        np.asarray(end)
        for end in (rounded_down(values, jnp.float32), rounded_up(-values, jnp.float32))
    )
    at_lower = targets.sign > 0
    for end, new, mine, better in (
        (lower, low, at_lower, np.fmax),
        (upper, high, ~at_lower, np.fmin),
    ):
        place = targets.owner[mine], targets.place[mine]
        known_end = end[place]  # nothing else is known of an empty set
        end[place] = better(known_end, np.where(np.isfinite(new[mine]), new[mine], known_end))
    ends: Any = lower, upper
    return dataclasses.replace(known, lower=ends[0], upper=ends[1])
