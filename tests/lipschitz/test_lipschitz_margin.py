"""Radii from margins: hand-computed cases, what fails closed, and nets attacked in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcert import lipschitz
from jaxcert.certificate import ABSTAIN

ROWS = np.array([[3.0, 0.0], [0.0, 4.0], [3.0, 1.0]], np.float32)


def test_the_radius_of_the_first_form_is_margin_over_sqrt_two_l():
    logits = jnp.array([[5.0, 1.0, 2.0], [0.0, 0.5, -7.0]])
    cert = lipschitz.margin_certificate(logits, logit_constant=2.0)
    exact = np.array([3.0, 0.5]) / (np.sqrt(2) * 2.0)
    assert cert.prediction.tolist() == [0, 1]
    assert cert.norm == 2.0
    assert cert.within is None
    assert cert.confidence.tolist() == [1.0, 1.0]
    assert np.all(np.asarray(cert.radius, np.float64) < exact)
    np.testing.assert_allclose(cert.radius, exact, rtol=1e-6)


def test_the_radius_of_the_second_form_is_the_least_over_the_classes():
    # Against class 1: 7 / (2 * 5); against class 2: 0.5 / (2 * 1).
    cert = lipschitz.margin_certificate(
        jnp.array([[8.0, 1.0, 7.5]]), backbone_constant=2.0, rows=ROWS
    )
    np.testing.assert_allclose(cert.radius, [0.25], rtol=1e-5)
    assert float(cert.radius[0]) < 0.25
    far = lipschitz.margin_certificate(
        jnp.array([[8.0, 1.0, -9.0]]), backbone_constant=2.0, rows=ROWS
    )
    np.testing.assert_allclose(far.radius, [0.7], rtol=1e-5)


def test_a_constant_per_example_counts_for_its_own_example():
    logits = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    cert = lipschitz.margin_certificate(logits, logit_constant=jnp.array([1.0, 4.0]))
    np.testing.assert_allclose(cert.radius, [1 / np.sqrt(2), 1 / np.sqrt(32)], rtol=1e-5)


def test_a_tie_certifies_nothing_and_keeps_the_prediction():
    logits = jnp.array([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    for options in ({"logit_constant": 1.0}, {"backbone_constant": 1.0, "rows": ROWS}):
        cert = lipschitz.margin_certificate(logits, **options)
        assert cert.radius.tolist() == [0.0, 0.0]
        assert cert.prediction.tolist() == [1, 0]


def test_logits_that_are_not_finite_abstain():
    logits = jnp.array(
        [[1.0, jnp.nan, 0.0], [jnp.inf, 0.0, 0.0], [5.0, 1.0, -jnp.inf], [3.0, 0, 0]]
    )
    certify = functools.partial(lipschitz.margin_certificate, logit_constant=1.0)
    for cert in (certify(logits), jax.jit(certify)(logits)):
        assert cert.prediction.tolist() == [ABSTAIN, ABSTAIN, ABSTAIN, 0]
        assert cert.radius[:3].tolist() == [0.0, 0.0, 0.0]
        assert cert.radius[3] > 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0, -1.0])
def test_bad_constants_raise_and_inside_a_trace_certify_nothing(bad):
    logits = jnp.array([[5.0, 1.0, 2.0]])
    with pytest.raises(ValueError, match="logit_constant must be finite and above 0"):
        lipschitz.margin_certificate(logits, logit_constant=bad)
    with pytest.raises(ValueError, match="backbone_constant must be finite and above 0"):
        lipschitz.margin_certificate(logits, backbone_constant=jnp.array([bad]), rows=ROWS)
    first = jax.jit(lambda c: lipschitz.margin_certificate(logits, logit_constant=c))
    second = jax.jit(lambda c: lipschitz.margin_certificate(logits, backbone_constant=c, rows=ROWS))
    for certify in (first, second):
        assert certify(bad).radius.tolist() == [0.0]
        assert certify(1.0).radius[0] > 0.5
        assert certify(bad).prediction.tolist() == [0]


def test_a_class_with_the_row_of_the_prediction_limits_nothing():
    rows = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], np.float32)
    logits = jnp.array([[3.0, 2.0, 1.0]])
    cert = lipschitz.margin_certificate(logits, backbone_constant=1.0, rows=rows)
    np.testing.assert_allclose(cert.radius, [2.0], rtol=1e-5)


def test_a_radius_that_nothing_limits_is_not_issued():
    cert = lipschitz.margin_certificate(jnp.array([[3.0]]), logit_constant=1.0)
    assert cert.radius.tolist() == [0.0]


def test_rows_that_are_not_finite_certify_nothing():
    rows = jnp.asarray(ROWS).at[0, 0].set(jnp.nan)
    cert = lipschitz.margin_certificate(
        jnp.array([[8.0, 1.0, 2.0], [1.0, 9.0, 1.0]]), backbone_constant=1.0, rows=rows
    )
    assert cert.radius.tolist() == [0.0, 0.0]


def test_logit_error_is_taken_off_the_margin():
    logits = jnp.array([[5.0, 1.0], [2.0, 0.0]])

    def radius(error):
        cert = lipschitz.margin_certificate(logits, logit_constant=1.0, logit_error=error)
        return cert.radius * np.sqrt(2)

    np.testing.assert_allclose(radius(0.5), [3.0, 1.0], rtol=1e-5)
    np.testing.assert_allclose(radius(np.array([0.5, 0.25])), [3.0, 1.5], rtol=1e-5)
    np.testing.assert_allclose(radius(jnp.array([[1.0, 0], [0.0, 0.5]])), [3.0, 1.5], rtol=1e-5)
    np.testing.assert_allclose(radius(2.0), [0.0, 0.0])
    for bad in (-1.0, np.nan):
        with pytest.raises(ValueError, match="logit_error must be >= 0"):
            radius(bad)
        assert jax.jit(radius)(bad).tolist() == [0.0, 0.0]


def test_by_default_logits_count_as_rounded_once():
    logits = jnp.array([[np.nextafter(np.float32(1), np.float32(2)), 1.0]], jnp.float32)
    # Apart by one unit in the last place, so the exact logits may be in either order.
    assert lipschitz.margin_certificate(logits, logit_constant=1.0).radius.tolist() == [0.0]
    cert = lipschitz.margin_certificate(logits, logit_constant=1.0, logit_error=0.0)
    np.testing.assert_allclose(cert.radius, [2.0**-23 / np.sqrt(2)], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "got none"),
        ({"rows": ROWS}, "got rows"),
        ({"backbone_constant": 1.0}, "got backbone_constant"),
        ({"logit_constant": 1.0, "rows": ROWS}, "got logit_constant and rows"),
        ({"logit_constant": 1.0, "backbone_constant": 1.0, "rows": ROWS}, "exactly|either"),
    ],
)
def test_exactly_one_form_is_wanted(options, words):
    with pytest.raises(TypeError, match=words):
        lipschitz.margin_certificate(jnp.zeros((2, 3)), **options)


@pytest.mark.parametrize(
    ("logits", "options", "error", "words"),
    [
        (jnp.zeros(3), {}, ValueError, r"logits\[None\]"),
        (jnp.zeros((2, 3), int), {}, TypeError, "int32"),
        (jnp.zeros((2, 3)), {"logit_constant": jnp.ones(3)}, ValueError, "one per example"),
        (jnp.zeros((2, 3)), {"logit_error": jnp.ones(3)}, ValueError, "logit_error"),
    ],
)
def test_shapes_and_dtypes_are_checked(logits, options, error, words):
    with pytest.raises(error, match=words):
        lipschitz.margin_certificate(logits, **{"logit_constant": 1.0, **options})


def test_a_flax_kernel_in_place_of_rows_is_told_to_be_transposed():
    with pytest.raises(ValueError, match=r"kernel\.T"):
        lipschitz.margin_certificate(jnp.zeros((2, 3)), backbone_constant=1.0, rows=ROWS.T)


def test_the_certificate_is_the_same_under_jit_and_vmap():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.float32)
    constants = jnp.array([0.5, 3.0])

    def certify(z, c):
        return lipschitz.margin_certificate(z, backbone_constant=c, rows=ROWS)

    each = [certify(z, c) for z, c in zip(logits, constants, strict=True)]
    for mapped in (jax.vmap(certify), jax.jit(jax.vmap(jax.jit(certify)))):
        cert = mapped(logits, constants)
        assert cert.radius.dtype == jnp.float32
        for i, alone in enumerate(each):
            np.testing.assert_array_equal(cert.prediction[i], alone.prediction)
            np.testing.assert_allclose(cert.radius[i], alone.radius, rtol=1e-6)


def test_in_float64_the_certificate_is_in_float64():
    with jax.enable_x64(True):
        cert = lipschitz.margin_certificate(jnp.array([[1.0, 0.0]]), logit_constant=1.0)
        assert cert.radius.dtype == jnp.float64
        assert 1 - 1e-14 < float(cert.radius[0]) * np.sqrt(2) < 1


# --- attacks on random nets -----------------------------------------------------------------------


def random_net(rng, width, k):
    """abs(W1 x + b1) W2 + b2 in float64 numpy, and its backbone constant by an SVD."""
    first, second = rng.normal(size=(width, 3)), rng.normal(size=(k, width))
    first /= np.linalg.norm(first, 2) * rng.uniform(0.2, 1.0)
    biases = rng.normal(size=width), rng.normal(size=k)

    def net(x):
        return np.abs(x @ first.T + biases[0]) @ second.T + biases[1]

    def gradient(x, i, j):  # of logit i minus logit j
        hidden = x @ first.T + biases[0]
        return (np.sign(hidden) * (second[i] - second[j])) @ first

    return net, gradient, np.linalg.norm(first, 2), second


@given(st.integers(0, 2**31), st.integers(2, 5))
def test_nothing_inside_of_the_radius_changes_the_prediction(seed, k):
    rng = np.random.default_rng(seed)
    net, gradient, backbone, rows = random_net(rng, 6, k)
    x = 3 * rng.normal(size=(8, 3))
    constant = backbone * np.linalg.norm(rows, 2)
    slack = 1 + 1e-12
    wide = lipschitz.margin_certificate(
        net(x), backbone_constant=backbone * slack, rows=rows, logit_error=1e-12
    )
    plain = lipschitz.margin_certificate(net(x), logit_constant=constant * slack, logit_error=1e-12)
    assert np.all(wide.radius >= plain.radius)
    assert np.any(np.asarray(plain.radius) > 0)
    for i, point in enumerate(x):
        y, radius = int(wide.prediction[i]), float(wide.radius[i])
        assert y == np.argmax(net(point))
        directions = [*rng.normal(size=(30, 3)), *(gradient(point, j, y) for j in range(k))]
        for direction in directions:
            size = np.linalg.norm(direction)
            if size == 0:  # class y against itself
                continue
            step = radius * (1 - 1e-15) * direction / size
            assert np.argmax(net(point + step)) == y


def test_the_radius_is_tight_for_a_linear_net():
    rng = np.random.default_rng(3)
    rows, x = rng.normal(size=(4, 5)), rng.normal(size=(1, 5))
    cert = lipschitz.margin_certificate(x @ rows.T, backbone_constant=1.0, rows=rows)
    y = int(cert.prediction[0])
    flips = []
    for j in set(range(4)) - {y}:
        normal = rows[j] - rows[y]
        step = 1.001 * float(cert.radius[0]) * normal / np.linalg.norm(normal)
        flips.append(np.argmax((x + step) @ rows.T) != y)
    assert any(flips)
