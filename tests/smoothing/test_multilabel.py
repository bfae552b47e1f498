"""Labels whose probability under noise is known everywhere, and votes counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxcert.certificate import ABSTAIN
from jaxcert.smoothing import Gaussian, SmoothingPlan
from jaxcert.smoothing.multilabel import certify

KEY = jax.random.key(2)
SIGMA = 0.5
PLAN = SmoothingPlan(noise=Gaussian(SIGMA), n0=20, n=2000, chunk=128)
# Labels at so many sigmas from their border.
X = SIGMA * np.array([[-2.0, -1.0, 0.0, 0.01, 1.5], [3.0, 3.0, 3.0, 3.0, np.nan]], np.float32)


def twice(z):
    return 2 * z


@pytest.fixture(scope="module")
def certificate():
    return certify(KEY, twice, jnp.asarray(X), PLAN)


def test_radii_are_those_of_the_votes_at_a_fifth_of_alpha(certificate):
    def draw(s):
        key = jax.random.fold_in(jax.random.fold_in(KEY, np.uint32(0)), s)
        return PLAN.noise.sample(key, (5,), jnp.float32)

    on = np.asarray(X[0] + jax.vmap(draw)(jnp.arange(PLAN.n, dtype=jnp.uint32)) > 0).sum(0)
    for label in (0, 1, 4):
        votes = on[label] if X[0, label] > 0 else PLAN.n - on[label]
        p_lower = stats.beta.ppf(PLAN.alpha / 5, votes, PLAN.n - votes + 1)
        assert np.isclose(certificate.radius[0, label], SIGMA * stats.norm.ppf(p_lower), rtol=1e-5)


def test_labels_keep_their_side_up_to_the_border(certificate):
    assert certificate.prediction[0].tolist() == [0, 0, ABSTAIN, ABSTAIN, 1]
    exact = np.abs(X[0])  # the border is a hyperplane, and the theorem tight
    radius = np.asarray(certificate.radius[0])
    assert np.all(radius <= exact)
    assert np.all(radius[[0, 1, 4]] > 0.85 * exact[[0, 1, 4]])
    assert np.all(radius[[2, 3]] == 0)
    assert np.all(np.asarray(certificate.confidence, np.float64) <= 1 - PLAN.alpha)
    assert (certificate.norm, certificate.within) == (2, None)


def test_inputs_that_are_not_finite_abstain(certificate):
    assert np.all(certificate.prediction[1] == ABSTAIN)
    assert np.all(certificate.radius[1] == 0)


def test_spoilt_draws_count_for_neither_side_and_labels_can_be_chosen():
    def spoilt(z):  # NaN in one label spoils the whole draw: 16% of them at 0
        return z.at[:, 0].set(jnp.where(z[:, 0] > SIGMA, jnp.nan, z[:, 0]))

    def above(logits):
        return logits > -1

    x = jnp.zeros((1, 5)).at[0, 1].set(-1.0).at[0, 2].set(-3.0)
    certificate = certify(KEY, spoilt, x, PLAN, labels=above)
    assert certificate.prediction[0].tolist() == [1, ABSTAIN, 0, 1, 1]
    most = SIGMA * stats.norm.ppf(stats.norm.cdf(1) + 0.03)
    assert np.all(certificate.radius <= most)


def test_bad_models_say_what_is_wrong():
    with pytest.raises(ValueError, match="logits"):
        certify(KEY, lambda z: z[:, :, None], X, PLAN)
