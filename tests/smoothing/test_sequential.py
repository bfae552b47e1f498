"""Sequential certificates: the draws of fixed ones, decided by the tables, in any slots."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxcert import smoothing
from jaxcert.smoothing import (
    FixedSize,
    Gaussian,
    Hybrid,
    Laplace,
    SequentialPlan,
    SmoothingPlan,
    UniformBall,
)
from jaxcert.smoothing.sampling import noisy_copies
from jaxcert.smoothing.sequential import probabilities_needed

KEY = jax.random.key(3)
RADII = (0.0, 0.25, 0.75)
PLAN = SequentialPlan(noise=Gaussian(0.5), radii=RADII, n0=30, n=3000, peek=50, slots=3)
X = np.concatenate([np.linspace(-1.5, 1.5, 9), [0.0, 0.01]]).astype(np.float32)[:, None]


def sign(x):
    """Predicts class 0 or 2 of three, so that the exact radius is |x|."""
    return jnp.concatenate([x, 0 * x - 9, -x], axis=1)


FOUND = smoothing.certify_at(KEY, sign, X, PLAN)


def by_hand(image):
    """The decisions for one image, from its draws and the tables alone."""
    p0 = [max(0.5, stats.norm.cdf(r / 0.5)) for r in RADII]
    tables = Hybrid().boundaries(p0, n_max=3000, alpha=1e-3, peek=50, beta=1e-3)
    number = jnp.arange(3000, dtype=jnp.uint32)
    key = jax.random.fold_in(KEY, image)
    draws, selecting = (
        np.asarray(sign(noisy_copies(key, jnp.asarray(X[image]), s, Gaussian(0.5)))).argmax(1)
        for s in (number, ~number[:30])
    )
    top = np.bincount(selecting, minlength=3).argmax()
    verdict = [0, 0, 0]
    for look in range(60):
        votes = (draws[: 50 * (look + 1)] == top).sum()
        for r in range(3):
            if verdict[r] == 0:
                verdict[r] = int(votes >= tables.certify[look, r]) - int(
                    votes <= tables.give_up[look, r]
                )
        if all(verdict):
            return [v == 1 for v in verdict], 50 * (look + 1) + 30, votes, top
    raise AssertionError("the last look decides")


@pytest.mark.parametrize("image", [0, 6])
def test_decisions_are_those_of_the_tables_on_the_votes_of_count(image):
    certified, draws, votes, top = by_hand(image)
    assert FOUND.certified[image].tolist() == certified
    assert FOUND.draws[image] == draws
    assert FOUND.class_votes[image] == votes
    assert FOUND.certificate.prediction[image] == top


def test_radii_are_the_largest_certified_and_below_the_exact_ones():
    radius = np.asarray(FOUND.certificate.radius)
    assert (radius <= np.abs(X[:, 0])).all()
    assert set(radius.tolist()) <= set(RADII)
    assert {0.25, 0.75} <= set(radius.tolist())
    nested = np.asarray(FOUND.certified)
    assert (nested[:, :-1] >= nested[:, 1:]).all()
    assert np.array_equal(np.asarray(FOUND.certificate.prediction) == -1, ~nested[:, 0])
    assert float(FOUND.certificate.confidence[0]) == pytest.approx(0.999)
    assert FOUND.certificate.norm == 2


def test_neither_the_batch_nor_the_slots_nor_jit_change_a_decision():
    order = np.array([7, 2, 10, 0])
    plan = SequentialPlan(**{**vars(PLAN), "slots": 5})
    jitted = jax.jit(lambda k, x, i: smoothing.certify_at(k, sign, x, plan, index=i))
    found = jitted(KEY, X[order], order)
    for part, whole in zip(jax.tree.leaves(found), jax.tree.leaves(FOUND), strict=True):
        assert np.array_equal(part, np.asarray(whole)[order])


def test_easy_images_take_few_draws_and_undecidable_ones_all():
    draws = np.asarray(FOUND.draws)
    assert draws[0] < 700
    assert draws[9] > 1000
    assert (draws <= 3030).all()


def test_fixed_size_is_the_fixed_certificate():
    plan = SequentialPlan(noise=Gaussian(0.5), radii=(0.25,), n0=30, n=3000, test=FixedSize())
    found = smoothing.certify_at(KEY, sign, X, plan)
    fixed = SmoothingPlan(noise=Gaussian(0.5), n0=30, n=3000)
    certificate = smoothing.certify(KEY, sign, X, fixed)
    assert np.array_equal(found.certified[:, 0], certificate.radius >= 0.25)
    assert (np.asarray(found.draws) == 3030).all()


def test_wrong_certificates_are_rarer_than_alpha():
    """At x = r exactly, with alpha = 0.05: 400 runs, of which 20 may be wrong."""
    plan = SequentialPlan(
        noise=Gaussian(0.5), radii=(0.25, 0.5), n0=10, n=1000, alpha=0.05, peek=50, slots=40
    )
    x = np.full((400, 1), 0.25, np.float32)
    found = smoothing.certify_at(jax.random.key(11), sign, x, plan)
    wrong = int((np.asarray(found.certificate.radius) >= 0.25).sum())
    assert wrong <= stats.binom.ppf(0.999, 400, 0.05)
    assert wrong > 0  # the test could fail: the bound is not idle


def test_models_that_prove_nothing_certify_nothing():
    def nan(x):
        return jnp.full((len(x), 3), jnp.nan)

    with pytest.raises(ValueError, match="not all finite, on any draw"):
        smoothing.certify_at(KEY, nan, X[:2], PLAN)
    found = jax.jit(lambda x: smoothing.certify_at(KEY, nan, x, PLAN))(X[:2])
    assert not np.asarray(found.certified).any()
    assert found.certificate.prediction.tolist() == [-1, -1]
    found = smoothing.certify_at(KEY, sign, jnp.array([[jnp.nan], [2.0]]), PLAN)
    assert found.certificate.prediction.tolist() == [-1, 0]


def test_a_radius_at_a_point_of_the_search_is_proved_by_the_probability_found():
    """Batches of other sizes compute a radius to another last bit; the search went to its start."""
    noise, x = UniformBall(1.0), np.zeros((1, 12), np.float32)
    for p in (17 / 32, 19 / 32, 31 / 32):
        with jax.enable_x64(True):
            radius = float(noise.radius(np.array([p]), None, x)[0])
            needed = probabilities_needed(noise, (radius,), (12,))
            assert float(noise.radius(needed, None, x)[0]) >= radius


@pytest.mark.parametrize("noise", [Gaussian(0.5), Laplace(0.5), UniformBall(2.0)])
def test_probabilities_needed_are_least(noise):
    radii = (0.0, 0.1, 0.4)
    x = np.zeros((3, 4), "f")
    needed = probabilities_needed(noise, radii, (4,))
    assert (np.asarray(noise.radius(needed, None, x)) >= radii).all()
    less = needed - 1e-7 * (needed - 0.5) - 1e-12
    found = np.asarray(noise.radius(less, None, x))
    assert ((found < radii) | (found == 0)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"radii": ()}, "radii must be a tuple"),
        ({"radii": (-1.0,)}, "radii must be a tuple"),
        ({"n": 1001}, "take n=1000"),
        ({"slots": 0}, "slots must be a positive int"),
        ({"beta": 0.0}, "beta must lie"),
    ],
)
def test_bad_plans_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SequentialPlan(**{"noise": Gaussian(0.5), "radii": (0.5,), **changes})


def test_other_mistakes_are_named():
    with pytest.raises(TypeError, match="must be a SequentialTest"):
        SequentialPlan(noise=Gaussian(0.5), radii=(0.5,), test="hybrid")
    far = SequentialPlan(noise=Gaussian(0.5), radii=(0.5, 9.0))
    with pytest.raises(ValueError, match=r"cannot certify the radii \[9.0\]"):
        smoothing.certify_at(KEY, sign, X, far)
    with pytest.raises(TypeError, match="plan must be a SequentialPlan"):
        smoothing.certify_at(KEY, sign, X, SmoothingPlan(noise=Gaussian(0.5)))
    assert math.isclose(PLAN.alpha, 1e-3)


def test_the_hardware_generator_repeats_no_draw():
    """A batch of its keys draws from the first one: slots would share noise, and see it again."""
    seen = []

    def spy(z):
        jax.debug.callback(lambda v: seen.append(np.asarray(v)), z, ordered=True)
        return sign(z)

    plan = SequentialPlan(**{**vars(PLAN), "n": 500, "slots": 2, "hardware": True})
    x = np.full((3, 1), 0.25, np.float32)
    found = smoothing.certify_at(KEY, spy, x, plan)
    jax.effects_barrier()
    draws = np.concatenate([batch[:, 0] for batch in seen if batch[0] != batch[1]])
    while_three = draws[: 100 * (int(found.draws.min()) // 50)]
    assert len(np.unique(while_three)) > 0.99 * while_three.size


def test_a_radius_within_the_box_is_refused_outside_of_it():
    noise = smoothing.Uniform(2.0, unit_box=True)
    plan = SequentialPlan(noise=noise, radii=(0.8,), n=2000)
    with pytest.raises(ValueError, match="none that Uniform"):
        smoothing.certify_at(KEY, sign, jnp.array([[2.0]]), plan)
    traced = jax.jit(lambda x: smoothing.certify_at(KEY, sign, x, plan).certificate.prediction)
    assert traced(jnp.array([[2.0]])).tolist() == [-1]
