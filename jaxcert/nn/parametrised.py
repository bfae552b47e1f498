"""Dense layers and convolutions with a parametrised kernel, 1-Lipschitz in L2.

Each holds a plain Flax layer with free weights, `free`, and is that layer with another kernel, a
function of the free one (`lipschitz/parametrise.py`). Arguments are those of `nnx.Linear`,
`nnx.Conv` and `nnx.ConvTranspose`. The bias is free.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxcert import blocks
from jaxcert.lipschitz import parametrise, parametrise_conv
from jaxcert.sets import Array


class Parametrised(nnx.Module):
    """A plain layer `free` whose kernel is a function of free weights."""

    free: Any

    def kernel(self) -> Array:
        """The kernel that the layer applies."""
        raise NotImplementedError("a parametrised layer defines its kernel")

    def frozen(self) -> Any:
        """The plain Flax layer with that kernel."""
        return with_kernel(self.free, self.kernel())

    def __call__(self, x: Array) -> Array:
        """x through the layer with the parametrised kernel."""
        return self.frozen()(x)


def with_kernel(layer: Any, kernel: Array) -> Any:
    """A copy of a plain layer with another kernel."""
    copy = nnx.merge(*nnx.split(layer))
    copy.kernel = nnx.Param(kernel)
    return copy


# --- dense ----------------------------------------------------------------------------------------


def orthogonal(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """JAX's orthogonal initialiser, for narrow float types as well."""
    return jax.nn.initializers.orthogonal()(key, shape, jnp.float32).astype(dtype)


class _Dense(Parametrised):
    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs, **options: Any):
        options.setdefault("kernel_init", orthogonal)
        self.free = nnx.Linear(in_features, out_features, rngs=rngs, **options)


class SpectralDense(_Dense):
    """Divided by a bound on its spectral norm: norm at most 1, other singular values kept."""

    def kernel(self) -> Array:
        """`parametrise.spectral` of the free kernel."""
        return parametrise.spectral(self.free.kernel[...])


class BjorckDense(_Dense):
    """Orthogonal, by Bjorck's iteration.

    Two steps are enough, and the cheapest way to train with orthogonal weights, where `retract` is
    called after each update: then the free kernel is nearly orthogonal all the time.

    Args:
      in_features, out_features: of the layer.
      steps: of the iteration. With few of them the norm is at most 1 and the layer less orthogonal.
      rngs, **options: as in `nnx.Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        steps: int = 15,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(in_features, out_features, rngs=rngs, **options)
        self.steps = steps

    def kernel(self) -> Array:
        """`parametrise.bjorck` of the free kernel."""
        return parametrise.bjorck(self.free.kernel[...], steps=self.steps)


def retract(model: nnx.Module) -> None:
    """Replaces free kernels by the kernels that they stand for, in every `BjorckDense` of a model.

    Call it after each update of the weights, inside of the jitted training step:

      model = nnx.merge(graph, optax.apply_updates(params, updates))
      nn.retract(model)
    """
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, BjorckDense):
            layer.free.kernel[...] = layer.kernel()


class CayleyDense(_Dense):
    """Orthogonal, by the Cayley transform; its kernel is free around zero, the identity."""

    def kernel(self) -> Array:
        """`parametrise.cayley` of the free kernel."""
        return parametrise.cayley(self.free.kernel[...])


class AOLDense(_Dense):
    """Almost orthogonal: columns or rows rescaled; the cheapest to train."""

    def kernel(self) -> Array:
        """`parametrise.aol` of the free kernel."""
        return parametrise.aol(self.free.kernel[...])


class NormalisedDense(_Dense):
    """A last layer whose weight rows, one per class, have norm 1.

    As a whole it is no 1-Lipschitz map. `lipschitz.certify` uses the distances of its rows (Singla,
    Singla and Feizi, ICLR 2022, last layer normalisation).
    """

    def kernel(self) -> Array:
        """`parametrise.unit_columns` of the free kernel."""
        return parametrise.unit_columns(self.free.kernel[...])


class BRODense(Parametrised):
    """A reflection I - 2 P at the span of `rank` free vectors, cut to the layer's shape.

    Args:
      in_features, out_features: the kernel is a corner of a symmetric orthogonal matrix of the
        larger size.
      rank: number of free vectors; a quarter of that size by default, at most all of it.
      rngs, **options: as in `nnx.Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        size = max(in_features, out_features)
        rank = max(1, size // 4) if rank is None else rank
        if not 1 <= rank <= size:
            raise ValueError(f"rank must be between 1 and {size}, got {rank}")
        self.free = nnx.Linear(in_features, out_features, rngs=rngs, **options)
        vectors = jax.random.normal(rngs.params(), (size, rank), self.free.param_dtype)
        self.free.kernel = nnx.Param(vectors / size**0.5)

    def kernel(self) -> Array:
        """A corner of `parametrise.bro` of the free vectors."""
        whole = parametrise.bro(self.free.kernel[...])
        return whole[: self.free.in_features, : self.free.out_features]


# --- convolutions ---------------------------------------------------------------------------------


def one_stride(strides: Sequence[int]) -> Callable[..., Array]:
    """Initialises with an orthogonal map of one stride's pixels in the middle, zeros around it."""

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        taps = [min(k, s) for k, s in zip(shape, strides, strict=False)]
        middle = orthogonal(key, (*taps, *shape[-2:]), dtype)
        starts = [(k - t) // 2 for k, t in zip(shape, taps, strict=False)]
        place = tuple(slice(a, a + t) for a, t in zip(starts, taps, strict=True))
        return jnp.zeros(shape, dtype).at[place].set(middle)

    return init


class CircularConv(nnx.Conv):
    """`nnx.Conv` with circular padding, in a form whose exact constant `lipschitz` knows.

    Arguments are those of `nnx.Conv`, with strides, dilation and groups of 1 and no mask.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        window = _window(kernel_size)
        options["padding"] = "CIRCULAR"
        strides = _per_axis(strides, window, "strides")
        refuse(type(self), strides, len(window), options)
        super().__init__(in_features, out_features, window, strides, rngs=rngs, **options)

    def __call__(self, x: Array) -> Array:  # type: ignore[override]
        """x, (b, *spatial, c_in), convolved."""
        inputs, kernel, bias = self.promote_dtype(
            (x, self.kernel[...], None if self.bias is None else self.bias[...]), dtype=self.dtype
        )
        y = blocks.circular_conv(inputs, kernel)
        return y if bias is None else y + bias


class _Conv(Parametrised):
    """Arguments are those of `nnx.Conv`. Circular padding takes stride 1 and no groups."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        window = _window(kernel_size)
        strides = _per_axis(strides, window, "strides")
        self.check(window, strides, options)
        options.setdefault("kernel_init", self.initialiser(strides))
        kind = self.plain(options)
        self.free = kind(in_features, out_features, window, strides, rngs=rngs, **options)

    def check(self, window: Sequence[int], strides: Sequence[int], options: dict[str, Any]) -> None:
        """Raise for options under which the parametrisation proves nothing."""
        refuse(type(self), strides, len(window), options)

    def initialiser(self, strides: Sequence[int]) -> Callable[..., Array]:
        """How the free kernel begins by default."""
        return one_stride(strides)

    def plain(self, options: dict[str, Any]) -> Callable[..., Any]:
        """The class of the plain layer."""
        return CircularConv if options.get("padding") == "CIRCULAR" else nnx.Conv

    def layout(self) -> dict[str, Any]:
        """Strides and groups, as the parametrisations take them."""
        return {"strides": self.free.strides, "groups": self.free.feature_group_count}


class AOLConv(_Conv):
    """Almost orthogonal: channels rescaled; the cheapest to train, any stride and padding."""

    def kernel(self) -> Array:
        """`parametrise_conv.aol_conv` of the free kernel."""
        return parametrise_conv.aol_conv(self.free.kernel[...], **self.layout())


class SpectralConv(_Conv):
    """Divided by a bound on its norm that holds for every image and padding."""

    def kernel(self) -> Array:
        """`parametrise_conv.spectral_conv` of the free kernel."""
        return parametrise_conv.spectral_conv(self.free.kernel[...], **self.layout())


class BjorckConv(_Conv):
    """All taps as one orthogonal matrix, divided by their overlap (RKO); orthogonal if k = s."""

    def initialiser(self, strides: Sequence[int]) -> Callable[..., Array]:
        """Orthogonal in all taps together."""
        return orthogonal

    def kernel(self) -> Array:
        """`parametrise_conv.rko` of the free kernel."""
        return parametrise_conv.rko(self.free.kernel[...], **self.layout())


class AOLConvTranspose(_Conv):
    """The adjoint of an AOL convolution with the same strides. Arguments of `nnx.ConvTranspose`."""

    def check(self, window: Sequence[int], strides: Sequence[int], options: dict[str, Any]) -> None:
        """Raise for options under which the parametrisation proves nothing."""
        if options.get("padding") == "CIRCULAR" or options.get("transpose_kernel"):
            raise ValueError(
                "AOLConvTranspose takes zero padding ('SAME', 'VALID' or pairs) and "
                "transpose_kernel=False"
            )
        super().check(window, strides, options)

    def plain(self, options: dict[str, Any]) -> Callable[..., Any]:
        """The class of the plain layer."""
        return nnx.ConvTranspose

    def kernel(self) -> Array:
        """`parametrise_conv.aol_conv` of the adjoint's kernel, turned back."""
        turned = self.free.kernel[...].swapaxes(-1, -2)
        return parametrise_conv.aol_conv(turned, strides=self.free.strides).swapaxes(-1, -2)


class AOCConv(_Conv):
    """Orthogonal with strides and explicit kernel: BCOP, then RKO (Boissin et al., 2025).

    With stride 1 it is BCOP (Li et al., NeurIPS 2019). Arguments are those of `nnx.Conv`, without
    groups and dilation; windows are at least as large as the strides.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        **options: Any,
    ):
        super().__init__(in_features, out_features, kernel_size, strides, **options)
        window, step, rngs = self.free.kernel_size, self.free.strides, options["rngs"]
        dtype = self.free.param_dtype
        strided = max(step) > 1
        c = in_features if strided else max(in_features, out_features)
        matrix = orthogonal(rngs.params(), (c, c), dtype)
        self.projections = nnx.List(
            nnx.Param(jax.random.normal(rngs.params(), (k - s, c, max(1, c // 2)), dtype))
            for k, s in zip(window, step, strict=True)
            if k > s
        )
        # The free layer's own kernel is the orthogonal map of patches that follows BCOP, or, with
        # stride 1, the orthogonal matrix in it.
        shape = (*step, in_features, out_features)
        self.free.kernel = nnx.Param(orthogonal(rngs.params(), shape, dtype) if strided else matrix)
        self.matrix = nnx.Param(matrix) if strided else None

    def check(self, window: Sequence[int], strides: Sequence[int], options: dict[str, Any]) -> None:
        """Raise for options under which the parametrisation proves nothing."""
        refuse(type(self), strides, len(window), options, dense=True)
        if any(k < s for k, s in zip(window, strides, strict=True)):
            raise ValueError(
                f"AOCConv needs a kernel_size of at least the strides, got {window} and {strides}"
            )

    def kernel(self) -> Array:
        """`parametrise_conv.aoc`, or `parametrise_conv.bcop` for stride 1."""
        free, window, strides = self.free.kernel[...], self.free.kernel_size, self.free.strides
        steps = iter(self.projections)
        none = jnp.zeros((0, 1, 1), free.dtype)
        axes = [next(steps)[...] if k > s else none for k, s in zip(window, strides, strict=True)]
        if self.matrix is not None:
            return parametrise_conv.aoc(free, self.matrix[...], axes, strides=strides)
        c_in, c_out = self.free.in_features, self.free.out_features
        return parametrise_conv.bcop(free, axes, c_in=c_in, c_out=c_out)


# --- checks ---------------------------------------------------------------------------------------


def _window(kernel_size: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(kernel_size, int):
        raise ValueError(
            f"kernel_size must have one entry per axis, got {kernel_size}; write "
            f"({kernel_size}, {kernel_size}) for images"
        )
    return tuple(int(k) for k in kernel_size)


def _per_axis(value: int | Sequence[int], window: Sequence[int], name: str) -> tuple[int, ...]:
    values = (value,) * len(window) if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != len(window) or min(values) < 1:
        raise ValueError(f"{name} must be an int >= 1 or {len(window)} of them, got {value}")
    return values


def refuse(
    kind: type, strides: Sequence[int], rank: int, options: dict[str, Any], dense: bool = False
) -> None:
    """Raise for options under which a parametrisation proves nothing."""
    dilation = _per_axis(options.get("kernel_dilation") or 1, range(rank), "kernel_dilation")
    spread = _per_axis(options.get("input_dilation") or 1, range(rank), "input_dilation")
    padding, groups = options.get("padding", "SAME"), options.get("feature_group_count", 1)
    name, plain = kind.__name__, max(strides) == max(dilation) == groups == 1
    if max(spread) > 1:
        raise ValueError(f"{name} takes no input_dilation; use AOLConvTranspose with strides")
    if padding == "REFLECT":
        raise ValueError(f"{name}: reflected pixels count twice; use padding 'SAME' or 'CIRCULAR'")
    if padding == "CIRCULAR" and not plain:
        raise ValueError(
            f"{name} with circular padding takes strides, dilation and groups of 1; use padding "
            "'SAME', or pixel_unshuffle before a layer of stride 1"
        )
    if max(strides) > 1 and max(dilation) > 1:
        raise ValueError(f"{name} takes strides or kernel_dilation, not both")
    if dense and (max(dilation) > 1 or groups > 1):
        raise ValueError(f"{name} takes no kernel_dilation and no groups; use AOLConv")
    if options.get("mask") is not None:
        raise ValueError(f"{name} takes no mask: a parametrised kernel is dense")
