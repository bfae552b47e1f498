"""Branch and bound on hidden values, from the host: ranges, roots, search, tightening, search."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from jaxcert.exact import branching, cost, leaves, ranges, search, tightening
from jaxcert.exact.beta_crown import Pass
from jaxcert.exact.call import Call
from jaxcert.exact.domains import Domains
from jaxcert.exact.outcome import Stuck
from jaxcert.exact.question import each_clause, rounded
from jaxcert.exact.ranges import Ranges
from jaxcert.exact.tightening import Targets

OPTIONS = branching.Options()
AT_A_TIME = 16  # sub-domains, at most
ROWS = 600  # as many as it takes the time of to split a sub-domain, measured on residual nets
SPLITS = 15  # of either end of a hidden value's range
LEAST_DECIDED = 256  # values of each hidden variable get slopes of their own


def by_activations(call: Call) -> None:
    """Work on all open questions of a call. Only inside `enable_x64`."""
    hidden = _Hidden(call)
    known = hidden.ranges()
    domains = hidden.beginnings(known)
    if hidden.done:
        return
    for _ in range(2):  # a round gains much, another one something, and more cost more than that
        known = hidden.with_slopes(known)
        domains = hidden.beginnings(known)
        if hidden.done:
            return
    if domains.lower.shape[1] == 0:  # nothing is ever split: each sub-domain is a leaf
        hidden.settle_all(domains)
        return
    targets = hidden.targets(known, domains)
    hidden.search(domains, until_worth=targets)
    if hidden.done:
        return
    known = hidden.with_splits(known, targets, domains)
    domains = hidden.beginnings(known)
    if not hidden.done:
        hidden.search(domains)


class _Hidden:
    """The clauses of a call's questions, each a question of its own.

    Attributes:
      asked: the clauses.
      owner: the set that each is about, (n,).
      waiting: which of them wait for an answer, bool (n,).
      least: of which batch the graph is that of larger ones.
    """

    def __init__(self, call: Call):
        self.call = call
        owner, clause = np.nonzero(np.asarray(call.asked.clauses).any(2))
        n, self.least = len(owner), call.model.least_batch(call.arrays)
        more = max(rounded(n), self.least) - n  # copies of the first, which are not asked
        self.owner, clause = (np.concatenate([a, np.repeat(a[:1], more)]) for a in (owner, clause))
        self.asked = each_clause(call.asked, self.owner, clause)
        self.waiting = np.arange(n + more) < n

    @property
    def done(self) -> bool:
        """Whether nothing is left to do, or to do it with."""
        call = self.call
        self.waiting &= call.outcome.open[self.owner]
        return not self.waiting.any() or call.clock.over(call.outcome) is not None

    # --- Ranges of hidden values, on each set, and what follows from them

    def ranges(self) -> Ranges:
        n = max(len(self.call.outcome.status), self.least)
        region = _repeated(self.call.asked.region, n)
        with self.call.outcome.spending("ranges"):
            return jax.block_until_ready(_ranged(self.call.model, self.call.arrays, region, n))

    def with_slopes(self, known: Ranges) -> Ranges:
        region = _repeated(self.call.asked.region, len(known.lower))
        model, arrays = self.call.model, self.call.arrays
        with self.call.outcome.spending("ranges"):
            found = _sloped(model, LEAST_DECIDED, arrays, region, known)
            return jax.block_until_ready(found)

    def beginnings(self, known: Ranges) -> Domains:
        """The whole set as a sub-domain for each clause; those that are proved wait no longer. Then
        another attack on the others."""
        ends: Any = [np.asarray(end)[self.owner] for end in (known.lower, known.upper)]
        known = dataclasses.replace(known, lower=ends[0], upper=ends[1])
        with self.call.outcome.spending("search"):
            domains = _beginnings(self.call.model, OPTIONS, self.call.arrays, self.asked, known)
            self.waiting &= ~(np.asarray(domains.bound) > 0)
        self.call.settle_proved(self.owner, self.waiting)
        if not self.done:
            self.call.attack(rounds=8)
        return domains

    # --- Search

    def search(self, domains: Domains, until_worth: list[Targets] | None = None) -> None:
        """Branch and bound; with targets until it has taken a third of what tightening them will,
        if that in turn is less than a third of what is left."""
        call, began = self.call, self.call.clock.seconds

        def block(state, steps):
            return _block(call.model, OPTIONS, call.arrays, self.asked, state, steps)

        def pause() -> bool:
            if not until_worth:
                return False
            seconds = self.seconds_for(until_worth)
            return 3 * (call.clock.seconds - began) > seconds and 3 * seconds < call.clock.left

        places = np.flatnonzero(self.waiting)
        left = call.run(block, self.settle, AT_A_TIME, domains, places, self.owner, pause)
        self.waiting = np.isin(np.arange(len(self.owner)), left)

    @functools.cached_property
    def _on_host(self) -> Any:
        return jax.tree.map(np.asarray, self.asked)

    def settle(self, leaf: Domains, i: int) -> leaves.Settled:
        """What becomes of a leaf of clause i."""
        mine = jax.tree.map(lambda a: a[i : i + 1], self._on_host)
        mine, leaf = _repeated((mine, leaf), self.least)
        call = self.call
        return leaves.settle(call.model, call.arrays, mine, leaf, call.clock.left)

    def settle_all(self, domains: Domains) -> None:
        """Settle all clauses as leaves."""
        stuck = Stuck(len(self.call.outcome.status))
        alone = (
            (jax.tree.map(lambda a, i=i: a[i : i + 1], domains), i)
            for i in np.flatnonzero(self.waiting).tolist()
        )
        self.call.settle_leaves(self.settle, alone, self.owner, stuck)
        self.call.conclude(np.zeros(len(self.call.outcome.status), bool), stuck)

    # --- Tightening

    def targets(self, known: Ranges, domains: Domains) -> list[Targets]:
        """What to tighten, for each hidden variable for which there is anything."""
        gain = _gains(self.call.model, self.call.arrays, self.asked, domains)
        found = tightening.targets(known, self.owner[self.waiting], np.asarray(gain)[self.waiting])
        return [each for each in found if len(each)]

    def seconds_for(self, targets: list[Targets]) -> float:
        """What tightening takes, going by how fast the search is."""
        return SPLITS * sum(map(len, targets)) / max(self.call.rate, 1e-9)

    def with_splits(self, known: Ranges, targets: list[Targets], like: Domains) -> Ranges:
        """The ranges tightened by splitting; each hidden variable has its share of the time, and
        those behind are the better for it."""
        call, seconds = self.call, min(self.seconds_for(targets), self.call.clock.left / 2)
        # As many at a time as take about two seconds: the clock is not looked at in between.
        size = int(np.clip(2 ** np.floor(np.log2(max(1.0, 2 * call.rate / SPLITS))), 2, 32))
        total, done, began = sum(map(len, targets)), 0, math.inf
        for each in targets:
            done, before = done + len(each), known
            for start in range(0, len(each), size):
                if call.clock.over(call.outcome):
                    return known
                if call.clock.seconds > began + seconds * done / total:
                    break
                known = self._tightened(known, each.part(start, size), like)
                began = min(began, call.clock.seconds)  # the first one compiles
            if known is not before:
                known = self.with_slopes(known)
        return known

    def _tightened(self, known: Ranges, part: Targets, like: Domains) -> Ranges:
        call = self.call
        asked = jax.tree.map(lambda a: np.asarray(a)[part.owner], call.asked)
        start = tightening.beginning(known, part, like)
        with call.outcome.spending("ranges"):
            options = OPTIONS, SPLITS, call.arrays
            values = _split_ranges(call.model, *options, asked, part.place, part.sign, start)
            values = jax.block_until_ready(values)
        call.outcome.visited += SPLITS * len(part)
        call.clock.report(call.outcome, int(self.waiting.sum()))
        return tightening.entered(known, part, values)


def _repeated(tree: Any, n: int) -> Any:
    """Arrays (m, ...) with their last entries repeated up to n."""
    return jax.tree.map(lambda a: np.asarray(a)[np.minimum(np.arange(n), len(a) - 1)], tree)


# --- Compiled parts -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _block(model, options, arrays, asked, state, steps):
    expand = functools.partial(branching.expansion, model, options, arrays, asked)
    row, _ = cost.of_rows(model, arrays)
    return search.block(expand, cost.affordable(ROWS * row, AT_A_TIME), state, steps)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _ranged(model, arrays, region, n):
    return ranges.ranges(model, arrays, region, n)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sloped(model, count, arrays, region, known):
    return ranges.with_slopes(model, arrays, region, known, count)


@functools.partial(jax.jit, static_argnums=0)
def _gains(model, arrays, question, domains):
    some = Pass(model, arrays, question, domains)
    return branching.gaps(some, domains.multipliers)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _split_ranges(model, options, splits, arrays, question, place, sign, start):
    return tightening.bounds(model, options, splits, arrays, question, place, sign, start)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _beginnings(model, options, arrays, asked, known):
    return ranges.beginning(model, options, arrays, asked, known, 20)
