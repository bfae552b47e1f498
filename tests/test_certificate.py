"""Certificates fail closed and never claim more than was decided; verdicts say why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcert.certificate import (
    ABSTAIN,
    MESSAGES,
    Certificate,
    Reason,
    Status,
    Verdict,
    explain,
    issue,
    predicted_class,
)
from jaxcert.sets import Box


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_issue_fails_closed(wrap):
    radius = jnp.array([0.5, jnp.nan, jnp.inf, -1.0, 0.5, 0.0, -jnp.inf])
    prediction = jnp.array([3, 1, 1, 1, ABSTAIN, 2, 2])
    certificate = wrap(lambda p, r: issue(p, r, norm=2.0))(prediction, radius)
    assert certificate.radius.tolist() == [0.5, 0, 0, 0, 0, 0, 0]
    assert certificate.prediction.tolist() == prediction.tolist()
    assert certificate.prediction.dtype == jnp.int32
    assert (certificate.confidence == 1).all()
    assert certificate.confidence.shape == (7,)


def test_radius_and_confidence_are_rounded_down():
    exact = np.array([0.1, 1 / 3, 1.0, 1e-30, 123.456, 1e-50, 1e300])
    with jax.enable_x64(True):
        radius = jnp.asarray(exact)
    certificate = issue(jnp.zeros(7, int), radius, norm=jnp.inf, confidence=1 - 1e-3)
    got = np.asarray(certificate.radius)
    assert got.dtype == np.float32
    assert (got.astype(np.float64) <= exact).all()
    assert np.allclose(got[:5], exact[:5])
    assert np.isfinite(got).all()
    assert (np.asarray(certificate.confidence, np.float64) <= 0.999).all()
    assert (certificate.confidence > 0.998).all()


def test_certificates_are_pytrees_with_a_static_norm():
    certificate = issue(jnp.array([1]), jnp.array([0.5]), norm=2.0, within=Box(0.0, 1.0))
    leaves = jax.tree.leaves(certificate)
    assert len(leaves) == 5
    again = jax.jit(lambda c: c)(certificate)
    assert isinstance(again, Certificate)
    assert again.norm == 2.0
    assert again.within.upper == 1.0
    batched = jax.vmap(lambda p, r: issue(p[None], r[None], norm=1.0))(
        jnp.array([1, 2]), jnp.array([0.5, jnp.nan])
    )
    assert batched.radius.tolist() == [[0.5], [0.0]]


def test_predicted_class():
    logits = jnp.array(
        [[1.0, 2.0], [2.0, 1.0], [1.0, 1.0], [jnp.nan, 1.0], [1.0, jnp.inf], [1.0, -jnp.inf]]
    )
    assert predicted_class(logits).tolist() == [1, 0, 0, ABSTAIN, ABSTAIN, ABSTAIN]


def test_every_verdict_has_words():
    assert set(MESSAGES) == set(Reason)
    status = jnp.array([Status.VERIFIED, Status.FALSIFIED, *[Status.UNKNOWN] * (len(Reason) - 1)])
    reason = jnp.array([Reason.NONE, Reason.NONE, *list(Reason)[1:]])
    lines = explain(jax.jit(lambda s, r: Verdict(s, r))(status, reason))
    assert lines[0] == "VERIFIED: decided"
    assert lines[1] == "FALSIFIED: decided"
    assert all(line.startswith("UNKNOWN: ") for line in lines[2:])
    assert len(set(lines[2:])) == len(Reason) - 1
    assert "tighter method" in lines[2]


@pytest.mark.parametrize("d", [36, 100, 784])
def test_the_class_survives_fusion_with_the_model(d):
    """XLA may compute logits once for their maximum and again, rounded otherwise, beside it."""

    def f(z):
        return jnp.stack([z.mean(1) - 0.5, 0.5 - z.mean(1)], axis=1)

    x = 1 + 0.05 * jax.random.normal(jax.random.key(0), (1000, d))
    classes = jax.jit(lambda z: predicted_class(f(z)))(x)
    assert np.array_equal(classes, np.zeros(1000))


def test_the_class_of_float64_logits_in_a_float32_program():
    with jax.enable_x64(True):
        logits = jnp.asarray([[0.0, 1.0, 1.0 + 1e-12], [3.0, 3.0, -np.inf], [2.0, 2.0, 1.0]])
        found = jax.jit(predicted_class)(logits)
    assert np.asarray(found).tolist() == [2, ABSTAIN, 0]
