"""The stack of a search as seen from the host, where sub-domains wait that find no room on it."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxcert.certificate import Reason
from jaxcert.exact import search


class Pool:
    """A stack on the device with more room on the host."""

    def __init__(self, start, places, n: int, k: int, shape, memory: int):
        size = sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in jax.tree.leaves(start))
        capacity = max(4 * k + n, min(2**14, memory // max(1, 16 * size)))
        start = jax.tree.map(np.asarray, start)
        stack = search.stack(start, np.zeros((n, *shape)), capacity, 8 * k)
        m = len(places)
        order = np.concatenate([places, np.zeros(capacity - m, np.int64)])
        domains, owner = jax.tree.map(lambda a: a[order], (stack.domains, stack.owner))
        self.stack = dataclasses.replace(stack, domains=domains, owner=owner, count=np.int32(m))
        self.k, self._size, self._memory = k, size, memory
        self._spilled: list[Any] = []

    def waiting(self) -> dict[int, int]:
        """How many sub-domains wait, by question."""
        owners = [np.asarray(self.stack.owner)[: int(self.stack.count)]]
        owners += [owner for _, owner in self._spilled]
        found, counts = np.unique(np.concatenate(owners), return_counts=True)
        return dict(zip(found.tolist(), counts.tolist(), strict=True))

    def take_leaves(self) -> Iterator[tuple[Any, int]]:
        """The leaves, each with a leading axis of 1, and their questions."""
        count = int(self.stack.leaf_count)
        if count == 0:
            return
        leaves, owner = jax.tree.map(np.asarray, (self.stack.leaves, self.stack.leaf_owner))
        for i in range(count):
            yield jax.tree.map(lambda a, i=i: a[i : i + 1], leaves), int(owner[i])
        self.stack = dataclasses.replace(self.stack, leaf_count=np.int32(0))

    def make_room(self) -> Reason | None:
        """Move the lower half of a full stack to the host, or bring sub-domains back to an empty
        one; MEMORY if there is no more room anywhere."""
        count, capacity = int(self.stack.count), self.stack.capacity
        if count == 0 and self._spilled:
            domains, owner = self._spilled.pop()
            self._replace(domains, owner)
        elif count + self.k > capacity:
            half = count // 2
            kept = sum(len(owner) for _, owner in self._spilled)
            if (kept + half + capacity) * self._size > self._memory:
                return Reason.MEMORY
            state = jax.tree.map(np.asarray, (self.stack.domains, self.stack.owner))
            self._spilled.append(jax.tree.map(lambda a: a[:half].copy(), state))
            self._replace(*jax.tree.map(lambda a: a[half:count], state))
        return None

    def drop(self, owner: np.ndarray, still_open: np.ndarray) -> None:
        """Forget the sub-domains on the host whose sets have their answer."""
        kept = []
        for domains, mine in self._spilled:
            use = still_open[owner[mine]]
            if use.any():
                kept.append(jax.tree.map(lambda a, use=use: a[use], (domains, mine)))
        self._spilled = kept

    def _replace(self, domains: Any, owner: np.ndarray) -> None:
        def filled(old: Any, new: np.ndarray) -> np.ndarray:
            rest = np.zeros((len(old) - len(new), *new.shape[1:]), new.dtype)
            return np.concatenate([new, rest])

        self.stack = dataclasses.replace(
            self.stack,
            domains=jax.tree.map(filled, self.stack.domains, domains),
            owner=filled(self.stack.owner, owner),
            count=np.int32(len(owner)),
        )
