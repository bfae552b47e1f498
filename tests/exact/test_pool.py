"""Spilling to the host, with a toy search: ranges of integers, halved until they are single."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcert import Reason
from jaxcert.exact import search
from jaxcert.exact.pool import Pool

K, N, SIZE = 2, 2, 1024


def halved(domains, owner, there):
    """All ranges (k, 2) in two."""
    low, high = domains[:, 0], domains[:, 1]
    middle = (low + high) // 2
    children = jnp.concatenate([jnp.stack([low, middle], 1), jnp.stack([middle, high], 1)])
    single = children[:, 1] - children[:, 0] == 1
    nothing = jnp.zeros((2 * K, 1)), jnp.tile(owner, 2), jnp.zeros(2 * K, bool)
    return search.Expansion(
        children, jnp.tile(owner, 2), jnp.tile(there, 2), single, children[:, 0], *nothing
    )


@functools.partial(jax.jit, static_argnums=1)
def block(stack, steps):
    return search.block(halved, K, stack, steps)


def worked_off(memory, steps=3):
    """The integers that were met, by question, whether some had to wait on the host, and why the
    search stopped."""
    start = np.stack([np.zeros(N, np.int32), np.full(N, SIZE, np.int32)], 1)
    pool = Pool(start, np.arange(N), N, K, (1,), memory)
    met, spilled = [[] for _ in range(N)], False
    while pool.waiting():
        pool.stack = block(pool.stack, steps)
        for leaf, i in pool.take_leaves():
            met[i].append(int(leaf[0, 0]))
        spilled |= sum(pool.waiting().values()) > pool.stack.capacity
        reason = pool.make_room()
        if reason is not None:
            return met, spilled, reason
    return met, spilled, None


@pytest.mark.parametrize(("memory", "spills"), [(2**20, False), (400, True)])
def test_nothing_is_lost_or_met_twice(memory, spills):
    met, spilled, reason = worked_off(memory)
    assert reason is None
    assert spilled == spills
    for each in met:
        assert sorted(each) == list(range(SIZE))


def test_more_than_the_memory_is_refused():
    met, _, reason = worked_off(1)
    assert reason == Reason.MEMORY
    assert len(met[0]) + len(met[1]) < 2 * SIZE


def test_what_is_answered_is_forgotten():
    start = np.stack([np.zeros(N, np.int32), np.full(N, SIZE, np.int32)], 1)
    pool = Pool(start, np.arange(N), N, K, (1,), 400)
    while sum(pool.waiting().values()) <= pool.stack.capacity:
        pool.stack = block(pool.stack, 3)
        list(pool.take_leaves())
        assert pool.make_room() is None
    on_stack = np.asarray(pool.stack.owner)[: int(pool.stack.count)]
    before = pool.waiting()
    pool.drop(np.arange(N), np.array([False, True]))
    assert pool.waiting().get(0, 0) == np.sum(on_stack == 0)
    assert pool.waiting().get(1, 0) == before.get(1, 0)
