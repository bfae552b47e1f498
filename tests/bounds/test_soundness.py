"""Bounds hold: every point of the set, found at random, by gradients or as a corner, lies inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS
from oracles import corners, exact, exact_interval_mlp, in_float64, output_size, points_of

from jaxcert.bounds import ibp
from jaxcert.model import as_float64
from jaxcert.sets import Box, L1Ball, L2Ball, LinfBall, bounding_box
from jaxcert.specs import Spec, margins

METHODS = {"ibp": ibp}

EPS = jnp.array([0.0, 0.01, 0.15])  # one example each, so that every case has a set of one point


SETS = {
    "box": lambda x: Box(x - 0.1 * x * (EPS > 0).reshape(-1, *[1] * (x.ndim - 1)), x),
    "linf": lambda x: LinfBall(x, EPS),
    "linf_valid": lambda x: LinfBall(x, EPS, Box(0.0, 1.0)),
    "l2_valid": lambda x: L2Ball(x, 3 * EPS, Box(jnp.zeros_like(x), jnp.ones_like(x))),
    "l1": lambda x: L1Ball(x, 4 * EPS),
}
# Every model meets one set; the small ones meet all, because a method may treat each set its own way.
CASES = [
    ("mlp_relu", "box"), ("mlp_relu", "linf"), ("mlp_relu", "linf_valid"), ("mlp_relu", "l2_valid"),
    ("mlp_relu", "l1"), ("rematted_nnx", "l1"), ("scanned_linen", "l2_valid"),
    ("mlp_activations", "linf"), ("resnet_nnx", "linf_valid"), ("resnet_linen", "box"),
    ("convolutions", "linf"), ("norms", "linf_valid"), ("attention", "linf"),
    ("attention_masked_by_minus_inf", "box"), ("recurrent", "l2_valid"), ("arithmetic", "linf"),
    ("log_probabilities", "l1"), ("per_example", "linf_valid"),
    ("tokens_merged_with_batch", "linf"),
]  # fmt: skip


def test_every_model_and_set_has_a_case():
    assert {model for model, _ in CASES} == set(MODELS)
    assert {region for _, region in CASES} == set(SETS)


def _inputs(shape):
    return jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.9, (3, *shape)), jnp.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("model", "region"), CASES)
def test_points_lie_inside(method, model, region):
    f, shape = MODELS[model]()
    x = _inputs(shape)
    region = SETS[region](x)
    k = output_size(f, x)
    label = np.asarray(margins(jnp.array([0, 1, 1]), k).matrix)
    rng = np.random.default_rng(1)
    matrix = np.concatenate([label, rng.normal(size=(3, 2, k)).astype(np.float32)], axis=1)
    offset = np.concatenate([np.zeros(k - 1), rng.normal(size=2)]).astype(np.float32)
    given = Spec(jnp.asarray(matrix), jnp.asarray(offset))
    bound = METHODS[method]

    @jax.jit
    def bounds(region):
        proof = bound(f, outward=True)
        return proof(region), proof(region, given), bound(f)(region)

    points = points_of(f, region)
    if isinstance(region, Box | LinfBall) and x[0].size <= 8:
        with jax.enable_x64(True):  # corners rounded to float32 could lie outside
            box = bounding_box(as_float64(region))
        points = np.concatenate([points, corners(np.asarray(box.lower), np.asarray(box.upper))])
    m, b = points.shape[:2]
    y = in_float64(f)(points.reshape(m * b, *shape)).reshape(m, b, k)
    logits, spec, fast = bounds(region)
    assert logits.lower.dtype == jnp.float32
    specified = np.einsum("bsk,mbk->mbs", np.asarray(matrix, np.float64), y) + offset
    for box, values in ((logits, y), (spec, specified)):
        low, high = np.asarray(box.lower, np.float64), np.asarray(box.upper, np.float64)
        assert np.isfinite(low).all()
        assert np.isfinite(high).all()
        assert (low <= values).all(), (low - values).max()
        assert (values <= high).all(), (values - high).max()

    # At eps = 0 nothing but rounding separates the ends; a bound of a spec is at least as tight as
    # the spec of the bound.
    size = 1 + np.abs(np.asarray(logits.upper[0]))
    assert (np.asarray(logits.upper[0] - logits.lower[0]) <= 1e-5 * size).all()
    middle = (np.asarray(logits.upper) + np.asarray(logits.lower)) / 2
    radius = (np.asarray(logits.upper) - np.asarray(logits.lower)) / 2
    naive = np.einsum("bsk,bk->bs", matrix, middle) - np.einsum(
        "bsk,bk->bs", np.abs(matrix), radius
    )
    naive += offset
    assert (np.asarray(spec.lower) >= naive - 1e-4 * (1 + np.abs(naive))).all()

    for a, b in ((fast.lower, logits.lower), (fast.upper, logits.upper)):
        scale = 1 + np.abs(np.asarray(b))
        assert (np.abs(np.asarray(a) - np.asarray(b)) <= 2e-4 * scale).all()


@pytest.mark.parametrize("method", METHODS)
def test_against_exact_rational_arithmetic(method):
    f, shape = MODELS["mlp_relu"]()
    x = _inputs(shape)
    eps = np.float32(0.05) * np.array([0, 1, 2], np.float32)
    region = LinfBall(x, jnp.asarray(eps))
    with jax.enable_x64(True):
        bound = METHODS[method](f, outward=True)
        box = jax.jit(bound)(jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), region))
        low, high = exact(box.lower), exact(box.upper)
    layers = [
        (layer.kernel[...], layer.bias[...]) for layer in f.layers if hasattr(layer, "kernel")
    ]
    centre, radius = exact(x), exact(eps)[:, None]
    # The exact value at the centre for every example, and the exact interval bound for the first.
    value, _ = exact_interval_mlp(layers, np.asarray(x), np.asarray(x))
    assert (low <= value).all()
    assert (value <= high).all()
    l, u = exact_interval_mlp(layers, centre - radius, centre + radius)
    assert (low <= l).all()
    assert (u <= high).all()
    width, excess = (u - l).astype(float), ((high - low) - (u - l)).astype(float)
    assert (excess <= 1e-12 * (1 + width)).all()
