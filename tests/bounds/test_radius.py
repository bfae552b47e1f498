"""The certified radius: what it claims is certified, and where it stops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import dense, weights
from oracles import in_float64, points_of

from jaxcert.bounds import certified_radius, certify, crown, crown_ibp, ibp
from jaxcert.certificate import ABSTAIN
from jaxcert.sets import Box, L1Ball, L2Ball, LinfBall

BALLS = {jnp.inf: LinfBall, 2: L2Ball, 1: L1Ball}


@functools.cache
def net():
    return dense(4, 8, 3, seed=1)


def inputs(b=6, d=4, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(b, d)), jnp.float32)


@pytest.mark.parametrize("norm", BALLS)
def test_a_linear_model_has_its_exact_radius(norm):
    """margin / |w_y - w_j|_dual, down to the last halving, and never above."""
    w = np.asarray(weights(4, 3, seed=1), np.float64)
    x = inputs(12)
    logits = np.asarray(x, np.float64) @ w
    top = logits.argmax(1)
    dual = {np.inf: 1, 2: 2, 1: np.inf}[norm]
    exact = np.full(12, np.inf)
    for i, y in enumerate(top):
        for j in set(range(3)) - {y}:
            size = np.linalg.norm(w[:, y] - w[:, j], dual)
            exact[i] = min(exact[i], (logits[i, y] - logits[i, j]) / size)
    found = certified_radius(
        jax.tree_util.Partial(lambda w, x: x @ w, jnp.asarray(w, jnp.float32)), x, norm,
        method=crown_ibp, steps=10,
    )  # fmt: skip
    radius = np.asarray(found.radius, np.float64)
    assert found.norm == norm
    assert (found.prediction == top).all()
    assert (radius <= exact).all()
    assert (radius >= np.minimum(exact, 1) - 2**-10 - 1e-6).all()
    assert (exact < 1).any()
    assert (np.asarray(found.confidence) == 1).all()


def test_the_radius_is_certified_again_and_no_attack_breaks_it():
    x, valid = inputs(8), Box(0.0, 1.0)
    largest = jnp.asarray(np.geomspace(1e-3, 2.0, 8), jnp.float32)
    found = certified_radius(net(), x, 2, largest=largest, valid=valid)
    radius = np.asarray(found.radius)
    assert found.within is not None
    assert (radius <= largest).all()
    assert (radius == np.asarray(largest)).any()  # easy ones reach it
    assert (radius < np.asarray(largest)).any()
    again = certify(net(), L2Ball(x, found.radius, valid), method=crown)
    assert np.array_equal(again.radius, radius)
    assert np.array_equal(again.prediction, found.prediction)
    more = certify(net(), L2Ball(x, found.radius + largest / 2**11, valid), method=crown)
    missed = np.asarray(more.radius) > np.asarray(largest)
    assert ((np.asarray(more.radius) == 0) | missed).all()  # the bisection stopped at a failure
    points = points_of(net(), L2Ball(x, found.radius, valid), n=64)
    y = in_float64(net())(points.reshape(-1, 4)).reshape(*points.shape[:2], 3)
    assert (y.argmax(-1) == np.asarray(found.prediction)).all()


def test_better_methods_and_more_steps_certify_more():
    x = inputs(8)
    coarse = np.asarray(certified_radius(net(), x, jnp.inf, method=ibp, steps=3).radius)
    fine = np.asarray(certified_radius(net(), x, jnp.inf, method=ibp, steps=9).radius)
    best = np.asarray(certified_radius(net(), x, jnp.inf, method=crown, steps=9).radius)
    assert (coarse <= fine).all()
    assert (fine - coarse <= 2**-3).all()
    assert (fine <= best + 2**-9).all()
    assert best.sum() > 1.05 * fine.sum()


def test_what_is_unknown_has_radius_zero():
    """Ties, logits that are not finite, and inputs that are wrong inside of jit."""
    f = lambda x: jnp.concatenate([x[:, :1], x[:, 1:2], x[:, :1] * 0 - 5], axis=1)  # noqa: E731
    x = jnp.array([[1.0, 1.0], [1.0, 0.5], [0.0, 0.0]])
    found = certified_radius(f, x, jnp.inf)
    assert (found.radius > 0).tolist() == [False, True, False]
    assert (found.radius[1] <= 0.25) & (found.radius[1] > 0.249)

    broken = lambda x: jnp.concatenate([jnp.log(x[:, :1]), x[:, 1:]], axis=1)  # noqa: E731
    found = certified_radius(broken, jnp.array([[-1.0, 5.0], [0.0, 5.0], [1.0, 5.0]]), 2)
    assert found.prediction.tolist() == [ABSTAIN, ABSTAIN, 1]
    assert (found.radius > 0).tolist() == [False, False, True]

    run = jax.jit(lambda x, largest, low: certified_radius(
        net(), x, 1, largest=largest, valid=Box(low, 1.0)))  # fmt: skip
    x = jnp.tile(inputs(1), (5, 1)).at[1, 0].set(jnp.nan).at[2, 0].set(7.0)
    largest = jnp.array([1e-3, 1e-3, 1e-3, -1.0, jnp.nan])
    found = run(x, largest, 0.0)
    assert (found.radius > 0).tolist() == [True, False, False, False, False]
    assert (run(x, largest, jnp.nan).radius == 0).all()
    assert (run(x, 0.0, 0.0).radius == 0).all()


def test_wrong_arguments_raise():
    x = inputs(2)
    for norm in (3, 0, jnp.nan, -jnp.inf):
        with pytest.raises(ValueError, match="norm must be one of inf, 2 and 1"):
            certified_radius(net(), x, norm)
    for largest in (-1.0, jnp.nan, jnp.ones(3)):
        with pytest.raises(ValueError, match="eps"):
            certified_radius(net(), x, 2, largest=largest)
    with pytest.raises(ValueError, match="finite"):
        certified_radius(net(), x * jnp.nan, 2)
    with pytest.raises(ValueError, match="valid box"):
        certified_radius(net(), x + 5, 2, valid=Box(0.0, 1.0))
    with pytest.raises(ValueError, match="2 logits"):
        certified_radius(lambda x: x[:, :1], x, 2)


def test_jit_and_vmap_agree():
    x = inputs(3)
    largest = jnp.array([0.1, 0.5, 1.0])
    find = functools.partial(certified_radius, net(), method=crown_ibp, steps=6)
    plain = np.asarray(find(x, jnp.inf, largest=largest).radius)
    one = jax.jit(jax.vmap(lambda x, e: find(x[None], jnp.inf, largest=e[None]).radius[0]))
    assert plain.sum() > 0
    assert np.array_equal(one(x, largest), plain)
