"""The search from the host: attacks, blocks of steps on the device, leaves; against the clock."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.attacks import gradient
from jaxcert.certificate import Reason, Status
from jaxcert.exact import inputs, leaves
from jaxcert.exact.model import Traceable
from jaxcert.exact.outcome import Clock, Outcome, Stuck
from jaxcert.exact.pool import Pool
from jaxcert.exact.question import Question
from jaxcert.sets import Array, Box

RESTARTS = 64
ATTACKS = 0.15  # of the time


class Call:
    """The questions of one call and how they are worked on, whatever is split.

    Attributes:
      model, arrays: the model.
      asked: the questions, one for each set.
      outcome, clock: what is known so far, and what may be spent.
      rate: sub-domains a second, at best.
    """

    def __init__(self, model, arrays, asked: Question, outcome: Outcome, clock: Clock, key):
        self.model, self.arrays, self.asked = model, arrays, asked
        self.outcome, self.clock, self._key = outcome, clock, key
        self.rate, self._first_attack = 0.0, math.inf

    def cut_boxes(self) -> None:
        """Take from the sets' boxes what their cuts cut off; of what is empty, all is true."""
        box, empty = _cut_boxes(self.model.dtype, self.asked)
        self.asked = dataclasses.replace(self.asked, region=box)
        self.outcome.settle(empty, Status.VERIFIED)

    def attack(self, rounds: int = 1) -> None:
        """Gradient descent from some points of each set, one round of it or more while all attacks
        together have taken less than `ATTACKS` of the time; the first round is not counted."""
        for _ in range(rounds):
            self._key, now = jax.random.split(self._key)
            with self.outcome.spending("attack"):
                self.outcome.falsify(
                    *_attacked(
                        self.model, RESTARTS, self.arrays, self.asked, jax.random.key_data(now)
                    )
                )
            spent = self.outcome.spent["attack"]
            self._first_attack = min(self._first_attack, spent)  # compiles
            late = spent - self._first_attack > ATTACKS * self.clock.seconds
            if late or not self.outcome.open.any():
                return

    def varying(self) -> tuple[int, ...]:
        """The inputs that vary in any of the sets."""
        box = inputs.box_of(self.asked.region, True)
        low, high = (np.asarray(end).reshape(len(end), -1) for end in (box.lower, box.upper))
        size = np.maximum(np.abs(low), np.abs(high))
        return tuple(np.flatnonzero((high - low > 2.0**-40 * size).any(0)).tolist())

    def run(
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
        steps, stuck = 1, Stuck(len(self.outcome.status))
        next_attack = self.clock.seconds + 0.5
        while True:
            began = time.perf_counter()
            before = int(pool.stack.visited)
            with self.outcome.spending("search"):
                pool.stack = block(pool.stack, jnp.asarray(steps, jnp.int32))
                self.outcome.visited += int(pool.stack.visited) - before
            broken, example = np.asarray(pool.stack.broken), np.asarray(pool.stack.example)
            for i in np.flatnonzero(broken):
                self._falsify(owner[i], example[i])
            self.settle_leaves(settle, pool.take_leaves(), owner, stuck)
            waiting = pool.waiting()
            self.clock.report(self.outcome, sum(waiting.values()))
            unproved = np.zeros(len(self.outcome.status), bool)
            unproved[[owner[i] for i in waiting]] = True
            self.conclude(unproved, stuck)
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

    def settle_leaves(
        self, settle: Any, found: Iterable[tuple[Any, int]], owner: np.ndarray, stuck: "Stuck"
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
            with self.outcome.spending("leaves"):
                done: leaves.Settled = settle(leaf, i)
            if done.example is not None:
                self._falsify(owner[i], done.example)
            elif done.reason != Reason.NONE:
                stuck.note(owner[i], i, Reason.TIME if self.clock.left <= 0 else done.reason)

    def _falsify(self, place: int, example: np.ndarray) -> None:
        self.outcome.falsify(np.arange(len(self.outcome.status)) == place, example[None])

    def conclude(self, waiting: np.ndarray, stuck: "Stuck") -> None:
        """Enter the answers of sets of which nothing waits."""
        for reason in Stuck.REASONS:
            self.outcome.settle(~waiting & stuck.by(reason), Status.UNKNOWN, reason)
        self.outcome.settle(~waiting & ~stuck.any, Status.VERIFIED)

    def settle_proved(self, owner: np.ndarray, waiting: np.ndarray) -> None:
        """VERIFIED for the sets none of whose clauses wait."""
        unproved = np.zeros(len(self.outcome.status), bool)
        unproved[owner[waiting]] = True
        self.outcome.settle(~unproved, Status.VERIFIED)


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
def _cut_boxes(dtype: Any, asked: Question) -> tuple[Box, Array]:
    return inputs.cut_boxes(asked, dtype)
