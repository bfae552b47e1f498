"""A net from an ONNX file as affine maps and kinks between flat vectors, in NumPy's float64.

What the checker of proofs knows of nets: one example, every value a vector, every step either a sum
of matrices times earlier values plus an offset, or max(a z, z) entry by entry. The operators are
written anew from ONNX's documentation, not those of the reader, which only resolves names, shapes
and constants.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jaxcert.errors import UnsupportedOperator
from jaxcert.io import onnx

Array: TypeAlias = Any

MOST_ENTRIES = 2**27  # of one matrix

ALPHA, EPSILON = (float(np.float32(a)) for a in (0.01, 1e-5))  # ONNX's defaults are float32


@dataclasses.dataclass(frozen=True, eq=False)
class Map:
    """x -> M x, with M a matrix (m, n), a diagonal (n,), or None for the identity."""

    matrix: Array = None

    def apply(self, x: Array) -> Array:
        """M x for vectors (b, n)."""
        if self.matrix is None:
            return x
        return x * self.matrix if self.matrix.ndim == 1 else x @ self.matrix.T

    def pull(self, rows: Array) -> Array:
        """A M for rows (b, r, m)."""
        if self.matrix is None:
            return rows
        if self.matrix.ndim == 1:
            return rows * self.matrix
        return (rows.reshape(-1, rows.shape[2]) @ self.matrix).reshape(*rows.shape[:2], -1)

    @functools.cached_property
    def size(self) -> "Map":
        """|M|."""
        return self if self.matrix is None else Map(abs(self.matrix))


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A value made of earlier ones.

    Attributes:
      parts: the sum of M x, pairs of the number of x and M.
      offset: what is added, (n,).
      left: a for a kink, max(a z, z) with 0 <= a <= 1 of one operand; None for an affine step.
    """

    parts: tuple[tuple[int, Map], ...]
    offset: Array = None
    left: float | None = None

    @property
    def terms(self) -> int:
        """How many products an entry of M x or A M sums up, at most."""
        matrices = [m.matrix for _, m in self.parts if m.matrix is not None]
        return len(self.parts) + max((max(m.shape) for m in matrices), default=1)

    def level(self, before: list[int]) -> int:
        """How its entries depend on the input, from how those of its operands do: 0 each on an
        entry of its own, 1 so that intervals are exact, 2 in any way."""
        matrix = self.parts[0][1].matrix
        mixes = matrix is not None and matrix.ndim == 2
        return 2 if len(before) > 1 else min(before[0] + mixes, 2)

    def converted(self, number: Callable[[Array], Array]) -> "Step":
        """The step with other numbers."""
        parts = tuple((x, m if m.matrix is None else Map(number(m.matrix))) for x, m in self.parts)
        return Step(parts, None if self.offset is None else number(self.offset), self.left)


@dataclasses.dataclass(frozen=True, eq=False)
class Net:
    """Steps in order of evaluation; value 0 is the input.

    Attributes:
      steps: by value; None for the input.
      sizes: the values' lengths.
      result: the output's number.
      rounded: whether some weight is rounded, by a few units.
    """

    steps: list[Step | None]
    sizes: list[int]
    result: int
    rounded: bool = False

    @functools.cached_property
    def kinks(self) -> list[int]:
        """The values that are kinks of others."""
        return [v for v, step in enumerate(self.steps) if step and step.left is not None]

    def operand(self, kink: int) -> int:
        """The value that a kink is of."""
        step = self.steps[kink]
        assert step is not None
        return step.parts[0][0]

    def left(self, kink: int) -> float:
        """The slope of a kink on the left."""
        step = self.steps[kink]
        assert step is not None
        assert step.left is not None
        return step.left

    def extended(self, rows: list[tuple[Array, Array]]) -> "Net":
        """The net with a value C y + d of its output y for each of some matrices and offsets."""
        more: list[Step | None] = [Step(((self.result, Map(c)),), d) for c, d in rows]
        sizes = [len(d) for _, d in rows]
        return dataclasses.replace(self, steps=self.steps + more, sizes=self.sizes + sizes)


def flat(model: onnx.OnnxModel) -> Net:
    """The net as the file has it, for one example.

    Raises:
      UnsupportedOperator: for operators other than affine ones, Relu and LeakyRelu.
    """
    program = model.program
    build = _Builder()
    lead = (1,) if program.leading else ()
    values = [build.value(None, (*lead, *program.input_shape))]
    weights = [np.asarray(w, np.float64) for w in model.weights]
    for step in program.steps:
        given = [None if i is None else values[i] if i >= 0 else weights[~i] for i in step.operands]
        make = _OPERATORS.get(step.name)
        many = sum(isinstance(x, _Value) for x in given)
        first = many == 1 and isinstance(given[0], _Value)
        known = (
            first or (many == 2 and step.name in _OF_TWO) or (many == 1 and step.name in _EITHER)
        )
        if make is None or step.results != 1 or not known:
            raise UnsupportedOperator(f"the checker of proofs does not know {step.name} here")
        try:
            options = {key: value for key, value in step.options if key != "facts"}
            values.append(make(build, *given, **options))
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            what = f"the checker of proofs does not know this form of {step.name}: {error}"
            raise UnsupportedOperator(what) from error
    result = values[program.result].number
    sizes = [math.prod(shape) for shape in build.shapes[: result + 1]]
    return Net(build.steps[: result + 1], sizes, result, build.rounded)


class _Value(NamedTuple):
    number: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class _Builder:
    def __init__(self):
        self.steps: list[Step | None] = []
        self.shapes: list[tuple[int, ...]] = []
        self.rounded = False

    def value(self, step: Step | None, shape: tuple[int, ...]) -> _Value:
        self.steps.append(step)
        self.shapes.append(shape)
        return _Value(len(self.steps) - 1, shape)

    def affine(self, x: _Value, matrix: Array, offset: Array, shape: tuple[int, ...]) -> _Value:
        offset = np.broadcast_to(offset, shape).reshape(-1)
        return self.value(Step(((x.number, Map(matrix)),), offset), shape)

    def sum(self, x: Any, y: Any, sign: float = 1.0) -> _Value:
        if isinstance(x, _Value) and isinstance(y, _Value):
            if x.shape != y.shape:
                raise ValueError(f"shapes {x.shape} and {y.shape}")
            second = Map(None if sign == 1 else np.full(y.size, sign))
            parts = (x.number, Map()), (y.number, second)
            return self.value(Step(parts, np.zeros(x.size)), x.shape)
        if isinstance(x, _Value):
            return self.affine(x, None, sign * y, x.shape)
        return self.affine(y, None if sign == 1 else np.full(y.size, sign), x, y.shape)

    def scaled(self, x: Any, factor: Any) -> _Value:
        if not isinstance(x, _Value):
            x, factor = factor, x
        return self.affine(x, np.broadcast_to(factor, x.shape).reshape(-1), 0.0, x.shape)

    def divided(self, x: _Value, y: Array) -> _Value:
        self.rounded |= bool(np.any(abs(np.frexp(y)[0]) != 0.5))  # else powers of two
        return self.scaled(x, 1 / y)

    def reshaped(self, x: _Value, shape: tuple[int, ...]) -> _Value:
        return _Value(x.number, np.empty(x.shape, np.int8).reshape(shape).shape)

    def transposed(self, x: _Value, perm: tuple[int, ...] | None = None) -> _Value:
        order = np.arange(x.size).reshape(x.shape).transpose(perm)
        _require_room(x.size, x.size)
        return self.affine(x, np.eye(x.size)[order.reshape(-1)], 0.0, order.shape)

    def product(self, x: _Value, y: Array) -> _Value:
        *lead, n = x.shape
        count, m = math.prod(lead), y.shape[1]
        if y.ndim != 2 or len(y) != n:
            raise ValueError(f"shapes {x.shape} and {y.shape}")
        _require_room(count * m, count * n)
        matrix = y.T if count == 1 else np.kron(np.eye(count), y.T)
        return self.affine(x, matrix, 0.0, (*lead, m))

    def gemm(self, x, y, bias=None, *, alpha=1.0, beta=1.0, transA=0, transB=0) -> _Value:
        if transA or len(x.shape) != 2:
            raise ValueError("transA, or an operand that is no matrix")
        self.rounded |= alpha != 1 or beta != 1
        y = alpha * (y.T if transB else y)
        made = self.product(x, y)
        return made if bias is None else self.sum(made, beta * bias)

    def kink(self, x: _Value, *, alpha: float = 0.0) -> _Value:
        if not 0 <= alpha <= 1:
            raise ValueError(f"the slope {alpha}")
        return self.value(Step(((x.number, Map()),), left=float(alpha)), x.shape)

    # s = scale / sqrt(variance + epsilon) errs by four units: every bound allows weights to.
    def normalised(self, x, scale, bias, mean, variance, *, epsilon=EPSILON) -> _Value:
        self.rounded = True
        scale, bias, mean, variance = (
            v.reshape(-1, *(1,) * (len(x.shape) - 2)) for v in (scale, bias, mean, variance)
        )
        return self.sum(
            self.scaled(self.sum(x, mean, -1.0), scale / np.sqrt(variance + epsilon)), bias
        )

    def convolved(
        self, x, kernel, bias=None, *, group=1, pads=None, strides=None, dilations=None, **others
    ) -> _Value:
        one, channels, *sizes = x.shape
        d, taps = len(sizes), kernel.shape[2:]
        fits = one == 1 and kernel.shape[1] * group == channels and len(kernel) % group == 0
        if not fits or others.pop("kernel_shape", taps) != taps:
            raise ValueError(f"shapes {x.shape} and {kernel.shape}")
        if others.pop("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or others:
            raise ValueError("padding, or an attribute that is not known")
        strides, dilations, pads = strides or (1,) * d, dilations or (1,) * d, pads or (0,) * 2 * d
        places = []  # along each axis: (out, tap) -> in
        for i, n in enumerate(sizes):
            room = n + pads[i] + pads[d + i] - (taps[i] - 1) * dilations[i] - 1
            first = np.arange(room // strides[i] + 1)[:, None] * strides[i] - pads[i]
            places.append(first + np.arange(taps[i]) * dilations[i])
        shape = (len(kernel), *map(len, places))
        _require_room(math.prod(shape), x.size)
        matrix = np.zeros((*shape, *x.shape[1:]))
        for at in itertools.product(*map(range, (group, *shape[1:], *taps))):
            g, out, tap = at[0], at[1 : d + 1], at[d + 1 :]
            where = tuple(int(p[o, t]) for p, o, t in zip(places, out, tap, strict=True))
            if all(0 <= w < n for w, n in zip(where, sizes, strict=True)):
                counts = len(kernel) // group, channels // group
                outs, ins = (slice(g * n, g * n + n) for n in counts)
                matrix[(outs, *out, ins, *where)] = kernel[(outs, slice(None), *tap)]
        offset = 0.0 if bias is None else bias.reshape(-1, *(1,) * d)
        return self.affine(x, matrix.reshape(-1, x.size), offset, (1, *shape))


def _require_room(rows: int, columns: int) -> None:
    if rows * columns > MOST_ENTRIES:
        raise ValueError(f"a matrix of {rows} times {columns} entries is too large")


_OPERATORS: dict[str, Callable[..., _Value]] = {}


def _average(build: _Builder, x, *, kernel_shape, pads=None, ceil_mode=0, **options) -> _Value:
    """A convolution of each channel."""
    if any(pads or ()) or ceil_mode or options.pop("count_include_pad", 0):
        raise ValueError("padding")
    build.rounded = True
    channels = x.shape[1]
    kernel = np.full((channels, 1, *kernel_shape), 1 / math.prod(kernel_shape))
    return build.convolved(x, kernel, group=channels, **options)


def _flattened(build: _Builder, x: _Value, *, axis: int = 1) -> _Value:
    axis = axis + len(x.shape) if axis < 0 else axis
    return build.reshaped(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


def _reshaped(build: _Builder, x: _Value, *, shape: tuple[int, ...], allowzero: int = 0) -> _Value:
    if not allowzero:
        shape = tuple(x.shape[i] if n == 0 else n for i, n in enumerate(shape))
    return build.reshaped(x, shape)


def _same(build: _Builder, x: _Value, **_: Any) -> _Value:
    return x


_OF_TWO = frozenset(["Add", "Sub"])
_EITHER = frozenset(["Add", "Sub", "Mul"])  # whichever operand is the constant

_OPERATORS |= {
    "Add": _Builder.sum,
    "AveragePool": _average,
    "BatchNormalization": _Builder.normalised,
    "Conv": _Builder.convolved,
    "Div": _Builder.divided,
    "Dropout": _same,
    "Flatten": _flattened,
    "Gemm": _Builder.gemm,
    "Identity": _same,
    "LeakyRelu": lambda build, x, *, alpha=ALPHA: build.kink(x, alpha=alpha),
    "MatMul": _Builder.product,
    "Mul": _Builder.scaled,
    "Relu": _Builder.kink,
    "Reshape": _reshaped,
    "Sub": lambda build, x, y: build.sum(x, y, -1.0),
    "Transpose": _Builder.transposed,
}
