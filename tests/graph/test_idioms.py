"""A name proves nothing: known functions are found by their equations, look-alikes are not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracles import in_float64

from jaxcert.bounds import ibp
from jaxcert.graph import trace
from jaxcert.idioms import IDIOMS, simplify
from jaxcert.sets import Box

X = jax.ShapeDtypeStruct((3, 4), jnp.float32)
KNOWN = {idiom.name for idiom in IDIOMS}


def names(f, spec=X):
    return {eqn.name for eqn in simplify(trace(f, spec)).equations}


def named(name, f):
    """f under another name, jitted, so that it shows as jit[name=...] in a trace."""

    def renamed(x):
        return f(x)

    renamed.__name__ = renamed.__qualname__ = name
    return jax.jit(renamed)


LOOK_ALIKES = {
    "silu": lambda x: x * jax.nn.sigmoid(2 * x),
    "swish": lambda x: x * jax.nn.sigmoid(x + 1e-3),
    "elu": lambda x: jnp.where(x > 0, x, jnp.expm1(x) * 2 - x),
    "softplus": lambda x: jnp.log1p(jnp.exp(x)) - x,
    "leaky_relu": lambda x: jnp.where(x > -1, x, 0.1 * x),
    "gelu": lambda x: 0.5 * x * (1 + jnp.tanh(0.8 * (x + 0.044715 * x**3))),
    "gelu_minus": lambda x: x * 0.5 * lax.erfc(x / np.sqrt(2)),
    "relu": lambda x: jnp.where(x > 0, x, 1.0),
    "relu_": lambda x: jnp.where(x > 1, x, 0.0),
    "relu_of_less": lambda x: jnp.where(x < 0, x, 0.0),
    "hard_swish": lambda x: x * jax.nn.relu6(x + 2) / 6,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(-x)),
    "soft_sign": lambda x: x / (1 + x**2),
    "square": lambda x: x * (x + 1e-3),
    "softmax": lambda x: jnp.exp(x) / jnp.sum(jnp.exp(2 * x), axis=1, keepdims=True),
    "softmax_": lambda x: jnp.exp(x - x[:, :1]) / jnp.sum(jnp.exp(x), axis=1, keepdims=True),
    "softmax_shift": lambda x: jnp.exp(x / 2) / jnp.sum(jnp.exp(x / 2), 1, keepdims=True) ** 2,
    "log_softmax": lambda x: x - jnp.log(jnp.sum(jnp.exp(x), axis=1, keepdims=True) + 1),
    "logsumexp_other": lambda x: 2 * x - jax.nn.logsumexp(x, axis=1, keepdims=True),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_bounded_as_what_they_are(name):
    f = named(name.rstrip("_"), LOOK_ALIKES[name])
    assert not names(f) & (KNOWN - {"softplus", "relu", "square"})
    rng = np.random.default_rng(0)
    centre, radius = rng.normal(size=(24, 4)) * 2, rng.uniform(0, 2, (24, 1))
    lower, upper = np.float32(centre - radius), np.float32(centre + radius)
    box = jax.jit(ibp(f, outward=True))(Box(jnp.asarray(lower), jnp.asarray(upper)))
    points = lower + (upper.astype(np.float64) - lower) * rng.uniform(size=(400, 24, 4))
    values = in_float64(f)(points.reshape(-1, 4)).reshape(400, 24, 4)
    assert (np.asarray(box.lower, np.float64) <= values.min(0)).all()
    assert (values.max(0) <= np.asarray(box.upper, np.float64)).all()


THE_SAME = {
    "silu": [jax.nn.silu, jax.nn.swish, named("mystery", lambda x: x * jax.nn.sigmoid(x))],
    "elu": [jax.nn.elu, named("relu", functools.partial(jax.nn.elu, alpha=0.7))],
    "softplus": [jax.nn.softplus, lambda x: jnp.logaddexp(x, 0.0)],
    "leaky_relu": [
        jax.nn.leaky_relu,
        functools.partial(jax.nn.leaky_relu, negative_slope=0.3),
        named("elu", lambda x: jnp.where(x >= 0, x, 0.2 * x)),
        lambda x: jnp.where(x > 0, x, x * 0.2),
    ],
    "gelu_tanh": [jax.nn.gelu, named("a", functools.partial(jax.nn.gelu, approximate=True))],
    "gelu_erf": [named("silu", functools.partial(jax.nn.gelu, approximate=False))],
    "mish": [jax.nn.mish],
    "hard_swish": [jax.nn.hard_swish, jax.nn.hard_silu],
    "relu": [lambda x: jnp.where(x > 0, x, 0.0), named("elu", lambda x: jnp.where(x >= 0, x, 0.0))],
    "square": [lambda x: x * x, jnp.square],
    "soft_sign": [jax.nn.soft_sign, lambda x: x / (jnp.abs(x) + 1)],
    "softmax": [
        jax.nn.softmax,
        functools.partial(jax.nn.softmax, axis=1),
        named("attention", lambda x: jnp.exp(x) / jnp.sum(jnp.exp(x), axis=-1, keepdims=True)),
        lambda x: jax.vmap(jax.nn.softmax)(x),
    ],
    "log_softmax": [jax.nn.log_softmax, lambda x: x - jax.nn.logsumexp(x, 1, keepdims=True)],
}


@pytest.mark.parametrize("name", THE_SAME)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_known_functions_are_recognised_under_any_name(name, dtype):
    found = [name in names(f, jax.ShapeDtypeStruct((3, 4), dtype)) for f in THE_SAME[name]]
    optional = {  # other ways of writing it that are bounded equation by equation
        "softplus": 1, "softmax": 2, "soft_sign": 1, "log_softmax": 1,
    }  # fmt: skip
    if name in ("softmax", "log_softmax") and dtype == jnp.bfloat16:
        assert not any(found)  # sums in float32 that are cast back: the exact function is another
    else:
        assert all(found[: optional.get(name, len(found))])


@pytest.mark.parametrize("width", [1, 2])
def test_softmax_over_an_axis_of_size_one_or_two(width):
    spec = Box(-jnp.ones((2, width)), jnp.ones((2, width)))
    for outward in (False, True):
        for f, most in ((jax.nn.softmax, 0.8807971), (jax.nn.log_softmax, -0.126928)):
            box = jax.jit(ibp(f, outward=outward))(spec)
            exact = most if width == 2 else float(f(jnp.zeros((1, 1)))[0, 0])
            assert np.allclose(box.upper, exact, atol=1e-5)
            if width == 2:
                assert np.allclose(box.lower, f(jnp.array([[-1.0, 1.0]]))[0, 0], atol=1e-5)


def test_a_slope_from_the_weights_may_be_negative_or_traced():
    @jax.jit
    def bounds(slope):
        f = lambda x: jnp.where(x >= 0, x, slope * x)  # noqa: E731
        return [ibp(f, outward=o)(Box(-2 * jnp.ones((1, 1)), jnp.ones((1, 1)))) for o in (0, 1)]

    for slope, low, high in ((0.1, -0.2, 1), (-3.0, 0, 6), (0.0, 0, 1), (2.0, -4, 1)):
        for box in bounds(jnp.float32(slope)):
            assert np.allclose([box.lower[0, 0], box.upper[0, 0]], [low, high], atol=1e-5)
