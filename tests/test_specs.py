"""Specs: margins, and/or groups, and that nothing is proved by accident."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcert.sets import Box
from jaxcert.specs import AllOf, AnyOf, Spec, apply, margins, proved


def test_margins_are_differences_of_logits():
    y = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    label = jnp.array([0, 2, 3])
    got = apply(margins(label, 4), y)
    expected = [[y[i, l] - y[i, j] for j in range(4) if j != l] for i, l in enumerate([0, 2, 3])]
    assert np.allclose(got, expected)
    assert np.array_equal(jax.jit(lambda l: margins(l, 4).matrix)(label), margins(label, 4).matrix)


def test_margins_of_labels_that_do_not_exist_are_nan():
    matrix = margins(jnp.array([-1, 4, 0]), 4).matrix
    assert np.isnan(matrix[:2]).all()
    assert np.isfinite(matrix[2]).all()


@pytest.mark.parametrize(
    ("label", "k", "error"),
    [
        (jnp.array([0]), 1, ValueError),
        (jnp.array(0), 3, TypeError),
        (jnp.array([0.0]), 3, TypeError),
        (jnp.array([[0]]), 3, TypeError),
    ],
)
def test_wrong_labels_raise(label, k, error):
    with pytest.raises(error):
        margins(label, k)


def test_apply_with_shared_and_own_rows():
    y = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    shared = Spec(jnp.array([[1.0, -1.0], [0.0, 1.0], [1.0, 1.0]]), jnp.array([0.5, 0.0, -1.0]))
    assert np.array_equal(apply(shared, y), [[-0.5, 2, 2], [-1.5, 5, 7]])
    own = Spec(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]), 1.0)
    assert np.array_equal(apply(own, y), [[2], [6]])


def exactly(y, spec):
    value = apply(spec, y)
    return Box(value, value)


def test_and_or_groups():
    y = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [jnp.nan, 1.0], [0.0, 1.0]])
    first, second = Spec(jnp.array([[1.0, 0.0]])), Spec(jnp.array([[0.0, 1.0]]))
    bound = functools.partial(exactly, y)
    assert proved(first, bound).tolist() == [True, True, False, False, False]
    both, either = AllOf((first, second)), AnyOf((first, second))
    assert proved(both, bound).tolist() == [True, False, False, False, False]
    # apply multiplies the NaN by zero, so even the second part is unknown there
    assert proved(either, bound).tolist() == [True, True, False, False, True]
    nested = AllOf((either, AnyOf((second,))))
    assert proved(nested, bound).tolist() == [True, False, False, False, True]
    assert jax.jit(lambda p: proved(p, bound))(nested).tolist() == proved(nested, bound).tolist()


def test_every_row_counts_and_zero_is_not_positive():
    spec = Spec(jnp.eye(2))
    y = jnp.array([[1.0, 0.0], [1e-30, 1e-30], [-0.0, 1.0], [jnp.inf, 1.0]])
    assert proved(spec, lambda s: Box(y, y)).tolist() == [False, True, False, True]
    assert not proved(spec, lambda s: Box(y * jnp.nan, y)).any()
