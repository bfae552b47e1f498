"""Center smoothing: its constants against exact sums, its statement against many other inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxcert.smoothing import Gaussian, SmoothingPlan
from jaxcert.smoothing.center import OutputMetric, certify, euclidean, majority, predict

KEY = jax.random.key(7)
SIGMA = 0.5
PLAN = SmoothingPlan(noise=Gaussian(SIGMA), n0=101, n=1000, chunk=64)
X = np.array([[0.0, 0.0, 0.0], [1.0, -1.0, 0.5]], np.float32)
EPS = 0.2


def curve(z):
    """Outputs in the plane, in two far apart clusters by the sign of a coordinate, and noisy."""
    side = jnp.where(z[:, :1] > 0, 5.0, -5.0)
    return side + jnp.stack([jnp.sin(z[:, 1]), z[:, 2] ** 2], axis=1)


def squared(a, b):
    return jnp.sum((a - b) ** 2)


SQUARED = OutputMetric(squared, triangle=2.0)


@pytest.fixture(scope="module")
def certificate():
    return certify(KEY, curve, jnp.asarray(X), PLAN, EPS, metric=SQUARED)


@pytest.mark.parametrize(("n0", "candidates"), [(1, 100), (100, 100), (101, 40), (2000, 60)])
def test_the_majority_is_missed_with_half_of_alpha(n0, candidates):
    plan = SmoothingPlan(noise=PLAN.noise, n0=n0, n=1000)
    q = float(majority(plan, OutputMetric(euclidean, candidates=candidates)))
    missed = 0.0 if candidates >= n0 else (1 - q) ** candidates
    risk = stats.binom.cdf(n0 // 2, n0, q) + missed
    assert risk <= plan.alpha / 2 * (1 + 1e-12)
    assert stats.binom.cdf(n0 // 2, n0, q - 0.001) + missed > plan.alpha / 2 or n0 == 1


def test_change_is_ten_times_an_order_statistic_of_fresh_distances(certificate):
    """t (1 + 2 t) times, with t = 2 for squared distances; 3 times for a metric."""

    def draw(s, i):
        key = jax.random.fold_in(jax.random.fold_in(KEY, np.uint32(i)), s)
        return PLAN.noise.sample(key, (3,), jnp.float32)

    q = float(majority(PLAN, OutputMetric(euclidean)))
    p = stats.norm.cdf(stats.norm.ppf(q) + EPS / SIGMA)
    ranks = np.arange(1, PLAN.n + 1)
    rank = ranks[np.argmax(stats.binom.sf(ranks - 1, PLAN.n, p) <= PLAN.alpha / 2)]
    for i in range(2):
        noise = jax.vmap(draw, (0, None))(jnp.arange(PLAN.n, dtype=jnp.uint32), i)
        distances = np.sum((curve(X[i] + noise) - certificate.center[i]) ** 2, axis=1)
        assert np.isclose(certificate.change[i], 10 * np.sort(distances)[rank - 1], rtol=1e-4)


def test_centers_minimise_the_median_distance(certificate):
    def draw(s):
        key = jax.random.fold_in(jax.random.fold_in(KEY, np.uint32(1)), s)
        return PLAN.noise.sample(key, (3,), jnp.float32)

    numbers = jnp.uint32(2**32 - 1) - jnp.arange(PLAN.n0, dtype=jnp.uint32)
    outputs = np.asarray(curve(X[1] + jax.vmap(draw)(numbers)))
    distances = np.linalg.norm(outputs[:, None] - outputs[None], axis=2)
    best = outputs[:100][np.argmin(np.sort(distances, axis=1)[:100, 50])]
    assert np.allclose(certificate.center[1], best, atol=1e-5)


def test_predictions_near_x_stay_within_the_change(certificate):
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(40, 3))
    directions[:4] = [[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, 0, 1]]
    directions *= EPS / np.linalg.norm(directions, axis=1, keepdims=True)
    for i in range(2):
        moved = jnp.asarray(X[i] + directions, jnp.float32)
        centers = predict(jax.random.key(8), curve, moved, PLAN, metric=SQUARED)
        distances = np.sum((centers - certificate.center[i]) ** 2, axis=1)
        assert np.all(distances <= certificate.change[i])
    # At 0 both clusters are as likely: no center may claim to stay in its own.
    assert certificate.change[0] > 200
    centers = predict(jax.random.key(8), curve, jnp.zeros((40, 3)), PLAN, metric=SQUARED)
    assert np.ptp(centers[:, 0]) > 5
    assert certificate.change[1] < 100  # two sigma from the border


def test_predict_returns_the_certified_center_in_any_batch(certificate):
    many, index = np.tile(X[::-1], (20, 1)), np.tile([1, 0], 20)
    centers = predict(KEY, curve, jnp.asarray(many), PLAN, metric=SQUARED, index=index)
    assert np.allclose(centers, np.tile(certificate.center[::-1], (20, 1)), atol=1e-6)


def test_what_cannot_be_bounded_is_infinite():
    def spoilt(z):
        return jnp.where(z > 0.25, jnp.nan, z)

    x = jnp.asarray([[0.0, -3.0, -3.0], [-3.0, -3.0, -3.0], [jnp.nan, 0.0, 0.0]])
    certificate = certify(KEY, spoilt, x, PLAN, EPS)
    assert np.isinf(certificate.change).tolist() == [True, False, True]
    assert np.all(np.isnan(certificate.center[2]))
    far = certify(KEY, spoilt, x, PLAN, 5.0)
    assert np.all(np.isinf(far.change))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OutputMetric(euclidean, triangle=0.5), "triangle"),
        (lambda: OutputMetric(euclidean, candidates=0), "candidates"),
        (lambda: majority(PLAN, OutputMetric(euclidean, candidates=5)), "candidates >= 12"),
    ],
)
def test_bad_arguments_say_what_to_type(make, words):
    with pytest.raises(ValueError, match=words):
        make()
    with pytest.raises(TypeError, match="function"):
        OutputMetric(2.0)
