"""Certificates and distances by search, against enumeration."""

import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import least_row
from nets import net, random_weights

from jaxcert import ABSTAIN, LinfBall
from jaxcert.exact import Budget, certify, distance

BUDGET = Budget(seconds=600, domains=20_000)
X = np.float32([[0.3, -0.2], [-0.6, 0.9]])


def least_margin(weights, x, label, eps):
    others = [j for j in range(3) if j != label]
    rows = np.stack([np.eye(3)[label] - np.eye(3)[j] for j in others])
    x = x.astype(np.float64)
    return min(least_row(weights, x - eps, x + eps, row[None], np.zeros(1)) for row in rows)


@pytest.mark.slow
def test_distances_enclose_what_enumeration_finds():
    weights = random_weights(11)
    f = net(weights)
    found = distance(f, jnp.asarray(X), jnp.inf, largest=2.0, tolerance=0.05, budget=BUDGET)
    assert found.prediction.tolist() == np.argmax(f(X), 1).tolist()
    for i, x in enumerate(X):
        label, lower, upper = int(found.prediction[i]), float(found.lower[i]), float(found.upper[i])
        assert lower >= 0.95 * min(upper, 2.0)
        assert least_margin(weights, x, label, lower * (1 - 1e-6)) > 0
        if np.isfinite(upper):
            assert np.max(np.abs(found.example[i] - x)) <= upper
            assert np.argmax(f(found.example[i][None])) != label


@pytest.mark.slow
def test_certificates_are_those_that_enumeration_gives():
    weights = random_weights(11)
    f = net(weights)
    for eps in (0.02, 0.2):
        above = np.float32(eps)
        if float(above) < eps:
            above = np.nextafter(above, np.float32(1.0))
        certificate = certify(f, LinfBall(jnp.asarray(X), eps), budget=BUDGET)
        for i, x in enumerate(X):
            least = least_margin(weights, x, int(certificate.prediction[i]), above)
            assert certificate.radius[i] == (above if least > 0 else 0.0)


def test_no_certificate_without_a_prediction():
    certificate = certify(_undefined, LinfBall(jnp.ones((1, 2)), 0.1), budget=BUDGET)
    assert (certificate.prediction[0], certificate.radius[0]) == (ABSTAIN, 0.0)


def _undefined(x):
    return x - jnp.inf * jnp.array([1.0, 1.0]) * 0.0


def test_a_radius_is_no_larger_than_what_was_proved():
    """The margin is positive below 0.1 only, and the float32 next to 0.1 is larger than that."""
    certificate = certify(_tenth, LinfBall(jnp.zeros((1, 1)), 0.1), budget=BUDGET)
    assert certificate.radius[0] == 0
    certificate = certify(_tenth, LinfBall(jnp.zeros((1, 1)), 0.099), budget=BUDGET)
    assert 0.099 <= certificate.radius[0] < 0.0990001


def _tenth(x):
    """The margin is zero at 0.1 + 1e-9, between the number 0.1 and its float32."""
    return jnp.concatenate([0.1 + 1e-9 - x, 0 * x], 1)
