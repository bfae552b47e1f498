"""Segmentation against Holm's procedure step by step, simulated error rates and known
probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxcert.certificate import ABSTAIN
from jaxcert.sets import Grid
from jaxcert.smoothing import GridGaussian, SmoothingPlan
from jaxcert.smoothing.segmentation import certify, step_down

KEY = jax.random.key(1)
SIGMA = 0.5
PLAN = SmoothingPlan(noise=GridGaussian(SIGMA), n0=20, n=400, alpha=0.01, chunk=64)
TAU = 0.75
# Pixels at so many sigmas from the border of their class.
X = SIGMA * np.array([[[-3.0, -0.5, 0.1, -2.0], [0.7, 1.5, 3.0, 4.0]]] * 2, np.float32)
X = np.round(255 * X) / np.float32(255)
X[1, 1, 2] = np.inf

stepped = jax.jit(step_down, static_argnums=(1, 2, 3, 4))


def naive(votes, n, tau, alpha, errors):
    """The step-down procedures as they are published, one hypothesis after the other."""
    m, k = len(votes), errors + 1
    p_values = stats.binom.sf(votes - 1, n, tau)
    rejected = np.zeros(m, bool)
    for j, pixel in enumerate(np.argsort(p_values, kind="stable"), start=1):
        allowed = k * alpha / m if j <= k else k * alpha / (m + k - j)
        if p_values[pixel] > allowed:
            break
        rejected[pixel] = True
    return rejected


@given(st.lists(st.integers(0, 60), min_size=12, max_size=12), st.sampled_from([0, 2]))
def test_step_down_is_the_published_procedure(votes, errors):
    # Around the boundaries: 60 draws, tau 3/4, where the tails of 50 to 58 votes matter.
    votes = np.where(np.arange(12) % 2, votes, 50 + np.array(votes) % 10)
    ours = np.asarray(stepped(jnp.asarray(votes), 60, TAU, 0.05, errors))
    assert np.array_equal(ours, naive(votes, 60, TAU, 0.05, errors))


def test_the_first_k_steps_have_one_level():
    """A tail of 0.0289 for 50 votes of 58, between 0.05 * 3 / 5 and 0.05 * 3 / 6."""
    votes = np.array([50, 40, 50, 40, 50])
    ours = np.asarray(stepped(jnp.asarray(votes), 58, TAU, 0.05, 2))
    assert np.array_equal(ours, votes == 50)
    assert np.array_equal(ours, naive(votes, 58, TAU, 0.05, 2))


@pytest.mark.parametrize("errors", [0, 2])
def test_wrong_pixels_are_as_rare_as_promised(errors):
    n, alpha, runs = 60, 0.05, 4000
    true = np.array([TAU] * 8 + [0.99] * 4)  # eight hypotheses at the border of being true
    uniform = np.random.default_rng(0).uniform(size=(runs, n, 12))
    for dependent in (False, True):
        draws = uniform[..., :1] if dependent else uniform
        votes = jnp.asarray((draws < true).sum(1))
        certain = np.asarray(jax.vmap(lambda v: stepped(v, n, TAU, alpha, errors))(votes))
        wrong = np.mean(certain[:, :8].sum(1) > errors)
        assert wrong <= alpha + 3 * np.sqrt(alpha / runs)
        assert certain[:, 8:].mean() > 0.5  # and it is not silent


def test_more_tolerated_errors_reject_more():
    votes = jnp.asarray(np.r_[np.arange(44, 56)])
    counts = [int(stepped(votes, 60, TAU, 0.05, errors).sum()) for errors in (0, 2)]
    assert 0 < counts[0] < counts[1] < 12


def signs(z):
    """Two classes by the sign of a pixel; the last pixel has a NaN among its logits."""
    return jnp.stack([z, -z], axis=-1).at[:, 1, 3, 0].set(jnp.nan)


@pytest.fixture(scope="module")
def certificate():
    return certify(KEY, signs, jnp.asarray(X), PLAN, tau=TAU, errors=1, index=np.array([5, 3]))


def test_certain_pixels_have_the_class_of_the_votes(certificate):
    def copy(s):
        key = jax.random.fold_in(jax.random.fold_in(KEY, np.uint32(5)), s)
        return PLAN.noise.perturb(key, jnp.asarray(X[0]))

    copies = np.asarray(jax.vmap(copy)(jnp.arange(PLAN.n, dtype=jnp.uint32)))
    # Class 0 wins the draw at 0, which the grid noise hits now and then.
    votes = np.where(X[0] < 0, (copies < 0).sum(0), (copies >= 0).sum(0))
    votes[1, 3] = 0
    certain = naive(votes.ravel(), PLAN.n, TAU, PLAN.alpha, 1)
    expected = np.where(certain, X[0].ravel() < 0, ABSTAIN)
    assert np.array_equal(certificate.prediction[0].ravel(), expected)
    expected = [[1, ABSTAIN, ABSTAIN, 1], [ABSTAIN, 0, 0, ABSTAIN]]
    assert certificate.prediction[0].tolist() == expected


def test_the_radius_is_that_of_tau(certificate):
    exact = SIGMA * stats.norm.ppf(TAU)
    radius = np.asarray(certificate.radius, np.float64)
    assert np.all((exact * (1 - 1e-5) < radius) & (radius <= exact))
    assert np.all(np.asarray(certificate.confidence, np.float64) <= 1 - PLAN.alpha)
    assert (certificate.errors, certificate.norm, certificate.within) == (1, 2, Grid(255))
    assert certificate.radius.shape == certificate.confidence.shape == (2,)


def test_images_that_are_not_finite_abstain(certificate):
    assert np.all(certificate.prediction[1] == ABSTAIN)


def test_they_abstain_where_any_pixel_may_be_wrong():
    x = jnp.full_like(jnp.asarray(X), jnp.nan)
    assert np.all(certify(KEY, signs, x, PLAN, errors=5000).prediction == ABSTAIN)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tau": 0.4}, "tau=0.75"),
        ({"tau": 1.0}, "tau=0.75"),
        ({"errors": -1}, "errors=0"),
        ({"f": lambda z: z.reshape(z.shape[0], -1)}, "use jaxcert.smoothing.certify"),
    ],
)
def test_bad_arguments_say_what_to_type(options, words):
    with pytest.raises(ValueError, match=words):
        certify(**{"key": KEY, "f": signs, "x": X, "plan": PLAN, **options})
