"""Losses for smoothing against the papers' formulas in float64 NumPy, on a net of two layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import log_softmax
from scipy.stats import binom, norm

from jaxcert import Box
from jaxcert.smoothing import Gaussian, GridGaussian, Uniform
from jaxcert.training.losses import smoothing as losses
from jaxcert.training.losses import smoothing_adversarial as adversarial
from jaxcert.training.losses.noisy import draws, streams
from jaxcert.training.losses.smoothing_attack import Ascent, smoothed_adversary

B, D, H, K, N, EPS, STEPS = 6, 5, 7, 4, 3, 0.6, 2
NOISE = Gaussian(0.4)
KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
X = RNG.uniform(size=(B, D)).astype(np.float32)
WEIGHTS = [RNG.normal(size=(D, H)).astype(np.float32), RNG.normal(size=(H, K)).astype(np.float32)]
# Logits of thousands, whose softmax is 0 or 1 in floating point.
SATURATED = [WEIGHTS[0], 1e4 * WEIGHTS[1]]
OTHERS = 100  # keys
# Compiles in a fifth of the time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
PIXELS = Box(0.0, 1.0)
INSIDE = Ascent(EPS, STEPS, valid=PIXELS)
FREE = Ascent(EPS, STEPS)


def net(weights, x):
    return jnp.tanh(x @ weights[0]) @ weights[1]


def net64(weights, x):
    first, second = (np.asarray(w, np.float64) for w in weights)
    return np.tanh(x @ first) @ second


Y = net64(WEIGHTS, X).argmax(1)
Y[:2] = (Y[:2] + 1) % K  # two are misclassified
TARGETS = np.exp(log_softmax(RNG.normal(size=(B, K)) + 2 * np.eye(K)[Y], axis=1))
DELTA = np.asarray(draws(streams(KEY)[0], X, NOISE, N), np.float64)
SHARE = np.asarray(jax.random.uniform(streams(KEY)[1], (B,), minval=2.0**-23, maxval=0.5))[:, None]

# --- the formulas, on logits of copies (n, b, k) --------------------------------------------------


def of_labels(values):
    return values[..., np.arange(B), Y]


def cross_entropy(z):
    return -np.mean(of_labels(log_softmax(z, -1)), 0)


def average(z):
    return np.mean(np.exp(log_softmax(z, -1)), 0)


def divergence(p, z):
    return np.sum(p * (np.log(p) - log_softmax(z, -1)), -1)


def stability_formula(weights):
    clean, noisy = net64(weights, X), net64(weights, X + DELTA)
    stays = -np.sum(np.exp(log_softmax(clean, -1)) * log_softmax(noisy, -1), -1)
    return cross_entropy(clean[None]) + 1.5 * stays.mean(0)


def consistency_formula(weights):
    z = net64(weights, X + DELTA)
    p = average(z)
    entropy = -np.sum(p * np.log(p), -1)
    return cross_entropy(z) + 5 * divergence(p, z).mean(0) + 0.7 * entropy


def macer_formula(weights):
    z = net64(weights, X + DELTA)
    found = -np.log(of_labels(average(z)))
    p = average(2 * z)
    for i in range(B):
        second, first = np.sort(p[i])[-2:]
        gap = norm.ppf(first) - norm.ppf(second)
        if p[i].argmax() == Y[i] and gap <= 1.5:
            found[i] += 3 * NOISE.sigma / 2 * (1.5 - gap)
    return found


def adv_formula(weights, worst):
    return cross_entropy(net64(weights, worst + DELTA))


def mix_formula(weights, worst):
    z = net64(weights, X + DELTA)
    mixed = net64(weights, (1 - SHARE) * X + SHARE * worst + DELTA)
    target = (1 - SHARE) * average(z) + SHARE / K
    right = average(z).argmax(-1) == Y
    return cross_entropy(z) + 2 * right * divergence(target, mixed).mean(0)


FORMULAS = {
    "noisy": lambda weights: cross_entropy(net64(weights, X + DELTA)),
    "stability": stability_formula,
    "consistency": consistency_formula,
    "macer": macer_formula,
    "adv": adv_formula,
    "mix": mix_formula,
}
ATTACKED = {"adv", "mix"}


def all_losses(key, weights, y):
    def f(x):
        return net(weights, x)

    common = {"noise": NOISE, "n": N}
    of = (key, f, X, y)
    return {
        "noisy": losses.noisy_cross_entropy(*of, **common),
        "stability": losses.stability(*of, weight=1.5, **common),
        "consistency": losses.consistency(*of, weight=5.0, entropy=0.7, **common),
        "macer": losses.macer(*of, weight=3.0, margin=1.5, beta=2.0, **common),
        "adv": adversarial.smooth_adv(*of, ascent=INSIDE, **common),
        "mix": adversarial.smooth_mix(*of, ascent=INSIDE, weight=2.0, **common),
        "cat_rs": adversarial.cat_rs(*of, targets=TARGETS, ascent=FREE, weight=2.0, **common),
    }


@quick_jit
@jax.vmap
def evaluated(key, weights, y):
    """Losses; gradients of their sums in the weights; the adversaries."""
    values, pull = jax.vjp(lambda weights: all_losses(key, weights, y), weights)
    each = {name: jnp.eye(len(values))[i] for i, name in enumerate(values)}
    (gradients,) = jax.vmap(pull)({name: jnp.tile(e[:, None], B) for name, e in each.items()})
    gradients = {name: [g[i] for g in gradients] for i, name in enumerate(values)}
    worst = smoothed_adversary(
        key, lambda x: net(weights, x), X, y, noise=NOISE, ascent=INSIDE, n=N
    )
    return values, gradients, worst, draws(streams(key)[0], X, NOISE, N)


@pytest.fixture(scope="module")
def found():
    """Cases: 0 ordinary, 1 the same again, 2 saturated, 3 labels that are none, then other keys."""
    keys = jnp.concatenate([jnp.tile(KEY[None], 4), jax.random.split(KEY, OTHERS)])
    weights = [WEIGHTS, WEIGHTS, SATURATED] + [WEIGHTS] * (1 + OTHERS)
    weights = [np.stack(layer) for layer in zip(*weights, strict=True)]
    labels = np.tile(Y, (4 + OTHERS, 1))
    labels[3, 2:4] = -1, K
    return jax.tree.map(np.asarray, evaluated(keys, weights, labels))


def formula(name, weights, worst):
    return FORMULAS[name](weights, worst) if name in ATTACKED else FORMULAS[name](weights)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_is_the_formula_of_its_paper(found, name):
    expected = formula(name, WEIGHTS, found[2][0].astype(np.float64))
    np.testing.assert_allclose(found[0][name][0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_its_gradient_takes_noise_and_adversary_as_constants(found, name):
    worst = found[2][0].astype(np.float64)
    for layer in range(2):
        way = [np.zeros_like(w, np.float64) for w in WEIGHTS]
        way[layer] = np.random.default_rng(layer).normal(size=way[layer].shape)

        def along(t, way=way):
            return formula(
                name, [w + t * v for w, v in zip(WEIGHTS, way, strict=True)], worst
            ).sum()

        slope = (along(1e-5) - along(-1e-5)) / 2e-5
        here = np.sum(found[1][name][layer][0] * way[layer])
        np.testing.assert_allclose(here, slope, rtol=2e-3, atol=2e-3)


def test_the_cases_are_of_both_outcomes():
    p, soft = average(net64(WEIGHTS, X + DELTA)), average(2 * net64(WEIGHTS, X + DELTA))
    assert 1 < np.sum(p.argmax(1) == Y) < B
    second, first = np.sort(soft)[:, -2:].T
    gaps = (norm.ppf(first) - norm.ppf(second))[soft.argmax(1) == Y]
    assert gaps.min() < 1.5 < gaps.max()  # both sides of the hinge


def test_the_same_key_gives_the_same_loss_and_another_one_another(found):
    for values in found[0].values():
        np.testing.assert_array_equal(values[0], values[1])
        assert np.any(values[0] != values[4])


def test_saturated_logits_have_finite_losses_and_gradients(found):
    for name, values in found[0].items():
        assert np.all(np.isfinite(values[2])), name
        assert np.all(values[2] >= -1e-6), name
        for gradient in found[1][name]:
            assert np.all(np.isfinite(gradient[2])), name


def test_a_traced_label_that_is_no_class_has_no_loss(found):
    for name, values in found[0].items():
        np.testing.assert_array_equal(np.isnan(values[3]), [0, 0, 1, 1, 0, 0], err_msg=name)


def test_macer_learns_from_copies_that_all_round_to_probability_one():
    # p_y = 1 - 5e-9 rounds to 1 in float32; the gap is 11.4, within a margin of 12.
    def loss(z):
        f = lambda x: jnp.stack([jnp.full(len(x), z), jnp.zeros(len(x))], 1)  # noqa: E731
        settings = {"noise": NOISE, "n": 2, "beta": 1.0, "weight": 1.0, "margin": 12.0}
        return losses.macer(KEY, f, X[:1], np.array([0]), **settings)[0]

    value, slope = quick_jit(jax.value_and_grad(loss))(19.1)
    tail = 1 / (1 + np.exp(19.1))
    np.testing.assert_allclose(value, NOISE.sigma / 2 * (12 + 2 * norm.ppf(tail)), rtol=1e-4)
    assert -0.2 < slope < -0.01


# --- adversaries ----------------------------------------------------------------------------------


def climb(objective, start, settle):
    """The ascent of `Ascent(EPS, STEPS)` by central differences, one row at a time."""
    z = start.copy()
    for _ in range(STEPS):
        slope = np.zeros_like(z)
        for j in range(z.shape[-1]):
            h = 1e-5 * np.eye(z.shape[-1])[j]
            slope[..., j] = (objective(z + h) - objective(z - h)) / 2e-5
        z = z + 2 * EPS / STEPS * slope / np.linalg.norm(slope, axis=-1, keepdims=True)
        z = settle(z)
    return z


def into_ball(z, start):
    away = z - start
    return start + away * np.minimum(1, EPS / np.linalg.norm(away, axis=-1, keepdims=True))


def average_loss(x):
    return -np.log(of_labels(average(net64(WEIGHTS, x + DELTA))))


def test_the_adversary_climbs_the_loss_of_the_average(found):
    start = X.astype(np.float64)
    expected = climb(average_loss, start, lambda z: into_ball(np.clip(z, 0, 1), start))
    np.testing.assert_allclose(found[2][0], expected, atol=2e-3)


def test_the_adversary_is_in_the_ball_and_in_the_box_and_worse(found):
    for worst in found[2][np.arange(len(found[2])) != 3].astype(np.float64):
        assert np.all((worst >= 0) & (worst <= 1))
        assert np.all(np.linalg.norm(worst - X, axis=1) <= EPS * (1 + 1e-5))
    assert np.all(average_loss(found[2][0]) > average_loss(X))


def test_each_example_can_have_a_radius_and_a_flat_model_moves_nothing():
    eps = jnp.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])

    def run(slope):
        ascent = Ascent(eps, 2, size=eps)  # two steps of its whole length, so that it is projected
        f = lambda x: slope * x[:, :K]  # noqa: E731
        return smoothed_adversary(KEY, f, X, Y, noise=NOISE, ascent=ascent, n=1)

    moved = quick_jit(run)(jnp.array([1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_allclose(np.linalg.norm(moved - X, axis=1), eps, atol=1e-6)
    np.testing.assert_array_equal(quick_jit(run)(jnp.zeros(4)), X)


# --- CAT-RS ---------------------------------------------------------------------------------------


def easiest(z):
    """The loss without its worst case, for each K = 0, ..., n: (n + 1, b)."""
    ordered = np.sort(-of_labels(log_softmax(z, -1)), 0)
    return np.stack([ordered[: max(count, 1)].sum(0) / N for count in range(N + 1)])


def moments(noise):
    return noise.mean(-1, keepdims=True), noise.std(-1, keepdims=True)


def worst_case(delta):
    """The divergence of the worst copy after an ascent that keeps the moments of each draw."""

    def settle(z):
        z = into_ball(z, delta)
        (centre, scale), (own_centre, own_scale) = moments(z), moments(delta)
        return own_centre + own_scale * (z - centre) / scale

    moved = climb(lambda z: divergence(TARGETS, net64(WEIGHTS, X + z)), delta, settle)
    return divergence(TARGETS, net64(WEIGHTS, X + moved)).max(0)


def test_cat_rs_keeps_the_easiest_copies_and_adds_the_worst_if_all_are_kept(found):
    surplus, variance, seen = 0.0, 0.0, set()
    for value, delta in zip(found[0]["cat_rs"][4:], found[3][4:].astype(np.float64), strict=True):
        z = net64(WEIGHTS, X + delta)
        candidates = easiest(z)[1:]  # K = 0 and K = 1 keep the same
        candidates[-1] += 2 * worst_case(delta)
        apart = np.abs(candidates - value)
        assert np.all(apart.min(0) < 5e-3 * np.maximum(value, 1))
        kept = 1 + apart.argmin(0)
        p = (z.argmax(-1) == Y).mean(0)
        assert np.all(kept[p == 1] == N)
        assert np.all(kept[p == 0] == 1)
        chances = binom.pmf(np.arange(N + 1)[:, None], N, p)
        counts = np.maximum(np.arange(N + 1), 1)
        mean, square = counts @ chances, counts**2 @ chances
        surplus, variance = surplus + np.sum(kept - mean), variance + np.sum(square - mean**2)
        seen |= set(kept.tolist())
    assert seen == {1, 2, 3}
    assert abs(surplus) < 4 * np.sqrt(variance)


# --- how the model is called ----------------------------------------------------------------------


def test_the_model_sees_all_copies_in_one_batch():
    calls = []

    def f(x):
        calls.append(len(x))
        return x[:, :K]

    ran = {
        losses.noisy_cross_entropy: N * B,
        losses.stability: (N + 1) * B,
        losses.consistency: N * B,
        losses.macer: N * B,
    }
    for loss, rows in ran.items():
        calls.clear()
        value = jax.eval_shape(lambda loss=loss: loss(KEY, f, X, Y, noise=NOISE, n=N))
        assert calls == [rows]
        assert value.shape == (B,)


def test_draws_are_independent_and_of_the_right_size():
    drawn = quick_jit(lambda key: draws(key, jnp.zeros((50, 8)), NOISE, 40))
    sample = np.asarray(drawn(KEY))
    assert sample.shape == (40, 50, 8)
    assert len(np.unique(sample)) > 0.99 * sample.size
    assert abs(sample.std() / NOISE.sigma - 1) < 0.03  # of 16,000 draws: 5 standard errors
    assert abs(sample.mean()) < 5 * NOISE.sigma / np.sqrt(sample.size)


def test_an_nnx_module_learns():
    model = nnx.Linear(D, K, rngs=nnx.Rngs(0))
    optimiser = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)
    ascent = Ascent(0.1, 1)

    @nnx.jit
    def step(model, optimiser, key):
        def objective(model):
            common = {"noise": Gaussian(0.1), "n": 2}
            worst = adversarial.smooth_adv(key, model, X, Y, ascent=ascent, **common)
            return jnp.mean(worst)

        value, gradient = nnx.value_and_grad(objective)(model)
        optimiser.update(model, gradient)
        return value

    values = [step(model, optimiser, jax.random.key(i)) for i in range(30)]
    assert values[-1] < 0.7 * values[0]


class Normalised(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(D, K, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(K, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.norm(self.layer(x))


@pytest.mark.parametrize(
    "loss", [adversarial.smooth_adv, functools.partial(adversarial.cat_rs, targets=TARGETS)]
)
def test_an_ascent_leaves_running_statistics_to_the_loss(loss):
    model = Normalised()
    before = np.asarray(model.norm.mean[...])

    @nnx.jit
    def step(model):
        def objective(model):
            return jnp.mean(loss(KEY, model, X, Y, noise=Gaussian(0.1), ascent=Ascent(0.1, 1), n=2))

        return nnx.value_and_grad(objective)(model)

    value, _ = step(model)
    assert np.isfinite(value)
    assert not np.array_equal(model.norm.mean[...], before)


# --- errors ---------------------------------------------------------------------------------------


def linear(x):
    return x[:, :K]


def call(loss=losses.noisy_cross_entropy, key=KEY, f=linear, x=X, y=Y, **options):
    return loss(key, f, x, y, **{"noise": NOISE, **options})


def adv(**options):
    return call(adversarial.smooth_adv, **{"ascent": FREE, **options})


def cat(**options):
    return call(adversarial.cat_rs, **{"ascent": FREE, "targets": TARGETS, **options})


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: call(key=jax.random.PRNGKey(0)), "key must be one typed key"),
        (lambda: call(key=X, x=KEY), "key must be one typed key"),
        (lambda: call(noise=0.25), r"type noise=smoothing.Gaussian\(0.25\)"),
        (lambda: call(noise=GridGaussian(0.25)), "to certify with GridGaussian"),
        (lambda: call(n=0), "n must be a positive int"),
        (lambda: call(n=2.0), "n must be a positive int"),
        (lambda: call(x=np.zeros((B, D), int)), "scale it the way the model expects"),
        (lambda: call(x=X[0]), r"write x\[None\]"),
        (lambda: call(y=Y[:2]), "labels must have shape"),
        (lambda: call(y=np.eye(K)[Y]), r"labels.argmax\(-1\)"),
        (lambda: call(y=Y + K), "labels must lie in 0, ..., 3"),
        (lambda: call(f=lambda x: x[:, 0]), "the model must map"),
        (lambda: call(f=lambda x: x[:1]), "the model must map"),
        (lambda: call(losses.stability, weight=-1.0), "weight must be 0 or more"),
        (lambda: call(losses.consistency, n=1), "n must be at least 2"),
        (lambda: call(losses.consistency, entropy=np.ones(2)), "entropy must be a scalar"),
        (lambda: call(losses.macer, beta=0.0), "beta must be above 0"),
        (lambda: call(losses.macer, noise=Uniform(1.0)), "radius of Gaussian noise, got Uniform"),
        (lambda: adv(ascent=0.5), r"type ascent=Ascent\(eps=1.0, steps=10\)"),
        (lambda: adv(ascent=Ascent(0.5, 0)), "steps must be a positive int"),
        (lambda: adv(ascent=Ascent(-0.5)), "eps must be finite and 0 or more"),
        (lambda: adv(ascent=Ascent(np.ones(2))), r"eps must be a scalar or one per example \(6,\)"),
        (lambda: adv(ascent=Ascent(1.0, size=np.inf)), "size must be finite"),
        (lambda: adv(ascent=Ascent(1.0, valid=(0, 1))), r"must be a Box such as Box\(0.0, 1.0\)"),
        (lambda: adv(x=X + 0.5, ascent=INSIDE), "x must lie in ascent.valid"),
        (lambda: cat(ascent=INSIDE), "has no valid range"),
        (lambda: cat(targets=Y), r"write jax.nn.one_hot\(labels, k\)"),
        (lambda: cat(targets=2 * TARGETS), "sum to 1 in each row"),
    ],
)
def test_bad_input_is_told(run, message):
    with pytest.raises((TypeError, ValueError), match=message):
        run()


def test_any_distribution_will_do_where_the_paper_needs_no_gaussian():
    value = call(noise=Uniform(1.0))
    delta = np.asarray(draws(streams(KEY)[0], X, Uniform(1.0), 1), np.float64)
    np.testing.assert_allclose(value, cross_entropy((X + delta)[..., :K]), rtol=1e-5)
