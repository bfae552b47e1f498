"""Losses against the papers' formulas in NumPy, their gradients against differences of those."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcert.training import losses

B, K, EPS = 6, 4, 0.5
KERNEL = np.random.default_rng(0).normal(size=(3, K))
CONSTANTS = 1.5 * np.linalg.norm(KERNEL[:, :, None] - KERNEL[:, None, :], axis=0)
LABELS = np.array([0, 1, 2, 3, 1, 0])
# Of both outcomes, with margins on both sides of what a radius of EPS costs.
ORDINARY = np.random.default_rng(1).normal(size=(B, K)) * 2 + 3 * np.eye(K)[LABELS]
EXTREME = np.array(
    [
        [1e4, -1e4, 0.0, 0.0],
        [1e4, -1e4, 0.0, 1e4],
        [0.0, 0.0, 0.0, 0.0],
        [-1e4, -1e4, -1e4, -1e4],
        [2.0, 2.0, 1.0, 2.0],
        [1e4, 1e4, 1e4, -1e4],
    ]
)

# --- the formulas, one example at a time ----------------------------------------------------------


def cross_entropy(z, y):
    return np.log(np.sum(np.exp(z - z.max()))) - (z[y] - z.max())


def offset_formula(z, y, offset=0.8, temperature=0.25):
    return temperature * cross_entropy((z - offset * np.eye(K)[y]) / temperature, y)


def annealing_formula(z, y, offset=2.0, temperature=0.75, beta=5.0):
    loss = cross_entropy((z - offset * np.eye(K)[y]) / temperature, y)
    return temperature * (1 - np.exp(-loss)) ** beta * loss


def hkr_formula(z, y, margin=1.2, alpha=0.7):
    frequencies = np.bincount(LABELS, minlength=K) / B
    total = 0.0
    for j in range(K):
        sign, weight = (1, K - 1) if j == y else (-1, 1)
        share = frequencies[j] if j == y else 1 - frequencies[j]
        hinge = weight * max(0.0, margin / 2 - sign * z[j])
        total += alpha * hinge - (1 - alpha) * sign * z[j] / share
    return total / K


def regularised_formula(z, y, gamma=0.3):
    radius = min((z[y] - z[j]) / CONSTANTS[y, j] for j in range(K) if j != y)
    return cross_entropy(z, y) - gamma * max(0.0, radius)


def with_bottom(z):
    p = np.argmax(z)
    bottom = max(z[j] + EPS * CONSTANTS[p, j] for j in range(K) if j != p)
    return np.append(z, bottom)


def gloro_formula(z, y):
    return cross_entropy(with_bottom(z), y)


def trades_formula(z, y, weight=1.5):
    p, q = (np.exp(v) / np.sum(np.exp(v)) for v in (z, with_bottom(z)))
    return cross_entropy(z, y) + weight * np.sum(p * np.log(p / q[:K]))


def emma_formula(z, y, detached=None):
    radii = np.zeros(K)
    for j in range(K):
        base = z if detached is None else detached
        if j != y:
            radii[j] = np.clip((base[y] - base[j]) / CONSTANTS[y, j], 0.01 * EPS, EPS)
    return cross_entropy(z + radii * CONSTANTS[y], y)


FORMULAS = {
    "offset": offset_formula,
    "annealing": annealing_formula,
    "hkr": hkr_formula,
    "regularised": regularised_formula,
    "gloro": gloro_formula,
    "trades": trades_formula,
    "emma": emma_formula,
}


def of_pairs(loss, **options):
    return lambda z, y, constants: loss(z, y, pair_constants=constants, **options)


LOSSES = {
    "offset": lambda z, y, _: losses.offset_cross_entropy(z, y, offset=0.8, temperature=0.25),
    "annealing": lambda z, y, _: losses.logit_annealing(z, y),
    "hkr": lambda z, y, _: losses.hinge_kantorovich_rubinstein(z, y, margin=1.2, alpha=0.7),
    "regularised": of_pairs(losses.certificate_regularisation, gamma=0.3),
    "gloro": of_pairs(losses.gloro, eps=EPS),
    "trades": of_pairs(losses.gloro_trades, eps=EPS, weight=1.5),
    "emma": of_pairs(losses.emma, eps=EPS),
}


def all_losses(z, y, constants):
    """Losses, and the gradients of their sums by logits and by constants."""

    def summed(z, constants, loss):
        values = loss(z, y, constants)
        return jnp.sum(values), values

    differentiate = jax.grad(summed, argnums=(0, 1), has_aux=True)
    return {name: differentiate(z, constants, loss) for name, loss in LOSSES.items()}


@pytest.fixture(scope="module")
def computed():
    """One program for all of it, mapped over logits; the last labels are no classes in part."""
    z = jnp.asarray(np.stack([ORDINARY, EXTREME, ORDINARY]), jnp.float32)
    labels = np.stack([LABELS, LABELS, [0, 1, -1, K, 1, 0]])
    run = jax.jit(jax.vmap(all_losses, in_axes=(0, 0, None)))
    found = jax.tree.map(np.asarray, run(z, labels, jnp.asarray(CONSTANTS, jnp.float32)))
    gradients = {name: gradient for name, (gradient, _) in found.items()}
    return {name: values for name, (_, values) in found.items()}, gradients


@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_is_the_formula_of_its_paper(computed, name):
    expected = [FORMULAS[name](z, y) for z, y in zip(ORDINARY, LABELS, strict=True)]
    np.testing.assert_allclose(computed[0][name][0], expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_its_gradient_is_that_of_the_formula(computed, name):
    step, gradient = 1e-5, np.zeros((B, K))
    for (i, j), _ in np.ndenumerate(gradient):
        formula, y, move = FORMULAS[name], LABELS[i], step * np.eye(K)[j]
        detached = {"detached": ORDINARY[i]} if name == "emma" else {}
        ahead, behind = (formula(ORDINARY[i] + d, y, **detached) for d in (move, -move))
        gradient[i, j] = (ahead - behind) / (2 * step)
    np.testing.assert_allclose(computed[1][name][0][0], gradient, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_large_logits_and_ties_have_finite_losses_and_gradients(computed, name):
    values, gradients = computed
    assert np.all(np.isfinite(values[name][1]))
    for gradient in gradients[name]:
        assert np.all(np.isfinite(gradient[:2]))


@pytest.mark.parametrize("name", FORMULAS)
def test_a_traced_label_that_is_no_class_makes_its_own_loss_nan(computed, name):
    found = np.isnan(computed[0][name][2]).tolist()
    assert found == [False, False, True, True, False, False]


@pytest.mark.parametrize("name", ["gloro", "trades", "emma", "regularised"])
def test_losses_with_constants_push_them_down(computed, name):
    by_constants = computed[1][name][1][0]
    assert np.all(by_constants >= 0)
    assert np.any(by_constants > 0)


# --- what they do ---------------------------------------------------------------------------------

# Few shapes: each operation outside of jit is compiled once per shape.
Z = jnp.asarray(ORDINARY, jnp.float32)


def padded(rows, fill=-1e4):
    """Rows of fewer classes or examples as (B, K) logits that change nothing."""
    z = np.full((B, K), fill, np.float32)
    z[: len(rows), : len(rows[0])] = rows
    return jnp.asarray(z)


def test_without_handicap_they_are_the_cross_entropy_of_optax():
    plain = optax.softmax_cross_entropy_with_integer_labels(Z, LABELS)
    for found in (
        losses.offset_cross_entropy(Z, LABELS, offset=0.0, temperature=1.0),
        losses.logit_annealing(Z, LABELS, offset=0.0, temperature=1.0, beta=0.0),
        losses.certificate_regularisation(Z, LABELS, gamma=0.0, pair_constants=CONSTANTS),
        losses.gloro_trades(Z, LABELS, eps=EPS, pair_constants=CONSTANTS, weight=0.0),
        losses.emma(Z, LABELS, eps=0.0, pair_constants=CONSTANTS),
    ):
        np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-6)
    tau = optax.softmax_cross_entropy_with_integer_labels(8.0 * Z, LABELS) / 8.0
    found = losses.offset_cross_entropy(Z, LABELS, offset=0.0, temperature=1 / 8.0)
    np.testing.assert_allclose(found, tau, rtol=1e-5, atol=1e-6)


def test_gloro_without_constants_adds_the_second_largest_logit_as_a_class():
    second = np.sort(ORDINARY, axis=1)[:, -2]
    expected = [
        cross_entropy(np.append(z, s), y) for z, s, y in zip(ORDINARY, second, LABELS, strict=True)
    ]
    found = losses.gloro(Z, LABELS, eps=EPS, pair_constants=0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_gloro_certifies_no_tie():
    # Both classes at 1: the further class is level even at eps 0, so that the label has a third.
    tie = padded([[1.0, 1.0], [1.0, 1.0]])
    found = losses.gloro(tie, np.array([0, 1, 2, 3, 1, 0]), eps=0.0, pair_constants=1.0)
    np.testing.assert_allclose(found[:2], np.log(3), rtol=1e-6)


def test_emma_raises_rivals_no_further_than_level_and_what_leads_only_little():
    z = padded([[3.0, -9.0, 2.5], [0.0, 1.0, 0.0]])
    eps = jnp.array([0.5, 1.0, 0.0, 0.0, 0.0, 0.0])
    found = losses.emma_logits(z, np.zeros(B, int), eps=eps, pair_constants=2.0)
    np.testing.assert_allclose(
        found[:2, :3], [[3.0, -8.0, 3.0], [0.0, 1.02, 0.02]], rtol=1e-6, atol=1e-6
    )


def test_annealing_fades_faster_than_the_cross_entropy():
    z, y = padded([[0.0, 0.0], [5.0, 0.0], [10.0, 0.0], [40.0, 0.0]]), np.zeros(B, int)
    annealed = np.asarray(losses.logit_annealing(z, y))
    plain = np.asarray(losses.offset_cross_entropy(z, y, offset=2.0, temperature=0.75))
    assert np.all(plain[:4] > 0)  # at a margin of 40 too, where 1 - p rounds to 0
    ratio = annealed[:4] / plain[:4]
    assert ratio[0] > 0.5 > 1e-3 > ratio[1] > ratio[2] > ratio[3]


def test_the_transport_term_is_how_far_a_class_is_from_the_rest():
    inside = np.eye(K, dtype=bool)[LABELS]
    apart = [z[of].mean() - z[~of].mean() for z, of in zip(ORDINARY.T, inside.T, strict=True)]
    only = {"margin": 1.0, "alpha": 0.0}
    found = losses.hinge_kantorovich_rubinstein(Z, LABELS, **only)
    np.testing.assert_allclose(np.mean(found), -np.mean(apart), rtol=1e-5)
    shares = inside.mean(axis=0)
    given = losses.hinge_kantorovich_rubinstein(Z, LABELS, class_frequencies=shares, **only)
    np.testing.assert_allclose(given, found, rtol=1e-5)


def test_a_batch_of_one_class_has_a_finite_hkr_loss():
    z, y = padded([[0.6]] * B, fill=-0.6), np.zeros(B, int)
    found = losses.hinge_kantorovich_rubinstein(z, y, margin=1.0, alpha=1.0)
    assert found.tolist() == [0.0] * B
    found = losses.hinge_kantorovich_rubinstein(z, y, margin=1.0, alpha=0.0)
    np.testing.assert_allclose(found, -(0.6 + 3 * 0.6) / K, rtol=1e-6)


def test_classes_of_the_same_row_limit_no_radius():
    z, y = padded([[2.0, 0.0, 2.0]] * B), np.zeros(B, int)
    plain = optax.softmax_cross_entropy_with_integer_labels(z, y)
    constants = np.array([[0.0, 4.0, 0.0, 1.0]] * K)
    found = losses.certificate_regularisation(z, y, gamma=0.5, pair_constants=constants)
    np.testing.assert_allclose(found, plain - 0.5 * 2.0 / 4.0, rtol=1e-6)
    found = losses.certificate_regularisation(z, y, gamma=0.5, pair_constants=0.0)
    np.testing.assert_allclose(found, plain, rtol=1e-6)


@pytest.mark.parametrize("name", ["gloro", "emma"])
def test_constants_come_in_three_shapes(name):
    classes = np.argmax(ORDINARY, axis=1) if name == "gloro" else LABELS
    loss = getattr(losses, name)
    for one, same in (
        (CONSTANTS, CONSTANTS[classes][:, None, :]),
        (2.0, np.where(np.eye(K) > 0, 9.0, 2.0)),  # no class is a rival of itself
    ):
        found = loss(Z, LABELS, eps=EPS, pair_constants=one)
        expected = loss(Z, LABELS, eps=EPS, pair_constants=same)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_pair_constants_are_distances_of_columns_with_finite_gradients():
    kernel = jnp.asarray(KERNEL, jnp.float32)
    np.testing.assert_allclose(losses.pair_constants(kernel, 1.5), CONSTANTS, rtol=1e-5)
    # Columns 0 and 1 are equal; the sum counts both of them twice against column 2.
    equal, along = jnp.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]]), np.array([1.0, 2.0]) / np.sqrt(5)
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(losses.pair_constants(w, 1.5))))(equal)
    np.testing.assert_allclose(gradient.T, np.outer([3.0, 3.0, -6.0], along), rtol=1e-6)


def test_labels_may_be_narrow_integers():
    z = np.zeros((1, 200), np.float32)
    loss = jax.jit(lambda y: losses.offset_cross_entropy(z, y, offset=0.0, temperature=1.0))
    np.testing.assert_allclose(loss(np.array([150], np.uint8)), np.log(200), rtol=1e-6)


# --- errors ---------------------------------------------------------------------------------------

Z0, Y = np.zeros((2, 3), np.float32), np.array([0, 2])
OFFSET = {"offset": 1.0, "temperature": 0.25}
PAIRS = {"eps": 0.5, "pair_constants": 1.0}
ERRORS = {
    "one example": ("offset_cross_entropy", Z0[0], Y, OFFSET, ValueError, r"logits\[None\]"),
    "one class": ("offset_cross_entropy", Z0[:, :1], Y, OFFSET, ValueError, "k >= 2"),
    "integer logits": ("emma", Z0.astype(int), Y, PAIRS, TypeError, "floating point.*int64"),
    "a list": ("emma", [[0.0, 1.0]], Y, PAIRS, TypeError, "floating point.*got list"),
    "one-hot": ("gloro", Z0, np.eye(3)[Y], PAIRS, TypeError, r"argmax\(-1\)"),
    "one-hot integers": ("gloro", Z0, np.eye(3, dtype=int)[Y], PAIRS, ValueError, r"argmax\(-1\)"),
    "label": ("gloro", Z0, np.array([0, 3]), PAIRS, ValueError, "0, ..., 2 .* 0 to 3"),
    "ignored label": ("emma", Z0, np.array([0, -1]), PAIRS, ValueError, "got -1 to 0"),
    "temperature": (
        "logit_annealing", Z0, Y, {"temperature": 0.0}, ValueError, "temperature must be above 0",
    ),
    "temperatures": (
        "logit_annealing", Z0, Y, {"temperature": np.ones(2)}, ValueError, "temperature .* scalar",
    ),
    "beta": ("logit_annealing", Z0, Y, {"beta": -1.0}, ValueError, "beta must be 0 or more"),
    "offset": (
        "offset_cross_entropy", Z0, Y, OFFSET | {"offset": np.ones(3)}, ValueError,
        r"offset .* one per example \(2,\), got shape \(3,\)",
    ),
    "nan offset": (
        "offset_cross_entropy", Z0, Y, OFFSET | {"offset": np.nan}, ValueError, "offset .* finite",
    ),
    "eps": ("emma", Z0, Y, PAIRS | {"eps": -1.0}, ValueError, "eps must be finite and at least 0"),
    "least": ("emma", Z0, Y, PAIRS | {"least": 2.0}, ValueError, r"least must be in \[0, 1\]"),
    "rows": (
        "gloro", Z0, Y, PAIRS | {"pair_constants": np.ones((2, 3))}, ValueError,
        r"got shape \(2, 3\); write constants\[:, None, :\]",
    ),
    "constants": (
        "gloro", Z0, Y, PAIRS | {"pair_constants": np.ones(3)}, ValueError, r"\(3, 3\) or \(b, 1",
    ),
    "negative": (
        "gloro", Z0, Y, PAIRS | {"pair_constants": -1.0}, ValueError, "finite and 0 or more",
    ),
    "alpha": (
        "hinge_kantorovich_rubinstein", Z0, Y, {"margin": 1.0, "alpha": 9.0}, ValueError,
        r"alpha must be in \[0, 1\], got 9",
    ),
    "frequencies": (
        "hinge_kantorovich_rubinstein", Z0, Y,
        {"margin": 1.0, "alpha": 0.5, "class_frequencies": np.array([0.0, 0.5, 0.5])},
        ValueError, "strictly between 0 and 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_was_wanted(case):
    name, logits, labels, options, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        getattr(losses, name)(logits, labels, **options)


def test_a_kernel_that_is_none():
    with pytest.raises(ValueError, match=r"\(d, k\), got \(3,\)"):
        losses.pair_constants(np.zeros(3, np.float32), 1.0)
    with pytest.raises(TypeError, match="floating point"):
        losses.pair_constants(np.zeros((3, 2), int), 1.0)
