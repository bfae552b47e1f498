"""Votes and noise: the same draws for every chunk and batch, and never more than `chunk` copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcert.smoothing import Gaussian, SmoothingPlan
from jaxcert.smoothing.sampling import count_votes, noisy_copies, threefry_key

NOISE = Gaussian(0.5)
WEIGHTS = np.random.default_rng(0).integers(-4, 5, (6, 3)).astype(np.float32)
X = np.random.default_rng(1).integers(-1, 2, (4, 6)).astype(np.float32)


def integer_net(z):
    """Integer weights on inputs rounded to integers: exact, so the same in any batch shape."""
    return jnp.round(4 * z) @ WEIGHTS


def count(f=integer_net, x=X, index=None, key=None, n=50, n0=7, chunk=16):
    key = jax.random.key(5) if key is None else key
    index = jnp.arange(len(x), dtype=jnp.uint32) if index is None else index
    plan = SmoothingPlan(noise=NOISE, n=n, alpha=0.3, chunk=chunk)
    call = jax.jit(lambda k, a, i: count_votes(k, f, a, i, plan, n0=n0))
    return [np.asarray(part) for part in call(key, jnp.asarray(x), index)]


def seen_by_the_model(chunk, n, n0, index=(0, 1, 2, 3), x=X):
    """Every batch of noisy copies the model is run on, in order, per image: (b, chunks, c, d)."""
    batches = []

    def spy(z):
        jax.debug.callback(lambda v: batches.append(np.asarray(v)), z, ordered=True)
        return integer_net(z)

    count(spy, x=x, n=n, n0=n0, chunk=chunk, index=jnp.array(index, jnp.uint32))
    jax.effects_barrier()
    return np.stack(batches).reshape(len(index), -1, chunk, X.shape[1])


def by_hand(image, number, key=None):
    """The documented derivation of one noisy copy, draw by draw."""
    key = jax.random.key(5) if key is None else key
    draw = jax.random.fold_in(jax.random.fold_in(key, np.uint32(image)), np.uint32(number))
    return X[image] + np.asarray(NOISE.sample(draw, X[image].shape, jnp.float32))


@pytest.mark.parametrize("chunk", [1, 16, 57])
def test_noise_is_bit_identical_for_every_chunk(chunk):
    n, n0 = 20, 5
    copies = seen_by_the_model(chunk, n, n0).reshape(4, -1, 6)[:, : n + n0]
    numbers = [*range(n), *(2**32 - 1 - j for j in range(n0))]
    expected = np.stack([[by_hand(i, s) for s in numbers] for i in range(4)])
    assert np.array_equal(copies, expected)


@pytest.mark.parametrize(("shape", "sigma"), [((3,), 0.25), ((3,), 0.3), ((28, 28, 1), 0.25)])
def test_copies_are_bit_identical_for_every_chunk_in_a_compiled_loop(shape, sigma):
    """Shapes and chunks that XLA vectorises differently; without care 3 values differ."""
    x, key, total = jax.random.uniform(jax.random.key(1), shape), jax.random.key(4), 210

    def copies(chunk):
        def one(c):
            numbers = jnp.uint32(c * chunk) + jnp.arange(chunk, dtype=jnp.uint32)
            return noisy_copies(key, x, numbers, Gaussian(sigma))

        return np.asarray(jax.jit(lambda: jax.lax.map(one, jnp.arange(total // chunk)))())

    reference = copies(1).reshape(total, -1)
    for chunk in (30, 35):
        assert np.array_equal(copies(chunk).reshape(total, -1), reference)


def test_all_draws_differ():
    copies = seen_by_the_model(16, 40, 8).reshape(4, -1, 6)[:, :48]
    noise = (copies - X[:, None]).reshape(-1, 6)
    assert len(np.unique(noise[:, 0])) == len(noise)


def test_the_model_only_sees_full_chunks_of_one_image():
    assert seen_by_the_model(16, 50, 7).shape == (4, 4, 16, 6)


@pytest.mark.parametrize("chunk", [1, 7, 57, 1000])
def test_counts_do_not_depend_on_the_chunk(chunk):
    estimation, selection = count(chunk=chunk)
    reference = count(chunk=16)
    assert np.array_equal(estimation, reference[0])
    assert np.array_equal(selection, reference[1])
    assert estimation.dtype == np.int32
    assert np.array_equal(estimation.sum(1), [50] * 4)
    assert np.array_equal(selection.sum(1), [7] * 4)


def test_counts_are_those_of_a_plain_loop():
    estimation, selection = count(n=30, n0=10)
    for i in range(4):
        classes = [int(np.argmax(integer_net(by_hand(i, s)[None])[0])) for s in range(30)]
        assert np.array_equal(estimation[i], np.bincount(classes, minlength=3))
        classes = [
            int(np.argmax(integer_net(by_hand(i, 2**32 - 1 - s)[None])[0])) for s in range(10)
        ]
        assert np.array_equal(selection[i], np.bincount(classes, minlength=3))
    assert (estimation > 0).sum(1).max() > 1  # more than one class has votes, so order would show


def test_longer_runs_start_with_the_draws_of_shorter_ones():
    short = seen_by_the_model(8, 8, 8)[:, :1]
    assert np.array_equal(seen_by_the_model(8, 24, 8)[:, :1], short)


def test_counts_follow_the_index_not_the_place_in_the_batch():
    whole = count()[0]
    order = np.array([2, 0, 3, 1])
    assert np.array_equal(count(x=X[order], index=jnp.asarray(order, jnp.uint32))[0], whole[order])
    alone = count(x=X[2:3], index=jnp.array([2], jnp.uint32))[0]
    assert np.array_equal(alone[0], whole[2])
    assert not np.array_equal(count(x=X[2:3])[0][0], whole[2])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_with_any_logit_not_finite_vote_for_nobody(bad):
    def broken(z):
        return jnp.where((z[:, :1] > 0) & (jnp.arange(3) == 2), bad, integer_net(z))

    estimation = count(broken, n=40, n0=1)[0]
    for i in range(4):
        kept = [by_hand(i, s) for s in range(40) if by_hand(i, s)[0] <= 0]
        classes = [int(np.argmax(integer_net(z[None])[0])) for z in kept]
        assert np.array_equal(estimation[i], np.bincount(classes, minlength=3))
    assert 0 < estimation.sum() < 4 * 40


def test_other_generators_give_the_same_counts_for_every_chunk():
    key = jax.random.key(0, impl="rbg")
    assert jax.random.key_impl(threefry_key(key)) == "threefry2x32"
    one, other = count(key=key, chunk=5)[0], count(key=key, chunk=31)[0]
    assert np.array_equal(one, other)
    assert not np.array_equal(one, count(key=jax.random.key(1, impl="rbg"))[0])


def test_half_precision_inputs_stay_half_precision():
    key = jax.random.key(0)
    copies = noisy_copies(key, jnp.ones(4, jnp.bfloat16), jnp.arange(3, dtype=jnp.uint32), NOISE)
    assert copies.dtype == jnp.bfloat16
    assert copies.shape == (3, 4)


def test_a_single_logit_is_refused():
    with pytest.raises(ValueError, match="at least 2 classes"):
        count(lambda z: z[:, :1])
