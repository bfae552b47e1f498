"""certify and predict: against classifiers with known smoothed radius, and every way to fail."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from jaxcert import smoothing
from jaxcert.certificate import ABSTAIN
from jaxcert.smoothing import Gaussian, SmoothingPlan

KEY = jax.random.key(0)
PLAN = SmoothingPlan(noise=Gaussian(0.5), n0=50, n=1000, alpha=1e-3, chunk=100)
WEIGHT = np.array([1.0, -2.0, 0.5, 1.0], np.float32)
OFFSET = 0.25


def linear(z):
    """Class 1 where <w, z> + b > 0. Smoothed by a Gaussian it is itself, radius |<w, x> + b| / |w|:

    <w, x + noise> + b is normal with mean <w, x> + b and deviation sigma |w|, so that
    sigma Phi^-1(p_A) = |<w, x> + b| / |w|.
    """
    score = z @ WEIGHT + OFFSET
    return jnp.stack([-score, score], axis=1)


def at_distances(distances):
    """Inputs whose signed distance to the plane of `linear` is given."""
    normal = WEIGHT / np.linalg.norm(WEIGHT)
    base = np.random.default_rng(0).normal(size=(len(distances), 4)).astype(np.float32)
    base -= ((base @ WEIGHT + OFFSET) / np.linalg.norm(WEIGHT))[:, None] * normal
    return jnp.asarray(base + np.array(distances, np.float32)[:, None] * normal)


def apply(params, z):
    hidden = jax.nn.relu(z.reshape(z.shape[0], -1) @ params["one"])
    return hidden @ params["two"]


def net(seed):
    one, two = jax.random.split(jax.random.key(seed))
    params = {"one": jax.random.normal(one, (12, 16)), "two": jax.random.normal(two, (16, 5))}
    return jax.tree_util.Partial(apply, params)


IMAGES = jax.random.normal(jax.random.key(9), (4, 3, 4))


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(one, other) for one, other in leaves)


def test_linear_radius_is_never_above_the_exact_one_and_close():
    distances = np.array([-1.2, -0.5, -0.1, 0.05, 0.3, 0.8, 1.5])
    plan = SmoothingPlan(noise=Gaussian(0.5), n=50_000, alpha=1e-6, chunk=1000)
    certificate = smoothing.certify(KEY, linear, at_distances(distances), plan)
    assert np.array_equal(certificate.prediction, distances > 0)
    radius = np.asarray(certificate.radius, np.float64)
    assert np.all(radius <= np.abs(distances))
    # At 3 deviations the 4.8 alpha quantile of the votes costs 0.3 sigma; near the plane 0.01.
    assert np.all(radius[1:-2] >= 0.9 * np.abs(distances)[1:-2] - 0.015)
    assert certificate.norm == 2.0
    np.testing.assert_allclose(certificate.confidence, 1 - 1e-6)


def test_radius_is_the_one_of_its_counts():
    """The whole chain on the host: votes, SciPy's bound, SciPy's quantile."""
    certificate = smoothing.certify(KEY, linear, at_distances([0.3]), PLAN)
    noise = np.stack(
        [
            PLAN.noise.sample(
                jax.random.fold_in(jax.random.fold_in(KEY, 0), np.uint32(s)), (4,), jnp.float32
            )
            for s in range(PLAN.n)
        ]
    )
    successes = int(np.argmax(linear(at_distances([0.3]) + noise), axis=1).sum())
    bound = stats.beta.ppf(PLAN.alpha, successes, PLAN.n - successes + 1)
    assert float(certificate.radius[0]) <= 0.5 * stats.norm.ppf(bound)
    assert float(certificate.radius[0]) == pytest.approx(0.5 * stats.norm.ppf(bound), rel=2e-7)


def test_wrong_certificates_are_rarer_than_alpha():
    """Radii above the exact one, over many keys at a large alpha: a binomial with p <= alpha."""
    plan = SmoothingPlan(noise=Gaussian(0.5), n0=20, n=60, alpha=0.1, chunk=80)
    x, trials = at_distances([0.25]), 2000
    radius = jax.jit(jax.vmap(lambda key: smoothing.certify(key, linear, x, plan).radius[0]))(
        jax.random.split(KEY, trials)
    )
    wrong = int(np.sum(np.asarray(radius) > 0.25))
    assert 0 < wrong <= stats.binom.isf(1e-4, trials, plan.alpha)


def test_unanimous_votes_give_the_finite_radius_of_n():
    certificate = smoothing.certify(KEY, linear, at_distances([50.0, -50.0]), PLAN)
    assert np.array_equal(certificate.prediction, [1, 0])
    limit = 0.5 * stats.norm.ppf(PLAN.alpha ** (1 / PLAN.n))
    assert np.all(np.asarray(certificate.radius, np.float64) <= limit)
    np.testing.assert_allclose(certificate.radius, limit, rtol=2e-7)


def test_on_the_boundary_both_abstain():
    x = at_distances([0.0, 1e-4])
    certificate = smoothing.certify(KEY, linear, x, PLAN)
    assert np.array_equal(certificate.prediction, [ABSTAIN, ABSTAIN])
    assert np.array_equal(certificate.radius, [0, 0])
    assert np.array_equal(smoothing.predict(KEY, linear, x, PLAN), [ABSTAIN, ABSTAIN])


@given(st.floats(-2, 2), st.integers(0, 2**31 - 1))
def test_predict_and_certify_follow_the_plane_or_abstain(distance, seed):
    x, key = at_distances([distance]), jax.random.key(seed)
    truth = int((x @ WEIGHT + OFFSET)[0] > 0)
    certificate = smoothing.certify(key, linear, x, PLAN)
    assert int(smoothing.predict(key, linear, x, PLAN)[0]) in (truth, ABSTAIN)
    assert int(certificate.prediction[0]) in (truth, ABSTAIN)
    if abs(distance) > 0.2:
        assert int(certificate.prediction[0]) == truth


def test_predict_is_the_binomial_test_of_the_two_leading_classes():
    thresholds = jnp.array([-0.02, 0.0, 0.05])

    def three(z):  # class probabilities 1/3-ish each, with a small lead
        rank = jnp.sum(z[:, :1] > thresholds * 8, axis=1)
        return jax.nn.one_hot(rank, 4)

    x = jnp.zeros((6, 2))
    prediction = np.asarray(smoothing.predict(KEY, three, x, PLAN))
    for i in range(6):
        keys = jax.vmap(lambda s, i=i: jax.random.fold_in(jax.random.fold_in(KEY, i), s))(
            jnp.arange(PLAN.n, dtype=jnp.uint32)
        )
        noise = jax.vmap(lambda k: PLAN.noise.sample(k, (2,), jnp.float32))(keys)
        counts = np.bincount(np.argmax(three(noise), 1), minlength=4)
        second, first = np.sort(counts)[-2:]
        certain = stats.binomtest(int(first), int(first + second), 0.5).pvalue <= PLAN.alpha
        assert prediction[i] == (np.argmax(counts) if certain else ABSTAIN)


def test_jit_equals_eager_with_everything_traced():
    f = net(0)
    eager = smoothing.certify(KEY, f, IMAGES, PLAN)
    assert np.any(np.asarray(eager.radius) > 0)

    @jax.jit
    def traced(key, params, x, index):
        model = jax.tree_util.Partial(apply, params)
        return smoothing.certify(key, model, x, PLAN, index=index)

    @jax.jit
    def closed_over(key, params, x):
        return smoothing.certify(key, lambda z: apply(params, z), x, PLAN)

    assert same(traced(KEY, f.args[0], IMAGES, jnp.arange(4)), eager)
    assert same(closed_over(KEY, f.args[0], IMAGES), eager)
    prediction = smoothing.predict(KEY, f, IMAGES, PLAN)
    assert same(jax.jit(lambda k, x: smoothing.predict(k, f, x, PLAN))(KEY, IMAGES), prediction)


def test_vmap_over_keys_and_batches_equals_single_calls():
    keys = jax.random.split(KEY, 2)
    batches = jnp.stack([IMAGES[:2], IMAGES[2:]])
    f = net(0)
    together = jax.vmap(lambda k, x: smoothing.certify(k, f, x, PLAN))(keys, batches)
    for i in range(2):
        single = smoothing.certify(keys[i], f, batches[i], PLAN)
        assert np.array_equal(together.prediction[i], single.prediction)
        # vmap makes another executable of f, whose last bits may flip a vote.
        np.testing.assert_allclose(together.radius[i], single.radius, atol=0.02)


def test_gradients_are_zero_not_an_error():
    gradient = jax.grad(lambda x: smoothing.certify(KEY, net(0), x, PLAN).radius.sum())(IMAGES)
    assert np.array_equal(gradient, np.zeros(IMAGES.shape))


def test_flax_models_and_float64_inputs():
    module = nn.Dense(3)
    variables = module.init(KEY, jnp.zeros((1, 4)))
    f = jax.tree_util.Partial(module.apply, variables)
    certificate = smoothing.certify(KEY, f, 9 * at_distances([1.0]), PLAN)
    assert certificate.radius.dtype == jnp.float32
    with jax.enable_x64(True):
        x = jnp.asarray(np.asarray(at_distances([0.5])), jnp.float64)
        wide = smoothing.certify(jax.random.key(0), linear, x, PLAN)
    assert wide.radius.dtype == jnp.float64
    assert 0.3 < float(wide.radius[0]) <= 0.5


def test_a_second_net_of_the_same_shapes_compiles_nothing():
    """A function is traced at every call, to see that what it closes over is still the same."""
    traces = []

    def counted(params, z):
        traces.append(z.shape)
        return apply(params, z)

    def run(seed, key, x):
        f = jax.tree_util.Partial(counted, net(seed).args[0])
        return smoothing.certify(key, f, x, PLAN), smoothing.predict(key, f, x, PLAN)

    first = run(0, KEY, IMAGES)
    before = len(traces)
    assert before > 0
    second = run(1, jax.random.key(7), 2 * IMAGES)
    assert len(traces) == before + 2
    assert not np.array_equal(first[0].radius, second[0].radius)
    # Beside the chunks, batches of two and three, traced to see that rows leave each other alone.
    assert set(traces) == {(PLAN.chunk, 3, 4), (2, 3, 4), (3, 3, 4)}


def test_an_image_keeps_its_certificate_alone_and_in_any_order():
    f = net(0)
    whole = smoothing.certify(KEY, f, IMAGES, PLAN)
    order = np.array([3, 1, 0, 2])
    moved = smoothing.certify(KEY, f, IMAGES[order], PLAN, index=order)
    assert np.array_equal(moved.radius, np.asarray(whole.radius)[order])
    for i in range(4):
        alone = smoothing.certify(KEY, f, IMAGES[i : i + 1], PLAN, index=np.array([i]))
        assert np.array_equal(alone.radius[0], whole.radius[i])
        assert np.array_equal(alone.prediction[0], whole.prediction[i])


def nan_logits(z):
    return linear(z) * jnp.nan


def one_nan_logit(z):
    return jnp.concatenate([linear(z), jnp.full((z.shape[0], 1), jnp.nan)], axis=1)


def hides_nan(z):
    return linear(jnp.nan_to_num(z) + 9.0 * WEIGHT)


@pytest.mark.parametrize("f", [nan_logits, one_nan_logit])
def test_nan_logits_raise_and_abstain_where_traced(f):
    x = at_distances([1.0, -1.0])
    for run in (smoothing.certify, smoothing.predict):
        with pytest.raises(ValueError, match="not all finite, on any draw"):
            run(KEY, f, x, PLAN)
    certificate = jax.jit(lambda x: smoothing.certify(KEY, f, x, PLAN))(x)
    assert np.array_equal(certificate.prediction, [ABSTAIN, ABSTAIN])
    assert np.array_equal(certificate.radius, [0, 0])


def test_draws_whose_logits_are_nan_vote_for_none():
    """They do not keep others from voting, and are not left out of n."""

    def half(z):
        return jnp.where(z[:, :1] > 0, linear(z), jnp.nan)

    x = jnp.zeros((1, 4)).at[0].set(50.0 * WEIGHT).at[0, 0].set(0.0)
    votes = smoothing.count(KEY, half, x, PLAN)
    share = float(votes.estimation.sum()) / PLAN.n
    assert 0.4 < share < 0.6


@pytest.mark.parametrize(("f", "bad"), [(linear, np.nan), (hides_nan, np.nan), (hides_nan, np.inf)])
def test_inputs_that_are_not_finite_abstain_and_spare_the_others(f, bad):
    x = at_distances([2.0, 2.0]).at[0, 1].set(bad)
    certificate = smoothing.certify(KEY, f, x, PLAN)
    assert np.array_equal(certificate.prediction, [ABSTAIN, 1])
    assert float(certificate.radius[0]) == 0.0 < float(certificate.radius[1])
    assert np.array_equal(smoothing.predict(KEY, f, x, PLAN), [ABSTAIN, 1])


def test_integer_images_are_refused():
    with pytest.raises(TypeError, match=r"x\.astype\(jnp\.float32\) / 255"):
        smoothing.certify(KEY, linear, jnp.zeros((2, 4), jnp.uint8), PLAN)


def test_a_missing_batch_axis_is_refused():
    with pytest.raises(ValueError, match=r"write x\[None\]"):
        smoothing.predict(KEY, linear, jnp.zeros(4), PLAN)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (np.arange(3), ValueError, r"\(2,\), got shape \(3,\)"),
        (np.zeros((2, 1), int), ValueError, "one number per image"),
        (np.zeros(2), TypeError, r"type jnp\.arange\(2\)"),
        (np.array([0, -1]), ValueError, r"\[0, 2\^32\)"),
        (np.array([0, 2**32]), ValueError, r"\[0, 2\^32\)"),
    ],
)
def test_a_wrong_index_is_refused(index, error, message):
    with pytest.raises(error, match=message):
        smoothing.certify(KEY, linear, at_distances([1.0, 2.0]), PLAN, index=index)


@pytest.mark.parametrize(
    ("f", "error"),
    [
        (lambda z: z[:, 0], ValueError),
        (lambda z: z[:3], ValueError),
        (lambda z: (z, z), TypeError),
        (lambda z: jnp.argmax(z, axis=1, keepdims=True), TypeError),
        (lambda z: z[:, :1], ValueError),
        ("net", TypeError),
    ],
)
def test_models_that_return_no_logits_are_refused(f, error):
    with pytest.raises(error, match="model must"):
        smoothing.certify(KEY, f, at_distances([1.0]), PLAN)


@pytest.mark.parametrize("key", [0, np.zeros(2, np.uint32), jax.random.split(KEY, 2)])
def test_keys_that_are_not_one_typed_key_are_refused(key):
    with pytest.raises(TypeError, match=r"jax\.random\.key\(0\)"):
        smoothing.certify(key, linear, at_distances([1.0]), PLAN)


def test_a_plan_that_is_none_is_refused():
    with pytest.raises(TypeError, match=r"SmoothingPlan\(noise=Gaussian\(0\.25\)\)"):
        smoothing.certify(KEY, linear, at_distances([1.0]), 0.25)


@pytest.mark.parametrize(
    "numbers",
    [
        {"n": 0},
        {"n": 1e5},
        {"n0": 0},
        {"n0": -3},
        {"chunk": 0},
        {"chunk": True},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"alpha": float("nan")},
        {"n": 2**31 - 100},
    ],
)
def test_impossible_plans_are_refused(numbers):
    with pytest.raises(ValueError, match=next(iter(numbers))):
        SmoothingPlan(noise=Gaussian(0.25), **numbers)


def test_a_noise_that_is_a_number_is_refused():
    with pytest.raises(TypeError, match=r"noise=Gaussian\(0\.25\)"):
        SmoothingPlan(noise=0.25)


@pytest.mark.parametrize(("alpha", "needed"), [(1e-3, 10), (2.0**-10, 11), (0.05, 5), (0.5, 2)])
def test_an_n_too_small_for_alpha_names_the_n_needed(alpha, needed):
    with pytest.raises(ValueError, match=f"take n >= {needed}"):
        SmoothingPlan(noise=Gaussian(0.25), n=needed - 1, alpha=alpha)
    plan = SmoothingPlan(noise=Gaussian(0.25), n0=1, n=needed, alpha=alpha, chunk=4)
    certificate = smoothing.certify(KEY, linear, at_distances([50.0]), plan)
    assert float(certificate.radius[0]) > 0


def test_plans_are_values():
    assert SmoothingPlan(noise=Gaussian(0.5), n0=50, n=1000, alpha=1e-3, chunk=100) == PLAN
    assert len({PLAN, SmoothingPlan(noise=Gaussian(0.5)), SmoothingPlan(noise=Gaussian(1.0))}) == 3
