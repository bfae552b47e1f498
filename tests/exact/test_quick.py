"""The model of the attacks' loops against the model itself."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxcert.exact.quick import quick

LAYOUTS = [("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NHWC"), ("CNWH", "WIHO", "HNCW")]
STRIDES = [((1, 1), "SAME"), ((2, 3), [(2, 0), (1, 3)])]


@pytest.mark.parametrize(
    ("layout", "stride", "groups"),
    [*itertools.product(LAYOUTS, STRIDES, [1]), (LAYOUTS[0], STRIDES[0], 2)],
)
def test_outputs_and_gradients_are_those_of_the_model(layout, stride, groups):
    rng = np.random.default_rng(0)
    shape = [{"N": 3, "C": 4, "H": 7, "W": 6}[axis] for axis in layout[0]]
    taps = [{"O": 2, "I": 4 // groups, "H": 3, "W": 2}[axis] for axis in layout[1]]
    x, kernel = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (shape, taps))

    def f(x):
        z = lax.conv_general_dilated(
            x, kernel, *stride, dimension_numbers=layout, feature_group_count=groups
        )
        return jax.nn.relu(z) + jnp.tanh(z)

    def in_a_loop(f):
        value = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(f(x))))
        return jax.jit(lambda x: lax.map(value, jnp.stack([x, 2 * x])))(x)

    found, expected = in_a_loop(lambda x: quick(f, x)), in_a_loop(f)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


def test_a_kernel_that_depends_on_the_input():
    x = jnp.linspace(-1, 1, 16).reshape(1, 1, 16)

    def f(x):
        return lax.conv_general_dilated(x, x[:, :, :3], (1,), "SAME")

    np.testing.assert_array_equal(quick(f, x), f(x))
    slopes = [jax.grad(lambda x, g=g: jnp.sum(g(x) ** 2))(x) for g in (f, lambda x: quick(f, x))]
    np.testing.assert_allclose(*slopes, rtol=1e-5)
