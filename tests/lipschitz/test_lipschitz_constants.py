"""The constants of linear layers against float64 singular values of the materialised layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from thinned import one_in

from jaxcert import lipschitz
from jaxcert.errors import UnsupportedEquation

RNG = np.random.default_rng(0)


def exact_dense(kernel):
    """The spectral norm in float64, after an exact scaling by a power of two."""
    kernel = np.asarray(kernel, np.float64)
    largest = np.max(np.abs(kernel))
    shift = 0 if largest == 0 else int(np.frexp(largest)[1])
    return np.ldexp(np.linalg.norm(np.ldexp(kernel, -shift), 2), shift)


def exact_conv(kernel, input_shape, padding="SAME", **options):
    """The layer as a matrix, column by column in float64 numpy arithmetic of XLA, then its SVD."""
    rank = len(input_shape) - 1
    spatial = "DHW"[3 - rank :]
    names = {"kernel_dilation": "rhs_dilation", "input_dilation": "lhs_dilation"}
    options = {names.get(name, name): value for name, value in options.items()}
    if "lhs_dilation" in options:
        padding = [(k - 1, k - 1) for k in kernel.shape[:rank]]
    strides = options.pop("strides", 1)
    strides = (strides,) * rank if isinstance(strides, int) else strides
    with jax.enable_x64(True):
        size = int(np.prod(input_shape))
        images = jnp.eye(size).reshape(size, *input_shape)
        if padding == "CIRCULAR":
            reach = [
                (d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2)
                for k, d in zip(
                    kernel.shape, options.get("rhs_dilation", (1,) * rank), strict=False
                )
            ]
            images = np.pad(np.asarray(images), [(0, 0), *reach, (0, 0)], mode="wrap")
            padding = "VALID"
        out = jax.lax.conv_general_dilated(
            images,
            jnp.asarray(np.asarray(kernel, np.float64)),
            window_strides=strides,
            padding=padding,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            **options,
        )
        return np.linalg.norm(np.asarray(out).reshape(size, -1), 2)


def float64(function, *args, **kwargs):
    with jax.enable_x64(True):
        return float(function(*args, **kwargs))


def rotation(n):
    return np.linalg.qr(RNG.normal(size=(n, n)))[0]


MATRICES = {
    "gaussian": RNG.normal(size=(12, 7)),
    "wide": RNG.normal(size=(3, 40)),
    "one": np.array([[-2.5]]),
    "rank one": np.outer(RNG.normal(size=9), RNG.normal(size=6)),
    "orthogonal": rotation(20),
    "twice orthogonal": 2 * rotation(20),
    "huge": 1e30 * RNG.normal(size=(5, 4)),
    "tiny": 1e-30 * RNG.normal(size=(5, 4)),
    "graded": np.diag(10.0 ** -np.arange(12)) @ rotation(12),
    "positive": RNG.uniform(size=(30, 30)),
    "one entry": np.pad(np.array([[3e-5]]), ((2, 5), (0, 9))),
}


@pytest.mark.parametrize("name", MATRICES)
def test_dense_is_an_upper_bound_and_tight(name):
    # float32 weights, so that both precisions speak of the same matrix.
    kernel = MATRICES[name].astype(np.float32)
    exact = exact_dense(kernel)
    slow = float64(lipschitz.dense, kernel)
    assert exact * (1 - 1e-15) <= slow <= exact * (1 + 1e-10) + 1e-36  # denormals
    fast = lipschitz.dense(jnp.asarray(kernel))
    assert fast.dtype == jnp.float32
    assert slow <= float(fast) <= exact * (1 + 6e-7)


@pytest.mark.parametrize("scale", [1e-250, 1e-30, 1.0, 1e30, 1e250])
def test_dense_in_float64_is_as_tight_at_every_scale(scale):
    kernel = scale * np.random.default_rng(6).normal(size=(6, 5))
    exact = exact_dense(kernel)
    assert exact * (1 - 1e-15) <= float64(lipschitz.dense, kernel) <= exact * (1 + 1e-10)


def test_dense_bounds_the_float64_kernel_that_was_passed_from_a_float32_caller():
    kernel = np.array([[1.0 + 2.0**-40]])  # rounds down to 1 in float32
    value = lipschitz.dense(kernel)
    assert value.dtype == jnp.float32
    assert float(value) >= kernel[0, 0]


def test_the_norm_of_zeros_is_next_to_nothing_and_denormals_are_not_lost():
    assert 0 <= float(lipschitz.dense(jnp.zeros((4, 3)))) < 1e-35
    denormal = np.full((4, 3), 1e-40, np.float32)  # XLA:CPU reads these as 0
    assert float64(jax.jit(lipschitz.dense), denormal) >= np.sqrt(12) * 1e-40


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_kernel_that_is_not_finite_has_no_finite_constant(bad):
    kernel = jnp.ones((3, 3)).at[1, 1].set(bad)
    assert lipschitz.dense(kernel) == jnp.inf
    assert jax.jit(lipschitz.dense)(kernel) == jnp.inf
    window = jnp.ones((3, 3, 2, 2)).at[0, 0, 0, 0].set(bad)
    assert lipschitz.conv(window, (6, 6, 2)) == jnp.inf


@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 0.9])
)
def test_dense_never_falls_below_the_singular_values(m, n, seed, sparsity):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(12, 12)).astype(np.float32)
    kernel *= rng.uniform(size=kernel.shape) > sparsity
    kernel[m:], kernel[:, n:] = 0, 0  # any shape, at one compilation
    exact = exact_dense(kernel)
    value = float64(lipschitz.dense, kernel)
    assert exact * (1 - 1e-15) <= value <= exact * (1 + 1e-10) + 1e-35


# --- convolutions ---------------------------------------------------------------------------------

GAUSSIAN = {
    "2d": ((3, 3, 4, 5), (8, 8, 4), {}),
    "even": ((2, 2, 4, 3), (8, 8, 4), {}),
    "even by odd, rectangular": ((4, 3, 2, 3), (9, 6, 2), {}),
    "1d": ((5, 3, 4), (16, 3), {}),
    "3d": ((3, 3, 3, 2, 2), (4, 4, 4, 2), {}),
    "dilated": ((3, 3, 3, 3), (8, 8, 3), {"kernel_dilation": (2, 1)}),
    "window of one": ((1, 1, 6, 4), (5, 5, 6), {}),
    "window larger than the input": ((7, 7, 2, 2), (4, 4, 2), {}),
    "stride 2": ((3, 3, 3, 4), (8, 8, 3), {"strides": 2}),
    "strides that leave a rest": ((4, 3, 2, 3), (9, 8, 2), {"strides": (3, 2)}),
    "stride larger than the window": ((2, 3, 4), (11, 3), {"strides": 3}),
    "groups": ((3, 3, 2, 6), (7, 7, 6), {"feature_group_count": 3}),
    "depthwise, stride 2": ((3, 3, 1, 4), (8, 8, 4), {"feature_group_count": 4, "strides": 2}),
    "dilated, stride 2": ((3, 3, 2, 2), (9, 9, 2), {"strides": 2, "kernel_dilation": (2, 3)}),
    "transposed": ((3, 3, 3, 2), (6, 6, 3), {"input_dilation": (2, 2)}),
    "transposed, unequal": ((4, 2, 2, 2), (4, 5, 2), {"input_dilation": (1, 3)}),
    "circular": ((3, 3, 3, 4), (7, 6, 3), {"padding": "CIRCULAR"}),
    "circular, stride 2": ((3, 3, 2, 3), (8, 6, 2), {"padding": "CIRCULAR", "strides": 2}),
    "circular, dilated": ((3, 2, 3), (9, 2), {"padding": "CIRCULAR", "kernel_dilation": (2,)}),
}


@pytest.mark.parametrize("name", one_in(2, GAUSSIAN))
@pytest.mark.parametrize("positive", [False, True])
def test_conv_is_an_upper_bound(name, positive):
    shape, input_shape, options = GAUSSIAN[name]
    kernel = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    kernel = np.abs(kernel) if positive else kernel
    exact = exact_conv(kernel, input_shape, **options)
    bound = float64(lipschitz.conv, kernel, input_shape, **options)
    assert exact * (1 - 1e-14) <= bound
    if options.get("padding") == "CIRCULAR":
        assert bound <= exact * (1 + 1e-9)
    # Few positions per axis weigh the border more: up to 3 where the window is larger.
    factor = 3.2 if shape[0] > input_shape[0] else 1.6 if len(shape) == 5 else 1.25
    factor = 1.4 if "stride" in name else factor  # up to one more block of pixels per axis
    assert bound <= factor * exact


def test_conv_is_within_a_tenth_of_the_exact_norm_on_8_by_8():
    kernel = np.random.default_rng(2).normal(size=(3, 3, 8, 8)).astype(np.float32)
    exact = exact_conv(kernel, (8, 8, 8))
    bound = float64(lipschitz.conv, kernel, (8, 8, 8))
    assert exact <= bound <= 1.1 * exact


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID", [(2, 2), (2, 2)], [(0, 2), (1, 0)]])
def test_one_bound_covers_every_zero_padding(padding, strides):
    kernel = np.abs(np.random.default_rng(3).normal(size=(3, 3, 2, 2))).astype(np.float32)
    exact = exact_conv(kernel, (6, 5, 2), padding, strides=strides)
    bound = float64(lipschitz.conv, kernel, (6, 5, 2), padding=padding, strides=strides)
    assert exact <= bound


def test_the_norm_of_the_reshaped_kernel_is_no_bound_and_is_not_what_is_returned():
    kernel = np.full((3, 3, 1, 1), 1 / 3, np.float32)  # reshaped norm 1, true norm near 3
    exact = exact_conv(kernel, (16, 16, 1))
    assert exact > 2.5 * exact_dense(kernel.reshape(-1, 1))
    assert exact <= float64(lipschitz.conv, kernel, (16, 16, 1)) <= 3.0001


def test_conv_does_not_wrap_around():
    # With period n the only tap pair that meets, (first, last), would cancel: 1 - 1.
    kernel = np.array([1.0, 0, 0, -1.0], np.float32).reshape(4, 1, 1)
    exact = exact_conv(kernel, (3, 1), [(3, 3)])
    assert exact > 0.99
    assert exact <= float64(lipschitz.conv, kernel, (3, 1), padding=[(3, 3)])


def test_conv_is_the_largest_norm_over_the_frequencies_chunk_by_chunk(monkeypatch):
    kernel = np.random.default_rng(2).normal(size=(3, 3, 3, 2)).astype(np.float32)
    transform = np.fft.fft2(kernel.astype(np.float64), (11, 9), (0, 1))  # 9 + 2 and 7 + 2 points
    largest = np.max(np.linalg.svd(transform, compute_uv=False))
    monkeypatch.setattr("jaxcert.lipschitz.constants.MEMORY", 128 * 6 * 4)  # 4 frequencies
    value = float64(lipschitz.conv, kernel, (9, 7, 3))
    assert largest * (1 - 1e-14) <= value <= largest * (1 + 1e-12)


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ({"strides": 2, "input_dilation": 2}, "use strides or input dilation"),
        ({"strides": 3, "padding": "CIRCULAR"}, "do not divide"),
        ({"input_dilation": 2, "padding": "CIRCULAR"}, "zero padding"),
        ({"padding": "REFLECT"}, "REFLECT"),
    ],
)
def test_what_has_no_proof_raises_and_is_named(option, name):
    with pytest.raises(UnsupportedEquation, match=name):
        lipschitz.conv(jnp.ones((3, 3, 2, 2)), (8, 8, 2), **option)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: lipschitz.dense(jnp.ones(3)), ValueError, "d_in, d_out"),
        (lambda: lipschitz.dense(jnp.ones((0, 3))), ValueError, "shape"),
        (lambda: lipschitz.dense(jnp.ones((3, 3), int)), TypeError, "int32"),
        (lambda: lipschitz.dense([[1.0]]), TypeError, "list"),
        (lambda: lipschitz.conv(jnp.ones((3, 3, 2, 2)), (1, 8, 8, 2)), ValueError, "batch axis"),
        (lambda: lipschitz.conv(jnp.ones((3, 3, 2, 2)), (8, 8, 3)), ValueError, "c_in=2"),
        (lambda: lipschitz.conv(jnp.ones((3, 2)), (8, 2)), ValueError, "window"),
        (
            lambda: lipschitz.conv(jnp.ones((3, 2, 2)), (8, 4), feature_group_count=3),
            ValueError,
            "divide the 2 output channels",
        ),
        (
            lambda: lipschitz.conv(jnp.ones((3, 2, 2)), (8, 2), kernel_dilation=(1, 1)),
            ValueError,
            "kernel_dilation",
        ),
    ],
)
def test_wrong_arguments_raise(call, error, words):
    with pytest.raises(error, match=words):
        call()


# --- transformations ------------------------------------------------------------------------------


def test_constants_are_the_same_under_jit_and_vmap():
    kernels = jnp.asarray(np.random.default_rng(5).normal(size=(3, 6, 4)), jnp.float32)
    each = jnp.stack([lipschitz.dense(w) for w in kernels])
    for mapped in (jax.vmap(lipschitz.dense), jax.vmap(jax.jit(lipschitz.dense))):
        np.testing.assert_allclose(mapped(kernels), each, rtol=2e-7)
    windows = jnp.asarray(np.random.default_rng(5).normal(size=(2, 3, 3, 2, 2)), jnp.float32)

    def norm(window):
        return lipschitz.conv(window, (6, 6, 2))

    each = jnp.stack([norm(w) for w in windows])
    np.testing.assert_allclose(jax.jit(jax.vmap(norm))(windows), each, rtol=2e-7)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (lipschitz.dense, (6, 4)),
        (lambda w: lipschitz.conv(w, (6, 5, 3)), (3, 2, 3, 2)),
        (lambda w: lipschitz.conv(w, (7, 2), kernel_dilation=2), (3, 2, 2)),
        (lambda w: lipschitz.conv(w, (7, 4), strides=2, feature_group_count=2), (3, 2, 4)),
    ],
)
def test_gradients_match_finite_differences(norm, shape):
    kernel = np.random.default_rng(2).normal(size=shape)
    gradient = jax.jit(jax.grad(norm))(jnp.asarray(kernel, jnp.float32))
    assert gradient.dtype == jnp.float32
    step = 1e-6
    numeric = np.zeros(shape)
    for place in np.ndindex(*shape):
        shift = np.zeros(shape)
        shift[place] = step
        difference = float64(norm, kernel + shift) - float64(norm, kernel - shift)
        numeric[place] = difference / (2 * step)
    np.testing.assert_allclose(gradient, numeric, atol=2e-5)


@pytest.mark.parametrize("kernel", [np.zeros((3, 3)), np.eye(3), 1e-38 * np.ones((3, 3))])
def test_gradients_are_finite_where_the_norm_has_a_kink(kernel):
    gradient = jax.grad(lambda w: lipschitz.dense(w) ** 2 + lipschitz.dense(w))(
        jnp.asarray(kernel, jnp.float32)
    )
    assert np.all(np.isfinite(gradient))
    assert np.linalg.norm(gradient) > 0.5


def test_forward_derivatives_agree_with_backward_ones():
    w, t = (jnp.asarray(x, jnp.float32) for x in np.random.default_rng(4).normal(size=(2, 4, 3)))
    _, tangent = jax.jvp(lipschitz.dense, (w,), (t,))
    np.testing.assert_allclose(tangent, jnp.vdot(jax.grad(lipschitz.dense)(w), t), rtol=1e-5)


# --- cheap bounds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MATRICES)
def test_cheap_bounds_are_above_the_norm_and_as_near_as_they_say(name):
    kernel = MATRICES[name].astype(np.float32)
    exact = exact_dense(kernel)
    gram = float64(lipschitz.gram_bound, kernel)
    near = min(kernel.shape) ** (1 / 128)
    assert exact * (1 - 1e-15) <= gram <= exact * near * (1 + 1e-9) + 1e-35
    circles = float64(lipschitz.gershgorin_bound, kernel)
    assert exact * (1 - 1e-15) <= circles
    rows = np.max(np.sum(np.abs(kernel.astype(np.float64).T @ kernel.astype(np.float64)), axis=1))
    np.testing.assert_allclose(circles, np.sqrt(rows), rtol=1e-9, atol=1e-35)


def test_gershgorins_circles_hold_for_every_padding_stride_and_dilation():
    kernel = np.abs(np.random.default_rng(3).normal(size=(3, 3, 2, 3))).astype(np.float32)
    bound = float64(lipschitz.gershgorin_bound, kernel)
    for options in ({}, {"strides": 2}, {"kernel_dilation": (2, 2)}, {"padding": "CIRCULAR"}):
        assert exact_conv(kernel, (7, 7, 2), **options) <= bound


def test_cheap_bounds_have_gradients_and_fail_closed():
    kernel = jnp.asarray(np.random.default_rng(5).normal(size=(6, 4)), jnp.float32)
    for bound in (lipschitz.gram_bound, lipschitz.gershgorin_bound):
        gradient = jax.jit(jax.grad(bound))(kernel)
        # Homogeneous functions: <gradient, W> is the value.
        np.testing.assert_allclose(jnp.vdot(gradient, kernel), bound(kernel), rtol=1e-4)
        assert bound(kernel.at[1, 1].set(jnp.nan)) == jnp.inf
    with pytest.raises(ValueError, match="at least 1 step"):
        lipschitz.gram_bound(kernel, steps=0)
