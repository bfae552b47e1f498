"""The search from the host: falsification first, then branch and bound against the clock."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.attacks import gradient
from jaxcert.bounds.interpreter import RULES
from jaxcert.bounds.planes import PLANES
from jaxcert.certificate import Reason, Status, Verdict
from jaxcert.exact import activations, inputs, leaves, search, tightening
from jaxcert.exact.model import Traceable
from jaxcert.exact.pool import Pool
from jaxcert.exact.question import Cuts, Question, one_by_one, question
from jaxcert.floats import ieee_float64
from jaxcert.model import Model, output_shape, split, uses_float64
from jaxcert.sets import AnySet, Array, Box, checked, like
from jaxcert.specs import Property


@dataclasses.dataclass(frozen=True)
class Budget:
    """When to give up.

    Attributes:
      seconds: of wall-clock time.
      domains: that are bounded, or None for any number.
      memory: bytes of sub-domains, on the device and on the host together.
    """

    seconds: float = 60.0
    domains: int | None = None
    memory: int = 2**31


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a search is: seconds since it began, sub-domains bounded so far and waiting now, and
    questions without an answer."""

    seconds: float
    visited: int
    waiting: int
    unanswered: int


Report: TypeAlias = Callable[[Progress], None]

FEW_INPUTS = 16
"""Up to so many inputs that vary, the search splits inputs, else hidden values."""


def verify(
    f: Model,
    region: AnySet,
    prop: Property,
    *,
    budget: Budget = Budget(),
    split_inputs: bool | None = None,
    key: Array | None = None,
    report: Report | None = None,
) -> Verdict:
    """Decide for each set whether the property holds on all of it.

    Sets of one call share batches: many images cost little more than the hardest of them alone.

    Args:
      f: the model, (b, *input) -> (b, k), rows independent.
      region: a `Box`, `LinfBall`, `L2Ball`, `L1Ball` or `Polytope` of b sets.
      prop: a `Spec`, or `AllOf` and `AnyOf` of them, with `>` strict.
      budget: of the whole call.
      split_inputs: whether to split inputs rather than hidden values; by default where at most
        `FEW_INPUTS` of them vary.
      key: of the attack's starting points.
      report: called now and then with the `Progress`.

    Returns:
      A `Verdict`. VERIFIED is a proof: over the reals, rounding counted. FALSIFIED comes with a
      counterexample in the set that breaks the property in the model's own arithmetic and in
      float64. UNKNOWN says why: out of time, sub-domains or memory; LOOSE, if nothing is left to
      split but functions are not exactly bounded; or numerically undecided.

    Raises:
      ValueError, TypeError: wrong shapes, dtypes or values.
      UnsupportedEquation, MixedRows: the model cannot be bounded.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcert import LinfBall, Spec
      >>> f = lambda x: jnp.abs(x - 0.25) + jnp.abs(x + 0.25)
      >>> ball = LinfBall(jnp.zeros((2, 1)), 1.0)
      >>> verdict = verify(f, ball, Spec(jnp.ones((1, 1)), jnp.array([[-0.4], [-0.6]])))
      >>> print(verdict.status, abs(verdict.counterexample[1, 0]) < 0.3)
      [1 2] True
    """
    outcome = decide(
        f, region, prop, budget=budget, split_inputs=split_inputs, key=key, report=report
    )
    example = jnp.asarray(outcome.example.astype(_own_dtype(region)))
    status, reason = (jnp.asarray(a, jnp.int32) for a in (outcome.status, outcome.reason))
    return Verdict(status, reason, example)


def _own_dtype(region: AnySet) -> Any:
    return jax.dtypes.canonicalize_dtype(like(region).dtype)


@dataclasses.dataclass
class Outcome:
    """What is known so far, in numpy.

    Attributes:
      status, reason: (n,) as in a `Verdict`.
      example: counterexamples (n, *input) in float64.
      visited: sub-domains that were bounded.
    """

    status: np.ndarray
    reason: np.ndarray
    example: np.ndarray
    visited: int = 0

    @property
    def open(self) -> np.ndarray:
        """Which questions have no answer."""
        return self.status == Status.UNKNOWN

    def falsify(self, broken: Any, example: Any) -> None:
        """Enter counterexamples, bool (n,) and (n, *input) or one (1, *input)."""
        new = np.asarray(broken) & self.open
        self.example[new] = np.broadcast_to(example, self.example.shape)[new]
        self.status[new], self.reason[new] = Status.FALSIFIED, Reason.NONE

    def settle(self, which: Any, status: Status, reason: Reason = Reason.NONE) -> None:
        """Enter the status of those among `which` that are open."""
        new = np.asarray(which) & self.open
        self.status[new], self.reason[new] = status, reason


class _Clock:
    def __init__(self, budget: Budget, report: Report | None):
        self.start, self.budget, self._report = time.perf_counter(), budget, report

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def left(self) -> float:
        """Seconds, negative when time is up."""
        return self.budget.seconds - self.seconds

    def over(self, outcome: Outcome) -> Reason | None:
        if self.left < 0:
            return Reason.TIME
        if self.budget.domains is not None and outcome.visited >= self.budget.domains:
            return Reason.DOMAINS
        return None

    def report(self, outcome: Outcome, waiting: int) -> None:
        if self._report is not None:
            unanswered = int(outcome.open.sum())
            self._report(Progress(self.seconds, outcome.visited, waiting, unanswered))


def decide(
    f: Model,
    region: AnySet,
    prop: Property,
    *,
    budget: Budget,
    split_inputs: bool | None = None,
    key: Array | None = None,
    report: Report | None = None,
) -> Outcome:
    """As `verify`, with the counterexamples in float64 and the number of sub-domains."""
    clock, mode, dtype = _Clock(budget, report), uses_float64(), _own_dtype(region)
    key = jax.random.key(0) if key is None else key
    with jax.enable_x64(True):
        region = checked(region)
        x = jax.ShapeDtypeStruct(like(region).shape, dtype)
        arrays, structure = split(f, x)
    n, shape = x.shape[0], x.shape[1:]
    k = output_shape(structure, arrays, x).shape[1]
    model = Traceable(structure, shape, dtype, mode, (*RULES.items(), *PLANES.items()))
    with jax.enable_x64(True):
        asked = question(one_by_one(region), prop, n, k)
        clauses, rows = (
            max(least, _rounded(m))
            for least, m in zip((4, 8), asked.clauses.shape[1:], strict=True)
        )
        cuts = max(4, _rounded(asked.cuts.count)) if asked.cuts.count else 0
        asked = _padded(asked, clauses, rows, cuts)
        arrays, asked = ieee_float64((arrays, jax.tree.map(jnp.asarray, asked)))
        none = np.zeros(n, np.int32)
        outcome = Outcome(none, np.full(n, Reason.TIME, np.int32), np.zeros((n, *shape)))
        call = _Search(model, arrays, asked, outcome, clock, key)
        if asked.cuts.count:
            call.tighten()
        call.attack()
        varying = call.varying()
        few = len(varying) <= FEW_INPUTS if split_inputs is None else split_inputs
        if math.prod(shape) <= FEW_INPUTS:  # then one program serves all properties
            varying = tuple(range(math.prod(shape)))
        if outcome.open.any():
            call.by_inputs(varying) if few else call.by_activations()
    return outcome


class _Search:
    """The questions of one call and how they are worked on."""

    def __init__(self, model, arrays, asked: Question, outcome: Outcome, clock: _Clock, key):
        self.model, self.arrays, self.asked = model, arrays, asked
        self.outcome, self.clock, self.key = outcome, clock, key
        self.rate = 0.0  # sub-domains a second, at best

    def tighten(self) -> None:
        """Take from the sets' boxes what their cuts cut off; of what is empty, all is true."""
        box, empty = _tightened(self.model.dtype, self.asked)
        self.asked = dataclasses.replace(self.asked, region=box)
        self.outcome.settle(empty, Status.VERIFIED)

    def attack(self, rounds: int = 1) -> None:
        """Gradient descent from some points of each set, in rounds, which may take a twentieth of
        the time so far; the first one is not counted."""
        began = self.clock.seconds
        for _ in range(rounds):
            self.key, now = jax.random.split(self.key)
            broken, example = _attacked(
                self.model, RESTARTS, self.arrays, self.asked, jax.random.key_data(now)
            )
            self.outcome.falsify(broken, example)
            if not self.outcome.open.any() or self.clock.seconds > 1.05 * began:
                return

    def varying(self) -> tuple[int, ...]:
        """The inputs that vary in any of the sets."""
        box = inputs.box_of(self.asked.region, True)
        low, high = (np.asarray(end).reshape(len(end), -1) for end in (box.lower, box.upper))
        size = np.maximum(np.abs(low), np.abs(high))
        return tuple(np.flatnonzero((high - low > 2.0**-40 * size).any(0)).tolist())

    # --- Splitting inputs

    def by_inputs(self, varying: tuple[int, ...]) -> None:
        """Branch and bound on boxes of the varying inputs."""
        places = inputs.Places(self.model.shape, varying)
        box = inputs.box_of(self.asked.region, True)
        start = inputs.Boxes(*[places.pick(np.asarray(end)) for end in (box.lower, box.upper)])
        here = np.flatnonzero(self.outcome.open)
        k = 32

        def block(state, steps):
            return _input_block(self.model, places, k, self.arrays, self.asked, state, steps)

        self._run(block, None, k, start, here, np.arange(len(self.outcome.status)))

    # --- Splitting hidden values

    def by_activations(self) -> None:
        """Branch and bound on hidden values, each clause a question of its own."""
        here, clause = np.nonzero(np.asarray(self.asked.clauses).any(2))
        n = len(here)
        least = self.model.least_batch(self.arrays)
        more = max(_rounded(n), least) - n  # copies of the first, which are not asked
        here, clause = (np.concatenate([a, np.repeat(a[:1], more)]) for a in (here, clause))
        asked = _each_clause(self.asked, here, clause)
        waiting = np.arange(len(here)) < n
        n = max(len(self.outcome.status), least)
        known = _ranged(self.model, self.arrays, _repeated(self.asked.region, n), n)
        domains: Any = None
        for rounds in (0, 2):
            known = self._with_slopes(known, rounds) if rounds else known
            domains = self._beginnings(known, asked, here)
            waiting &= ~(np.asarray(domains.bound) > 0)
            self._settle_proved(here, waiting)
            if not self.outcome.open.any() or self.clock.over(self.outcome):
                return
            self.attack(rounds=8)
        left = np.flatnonzero(waiting & self.outcome.open[here])
        if len(left) == 0:
            return
        k = 16

        def block(state, steps):
            return _hidden_block(self.model, OPTIONS, k, self.arrays, asked, state, steps)

        on_host = jax.tree.map(np.asarray, asked)

        def settle(leaf, i):
            mine = jax.tree.map(lambda a: a[i : i + 1], on_host)
            mine, leaf = _repeated((mine, leaf), least)
            return leaves.settle(self.model, self.arrays, mine, leaf, self.clock.left)

        if domains.lower.shape[1] == 0:  # nothing is ever split: each sub-domain is a leaf
            alone = ((jax.tree.map(lambda a, i=i: a[i : i + 1], domains), i) for i in left.tolist())
            stuck = _Stuck(len(self.outcome.status))
            self._settle_leaves(settle, alone, here, stuck)
            self._conclude(np.zeros(len(self.outcome.status), bool), stuck)
            return
        gain = _gains(self.model, self.arrays, asked, domains)
        targets = tightening.targets(known, here[left], np.asarray(gain)[left])
        began, splits = self.clock.seconds, SPLITS * sum(map(len, targets))

        def for_tightening() -> float:  # seconds: for all targets, or half of those left
            left = self.clock.budget.seconds - self.clock.seconds
            return min(splits / max(self.rate, 1e-9), left / 2)

        def pause():  # once the search has taken a third of that
            return splits > 0 and 3 * (self.clock.seconds - began) > for_tightening()

        left = self._run(block, settle, k, domains, left, here, pause)
        if len(left) == 0:
            return
        known = self._with_splits(known, targets, domains, for_tightening())
        domains = self._beginnings(known, asked, here)
        left = left[~(np.asarray(domains.bound)[left] > 0)]
        self._settle_proved(here, np.isin(np.arange(len(here)), left))
        if self.outcome.open.any():
            self._run(block, settle, k, domains, left, here)

    def _beginnings(self, known: activations.Ranges, asked: Question, here: np.ndarray) -> Any:
        lower, upper = np.asarray(known.lower)[here], np.asarray(known.upper)[here]
        known = dataclasses.replace(known, lower=lower, upper=upper)
        return _beginnings(self.model, OPTIONS, self.arrays, asked, known)

    def _with_slopes(self, known: activations.Ranges, rounds: int) -> activations.Ranges:
        times = jnp.asarray(rounds, jnp.int32)
        region = _repeated(self.asked.region, len(known.lower))
        return _sloped(self.model, 256, self.arrays, region, known, times)

    def _with_splits(
        self, known: activations.Ranges, targets: list[tightening.Targets],
        like: activations.Domains, seconds: float,
    ) -> activations.Ranges:  # fmt: skip
        """The ranges tightened by splitting, in so many seconds; each hidden variable has its share
        of them, and those behind are the better for it."""
        on_host = jax.tree.map(np.asarray, self.asked)

        def tightened(known: activations.Ranges, part: tightening.Targets) -> activations.Ranges:
            mine = jax.tree.map(lambda a: a[part.owner], on_host)
            values = _split_ranges(
                self.model, OPTIONS, SPLITS, self.arrays, mine, part.place, part.sign,
                tightening.beginning(known, part, like),
            )  # fmt: skip
            self.outcome.visited += TARGETS * SPLITS
            self.clock.report(self.outcome, int(self.outcome.open.sum()))
            return tightening.entered(known, part, values)

        some = [each for each in targets if len(each)]
        known = tightened(known, some[0].part(0, TARGETS))  # which is when it is compiled
        total, done, began = sum(map(len, some)), 0, self.clock.seconds
        for each in some:
            done += len(each)
            for start in range(0, len(each), TARGETS):
                if self.clock.seconds > began + seconds * done / total:
                    break
                known = tightened(known, each.part(start, TARGETS))
            known = self._with_slopes(known, 1)
        return known

    def _settle_proved(self, owner: np.ndarray, waiting: np.ndarray) -> None:
        """VERIFIED for the sets none of whose clauses wait."""
        unproved = np.zeros(len(self.outcome.status), bool)
        unproved[owner[waiting]] = True
        self.outcome.settle(~unproved, Status.VERIFIED)

    # --- The loop

    def _run(
        self, block, settle, k: int, start: Any, places: np.ndarray, owner: np.ndarray,
        pause: Callable[[], bool] = lambda: False,
    ) -> np.ndarray:  # fmt: skip
        """Work on sub-domains until all questions are answered or the budget is used up, or until
        it may `pause`. Returns the questions that are not answered then.

        Args:
          block: (stack, steps) -> stack.
          settle: (leaf, its question) -> what became of it; or None if nothing can be done about
            leaves.
          k: sub-domains of a step.
          start: one sub-domain for each of n questions.
          places: the questions among them that are asked.
          owner: the set that each question is about, (n,).
        """
        n = len(owner)
        pool = Pool(start, places, n, k, self.model.shape, self.clock.budget.memory)
        steps, stuck = 1, _Stuck(len(self.outcome.status))
        next_attack = self.clock.seconds + 0.5
        while True:
            began = time.perf_counter()
            before = int(pool.stack.visited)
            pool.stack = block(pool.stack, jnp.asarray(steps, jnp.int32))
            self.outcome.visited += int(pool.stack.visited) - before
            broken, example = np.asarray(pool.stack.broken), np.asarray(pool.stack.example)
            for i in np.flatnonzero(broken):
                self._falsify(owner[i], example[i])
            self._settle_leaves(settle, pool.take_leaves(), owner, stuck)
            waiting = pool.waiting()
            self.clock.report(self.outcome, sum(waiting.values()))
            unproved = np.zeros(len(self.outcome.status), bool)
            unproved[[owner[i] for i in waiting]] = True
            self._conclude(unproved, stuck)
            over = self.clock.over(self.outcome) or pool.make_room()
            if not (self.outcome.open & unproved).any():
                return np.zeros(0, np.int64)
            if over:
                self.outcome.settle(unproved, Status.UNKNOWN, over)
                return np.zeros(0, np.int64)
            if pause():
                return np.array(
                    [i for i in {*waiting, *stuck.questions} if self.outcome.open[owner[i]]]
                )
            pool.drop(owner, self.outcome.open)
            took = time.perf_counter() - began
            self.rate = max(self.rate, (int(pool.stack.visited) - before) / took)
            steps = min(2 * steps, 64) if took < 0.3 else max(1, int(steps * 0.5 / took))
            if self.clock.seconds > next_attack:
                self.attack(rounds=32)
                next_attack = 1.5 * self.clock.seconds

    def _settle_leaves(
        self, settle: Any, found: Iterable[tuple[Any, int]], owner: np.ndarray, stuck: "_Stuck"
    ) -> None:
        """Prove leaves, find counterexamples in them, or note why their sets are stuck; when time
        is up, that they were not looked at."""
        for leaf, i in found:
            if not self.outcome.open[owner[i]]:
                continue
            if settle is None or self.clock.left <= 0:
                reason = Reason.NUMERICS if settle is None else Reason.TIME
                stuck.note(owner[i], i, reason)
                continue
            done: leaves.Settled = settle(leaf, i)
            if done.example is not None:
                self._falsify(owner[i], done.example)
            elif done.reason != Reason.NONE:
                stuck.note(owner[i], i, Reason.TIME if self.clock.left <= 0 else done.reason)

    def _falsify(self, place: int, example: np.ndarray) -> None:
        self.outcome.falsify(np.arange(len(self.outcome.status)) == place, example[None])

    def _conclude(self, waiting: np.ndarray, stuck: "_Stuck") -> None:
        """Enter the answers of sets of which nothing waits."""
        for reason in _Stuck.REASONS:
            self.outcome.settle(~waiting & stuck.by(reason), Status.UNKNOWN, reason)
        self.outcome.settle(~waiting & ~stuck.any, Status.VERIFIED)


class _Stuck:
    """Which of n sets have leaves that are not settled, by their questions, and why; of several
    reasons one counts."""

    REASONS = Reason.NUMERICS, Reason.LOOSE, Reason.TIME  # in order: the last one of those noted

    def __init__(self, n: int):
        self._rank = np.full(n, -1)
        self.questions: set[int] = set()

    def note(self, place: int, question: int, reason: Reason) -> None:
        """A leaf of a question about a set was left for a reason."""
        self.questions.add(question)
        self._rank[place] = max(self._rank[place], self.REASONS.index(reason))

    def by(self, reason: Reason) -> np.ndarray:
        """The sets that are stuck for this reason."""
        return self._rank == self.REASONS.index(reason)

    @property
    def any(self) -> np.ndarray:
        """The sets that are stuck."""
        return self._rank >= 0


def _repeated(tree: Any, n: int) -> Any:
    """Arrays (m, ...) with their last entries repeated up to n."""
    return jax.tree.map(lambda a: np.asarray(a)[np.minimum(np.arange(n), len(a) - 1)], tree)


def _rounded(n: int) -> int:
    """n or somewhat more, so that few programs serve all numbers: 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    power = 1 << (n - 1).bit_length()
    return 3 * power // 4 if n <= 3 * power // 4 else power


def _padded(asked: Question, clauses: int, rows: int, cuts: int) -> Question:
    """The question with rows, clauses and cuts that state nothing, up to these numbers."""
    more = max(clauses - asked.clauses.shape[1], 0), max(rows - asked.clauses.shape[2], 0)
    extra = cuts - asked.cuts.count
    return Question(
        asked.region,
        Cuts(
            np.pad(asked.cuts.matrix, [(0, 0), (0, extra), (0, 0)]),
            np.pad(asked.cuts.offset, [(0, 0), (0, extra)], constant_values=-1.0),
            asked.cuts.inner,
        ),
        np.pad(asked.matrix, [(0, 0), (0, more[1]), (0, 0)]),
        np.pad(asked.offset, [(0, 0), (0, more[1])]),
        np.pad(asked.clauses, [(0, 0), (0, more[0]), (0, more[1])]),
    )


def _each_clause(asked: Question, here: np.ndarray, clause: np.ndarray) -> Question:
    """One question for each pair of a set and a clause, with that clause's rows only."""
    clauses = np.asarray(asked.clauses)[here, clause]
    most = _rounded(int(clauses.sum(1).max()))
    order = np.argsort(~clauses, axis=1, kind="stable")[:, :most]
    region, cuts = jax.tree.map(lambda a: a[here], (asked.region, asked.cuts))
    return Question(
        region,
        cuts,
        jnp.asarray(np.asarray(asked.matrix)[here[:, None], order]),
        jnp.asarray(np.asarray(asked.offset)[here[:, None], order]),
        jnp.asarray(np.take_along_axis(clauses, order, 1)[:, None]),
    )


# --- Compiled parts -------------------------------------------------------------------------------


RESTARTS = 64
OPTIONS = activations.Options()
SPLITS, TARGETS = 15, 32  # of each end of a hidden value's range, and ends at a time


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attacked(model: Traceable, restarts: int, arrays: Any, asked: Question, key: Any):
    """Which questions an attack answers, (n,), and by which points."""
    n = asked.clauses.shape[0]
    key = jax.random.wrap_key_data(key)
    place = jnp.tile(jnp.arange(n), restarts)
    mine = jax.tree.map(lambda a: a[place], asked)
    # Restarts are dealt out to the clauses; a descent on the nearest one leaves most of them out.
    count = jnp.maximum(jnp.sum(jnp.any(mine.clauses, 2), 1), 1)
    target = (jnp.arange(n * restarts) // n) % count
    only = jnp.arange(mine.clauses.shape[1]) == target[:, None]
    dealt = dataclasses.replace(mine, clauses=mine.clauses & only[..., None])
    start = gradient.uniform(key, mine.whole)
    points, _ = gradient.descend(model.objective(arrays, dealt), mine.whole, start, steps=40)
    points, broken, _ = model.tried(arrays, asked, points, place)
    broken = broken.reshape(restarts, n)
    first = inputs.first(broken.T.astype(jnp.int32))
    points = points.reshape(restarts, n, *model.shape)
    return jnp.any(broken, 0), points[first, jnp.arange(n)]


@functools.partial(jax.jit, static_argnums=0)
def _tightened(dtype: Any, asked: Question) -> tuple[Box, Array]:
    return inputs.tightened(asked, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _input_block(model, places, k, arrays, asked, state, steps):
    expand = functools.partial(inputs.expansion, model, places, arrays, asked)
    return search.block(expand, k, state, steps)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _hidden_block(model, options, k, arrays, asked, state, steps):
    expand = functools.partial(activations.expansion, model, options, arrays, asked)
    return search.block(expand, k, state, steps)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _ranged(model, arrays, region, n):
    return activations.ranges(model, arrays, region, n)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sloped(model, count, arrays, region, known, rounds):
    return activations.with_slopes(model, arrays, region, known, count, rounds)


@functools.partial(jax.jit, static_argnums=0)
def _gains(model, arrays, question, domains):
    some = activations.Pass(model, arrays, question, domains)
    return activations.gaps(some, domains.multipliers)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _split_ranges(model, options, splits, arrays, question, place, sign, start):
    return tightening.bounds(model, options, splits, arrays, question, place, sign, start)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _beginnings(model, options, arrays, asked, known):
    return activations.beginning(model, options, arrays, asked, known, 20)
