"""Dual smoothing: the radius against every split of a perturbation, and votes counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxcert.certificate import ABSTAIN
from jaxcert.smoothing import Gaussian, SmoothingPlan
from jaxcert.smoothing.dual import Halves, certify, checkerboard, disjoint, dual_radius

KEY = jax.random.key(6)
SIGMA = 0.5
PLAN = SmoothingPlan(noise=Gaussian(SIGMA), n0=20, n=2000, chunk=128)
probability = st.floats(1e-4, 1 - 1e-4)


@given(probability, probability, st.floats(0, np.pi / 2))
def test_no_split_of_a_perturbation_within_the_radius_wins(p, q, angle):
    radius = float(dual_radius(p, q, SIGMA))
    u, v = stats.norm.ppf([p, q])

    def left_for_the_class(size):
        a, b = size * np.cos(angle), size * np.sin(angle)
        return stats.norm.cdf(u - a / SIGMA) + stats.norm.cdf(v - b / SIGMA)

    if radius > 0:
        assert left_for_the_class(radius) > 1 - 1e-15
    else:
        assert p + q <= 1 + 1e-9 or u + v < 1e-9
    angle = np.pi / 4
    assert left_for_the_class(max(radius, 0) + 1e-6) < 1 or u + v < 0


def test_the_radius_of_unequal_halves_is_below_the_root_of_squares():
    p, q = stats.norm.cdf([2.0, 0.5])
    radius = float(dual_radius(p, q, 1.0))
    assert np.isclose(radius, 2.5 / np.sqrt(2), rtol=1e-12)
    assert radius < 2.5 / np.sqrt(2) < np.hypot(2.0, 0.5)
    # At the point between them the class has lost its majority.
    size = 2.5 / np.sqrt(2) + 0.05
    a = size / np.sqrt(2)
    assert stats.norm.cdf(2.0 - a) + stats.norm.cdf(0.5 - a) < 1
    assert size < np.hypot(2.0, 0.5)


def test_probabilities_that_prove_nothing():
    for p, q in [(0.0, 0.9), (0.4, 0.6), (0.5, 0.5), (np.nan, 0.9), (1.0, 0.9)]:
        assert float(dual_radius(p, q, SIGMA)) == 0
    assert float(dual_radius(0.45, 0.9, SIGMA)) > 0  # one half may disagree


@pytest.mark.parametrize("shape", [(4, 4), (3, 6, 2)])
def test_a_checkerboard_takes_every_pixel_once(shape):
    image = np.arange(np.prod(shape)).reshape(shape)
    left, right = checkerboard(image)
    assert left.shape == right.shape == (shape[0], shape[1] // 2, *shape[2:])
    assert np.array_equal(np.sort(np.r_[left.ravel(), right.ravel()]), image.ravel())
    colour = (np.add.outer(np.arange(shape[0]), np.arange(shape[1])) % 2).astype(bool)
    assert np.array_equal(np.sort(left.ravel()), np.sort(image[~colour].ravel()))
    disjoint(checkerboard, shape)


def test_halves_that_share_a_pixel_are_refused():
    with pytest.raises(ValueError, match="share no entry"):
        disjoint(lambda x: (x[:, :2], x[:, 1:]), (4, 4))


# Two models of the sums of their halves, as pytrees, for which everything is known.
def head(scale, half):
    total = scale * half.sum((1, 2))
    return jnp.stack([total, -total, total - 10.0], axis=1)


HALVES = Halves(*(jax.tree_util.Partial(head, jnp.asarray(s)) for s in (1.0, 2.0)))
X = np.zeros((4, 2, 2), np.float32)
X[0, 0] = [0.9, 0.4]  # the pixels of the left model are (0, 0), (1, 1)
X[1, 0] = [-0.9, 0.3]  # halves that disagree, the left one is surer
X[2, 0] = [0.5, -0.5]
X[3, 1, 1] = np.nan


def test_radii_are_those_of_the_votes_of_both_halves():
    certificate = certify(KEY, HALVES, jnp.asarray(X), PLAN)
    assert certificate.prediction.tolist() == [0, 1, ABSTAIN, ABSTAIN]

    @jax.jit
    def copies(i):
        own = jax.random.fold_in(KEY, i)
        keys = jax.vmap(lambda s: jax.random.fold_in(own, s))(jnp.arange(PLAN.n, dtype=jnp.uint32))
        return jax.vmap(lambda k: PLAN.noise.perturb(k, jnp.asarray(X)[i]))(keys)

    for i, side in ((0, 1), (1, -1)):
        z = np.asarray(copies(np.uint32(i)))
        sums = np.array([z[:, 0, 0] + z[:, 1, 1], z[:, 0, 1] + z[:, 1, 0]])
        votes = (side * sums > 0).sum(1)
        p = stats.beta.ppf(PLAN.alpha / 2, votes, PLAN.n - votes + 1)
        expected = SIGMA * stats.norm.ppf(p).sum() / np.sqrt(2)
        assert np.isclose(certificate.radius[i], expected, rtol=1e-4)
        # A sum of two pixels is normal with sqrt(2) sigma, so what is certified is bounded by
        # (m_l + m_r) / 2 for means of size m, and attained by moving all pixels alike.
        means = side * np.array([X[i, 0, 0], X[i, 0, 1]])
        assert certificate.radius[i] < means.sum() / 2
    assert np.all(certificate.radius[2:] == 0)
    assert np.all(np.asarray(certificate.confidence, np.float64) <= 1 - PLAN.alpha)
    assert certificate.norm == 2


def test_bad_arguments_say_what_to_type():
    with pytest.raises(TypeError, match="Halves"):
        certify(KEY, head, jnp.asarray(X), PLAN)
    one = Halves(*(lambda half: half.sum((1, 2), keepdims=True)[:, 0],) * 2)
    with pytest.raises(ValueError, match="k >= 2"):
        certify(KEY, one, jnp.asarray(X), PLAN)
