"""Bounds hold: every point of a set, found at random, by gradients or as a corner, lies inside."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS
from oracles import corners, exact, exact_interval_mlp, in_float64, output_size, points_of

from jaxcert.bounds import alpha_crown, crown, crown_ibp, forward_linear, ibp
from jaxcert.model import as_float64
from jaxcert.sets import Box, L1Ball, L2Ball, LinfBall, bounding_box
from jaxcert.specs import Spec, margins

METHODS = {
    "ibp": ibp,
    "crown_ibp": crown_ibp,
    "crown": crown,
    "alpha_crown": functools.partial(alpha_crown, steps=2),
    "forward_linear": forward_linear,
}

EPS = jnp.array([0.0, 0.01, 0.15])  # one example each, so that every case has a set of one point


SETS = {
    "box": lambda x: Box(x - 0.1 * x * (EPS > 0).reshape(-1, *[1] * (x.ndim - 1)), x),
    "linf": lambda x: LinfBall(x, EPS),
    "linf_valid": lambda x: LinfBall(x, EPS, Box(0.0, 1.0)),
    "l2_valid": lambda x: L2Ball(x, 3 * EPS, Box(jnp.zeros_like(x), jnp.ones_like(x))),
    "l1": lambda x: L1Ball(x, 4 * EPS),
}
# Every model meets one set; the smallest meets all, because a method may treat each its own way.
CASES = [
    ("mlp_relu", "box"), ("mlp_relu", "linf"), ("mlp_relu", "linf_valid"), ("mlp_relu", "l2_valid"),
    ("mlp_relu", "l1"), ("rematted_nnx", "l1"), ("scanned_linen", "l2_valid"),
    ("mlp_activations", "linf"), ("resnet_nnx", "linf_valid"), ("resnet_linen", "box"),
    ("convolutions", "linf"), ("norms", "linf_valid"), ("attention", "linf"),
    ("attention_masked_by_minus_inf", "box"), ("recurrent", "l2_valid"), ("arithmetic", "linf"),
    ("log_probabilities", "l1"), ("per_example", "linf_valid"),
    ("tokens_merged_with_batch", "linf"),
]  # fmt: skip

# Cases bounded through a spec, margins and random rows, which is folded into the last layers.
WITH_SPEC = {case for i, case in enumerate(CASES) if i % 2} | {("attention", "linf")}

# The linear methods compile for seconds where `ibp` takes a tenth of one, and for a minute on nets
# with normalisation or attention as a proof, so each meets the cases that are most unlike. Lines
# around functions of one operand are in test_relaxations, planes in test_linear.
LINEAR_CASES = {
    "crown_ibp": [("mlp_relu", "linf_valid"), ("resnet_linen", "box")],
    "crown": [
        ("mlp_relu", "box"), ("mlp_relu", "linf"), ("mlp_relu", "l2_valid"), ("rematted_nnx", "l1"),
    ],
    "alpha_crown": [("mlp_relu", "linf_valid")],
    "forward_linear": [("mlp_relu", "linf"), ("rematted_nnx", "l1")],
}  # fmt: skip
# As fast bounds only, whose compilation is quicker.
NOT_AS_A_PROOF = {
    ("crown", "resnet_nnx", "linf_valid"),
    ("crown_ibp", "convolutions", "linf"),
    ("crown_ibp", "tokens_merged_with_batch", "linf"),
}


SLOW = pytest.mark.slow
OTHERS_RUN = {
    ("resnet_linen", "box"), ("mlp_relu", "l2_valid"), ("mlp_relu", "box"), ("rematted_nnx", "l1"),
}  # fmt: skip
LARGE = {
    "resnet_nnx", "resnet_linen", "attention", "attention_masked_by_minus_inf", "recurrent",
    "convolutions", "arithmetic", "log_probabilities", "tokens_merged_with_batch",
    "mlp_activations", "norms",
}  # fmt: skip


def test_every_model_and_set_has_a_case():
    assert {model for model, _ in CASES} == set(MODELS)
    assert {region for _, region in CASES} == set(SETS)


def _inputs(shape):
    return jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.9, (3, *shape)), jnp.float32)


@pytest.mark.parametrize(
    ("method", "model", "name"),
    [
        *(pytest.param("ibp", *case, marks=SLOW if case[0] in LARGE else ()) for case in CASES),
        *(
            pytest.param(method, *case, marks=SLOW if case in OTHERS_RUN else ())
            for method, cases in LINEAR_CASES.items()
            for case in cases
        ),
        *(pytest.param(*case, marks=SLOW) for case in sorted(NOT_AS_A_PROOF)),
    ],
)
def test_points_lie_inside(method, model, name):
    f, shape = MODELS[model]()
    x = _inputs(shape)
    region = SETS[name](x)
    k = output_size(f, x)
    label = np.asarray(margins(jnp.array([0, 1, 1]), k).matrix)
    rng = np.random.default_rng(1)
    matrix = np.concatenate([label, rng.normal(size=(3, 2, k)).astype(np.float32)], axis=1)
    offset = np.concatenate([np.zeros(k - 1), rng.normal(size=2)]).astype(np.float32)
    spec = Spec(jnp.asarray(matrix), jnp.asarray(offset)) if (model, name) in WITH_SPEC else None
    bound = METHODS[method]
    proves = (method, model, name) not in NOT_AS_A_PROOF

    @jax.jit
    def bounds(region):
        fast = bound(f)(region, spec)
        return bound(f, outward=True)(region, spec) if proves else fast, fast

    points = points_of(f, region)
    if isinstance(region, Box | LinfBall) and x[0].size <= 8:
        with jax.enable_x64(True):  # corners rounded to float32 could lie outside
            box = bounding_box(as_float64(region))
        points = np.concatenate([points, corners(np.asarray(box.lower), np.asarray(box.upper))])
    m, b = points.shape[:2]
    y = in_float64(f)(points.reshape(m * b, *shape)).reshape(m, b, k)
    if spec is not None:
        y = np.einsum("bsk,mbk->mbs", np.asarray(matrix, np.float64), y) + offset
    proof, fast = bounds(region)
    assert proof.lower.dtype == jnp.float32
    low, high = np.asarray(proof.lower, np.float64), np.asarray(proof.upper, np.float64)
    assert np.isfinite(low).all()
    assert np.isfinite(high).all()
    slack = 0 if proves else 1e-5 * (1 + np.abs(y))
    assert (low <= y + slack).all(), (low - y).max()
    assert (y - slack <= high).all(), (y - high).max()

    # At eps = 0 nothing but rounding separates the ends.
    assert (high[0] - low[0] <= 1e-5 * (1 + np.abs(high[0]))).all()
    # The float32 bounds are the proved ones up to float32 rounding; where a linear method chooses
    # between two lines, rounding can make it choose another, of nearly the same area.
    choice = 0 if method == "ibp" else 0.05 * (high - low)
    for one, other in ((fast.lower, low), (fast.upper, high)):
        assert (np.abs(one - other) <= 2e-4 * (1 + np.abs(other)) + choice).all()


@pytest.mark.parametrize("method", ["ibp", "crown_ibp", "crown"])
def test_a_spec_is_at_least_as_tight_as_the_spec_of_the_bounds(method):
    f, shape = MODELS["mlp_relu"]()
    region = LinfBall(_inputs(shape), EPS)
    matrix = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    spec = Spec(jnp.asarray(matrix), 0.3)
    for outward in (False, True):
        bound = METHODS[method](f, outward=outward)
        box, given = jax.jit(lambda r, bound=bound: (bound(r), bound(r, spec)))(region)
        middle, radius = (box.upper + box.lower) / 2, (box.upper - box.lower) / 2
        naive = np.asarray(middle @ matrix.T + 0.3 - radius @ np.abs(matrix).T)
        assert (np.asarray(given.lower) >= naive - 1e-5).all()
        assert (np.asarray(given.lower)[2] > naive[2] + 1e-3).any()


def test_intervals_against_exact_rational_arithmetic():
    """The linear methods' proofs meet exact rationals in test_linear."""
    f, shape = MODELS["mlp_relu"]()
    x = _inputs(shape)
    eps = np.float32(0.05) * np.array([0, 1, 2], np.float32)
    region = LinfBall(x, jnp.asarray(eps))
    with jax.enable_x64(True):
        bound = ibp(f, outward=True)
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
