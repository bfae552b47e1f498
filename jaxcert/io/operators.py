"""ONNX operators as small functions: the table, arithmetic, activations, reductions.

A function's signature is the declaration of its operator. Parameters before `/` are arrays, in the
order of the operator's inputs. Parameters behind it are inputs whose values must be known when the
file is read (axes, sizes, limits): they arrive as plain Python numbers and tuples, whether the file
has them as an input or, in older versions of the format, as an attribute of the same name.
Keyword-only parameters are attributes, with ONNX's defaults. An attribute without a parameter is
refused unless the file has it at its default.

The functions compute in the types of their operands, and hold for any batch size along axis 0
wherever the operator itself leaves that axis alone. On numpy arrays, Python's operators and the
functions of `namespace` stay in numpy: that is how shapes are computed when a file is read.

Equations are chosen for what the bounds know: one relu for a leaky relu with a slope per channel,
one clamp for both ends.
"""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array: TypeAlias = Any

NEWEST_OPSET = 23
"""The newest version of ONNX's operator set whose changes are accounted for."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What only the reader of a file knows of a node; for functions with a parameter `facts`.

    Attributes:
      shapes: of the arrays, for a single example.
      dtypes: names of the arrays' types in the file, whatever wider type they are evaluated in.
      outputs: how many outputs the node has.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    outputs: int


@dataclasses.dataclass(frozen=True)
class Operator:
    """A function for one operator, from one version of the operator set on.

    Attributes:
      name: ONNX's name.
      since: the first version of the operator set that it holds for.
      apply: the function.
      moves: whether results are entries of the operands, or known exactly, so that weights may be
        replaced by the result.
      ignored: attributes that do not matter for inference.
    """

    name: str
    since: int
    apply: Callable[..., Any]
    moves: bool = False
    ignored: frozenset[str] = frozenset()

    @functools.cached_property
    def _parameters(self) -> tuple[inspect.Parameter, ...]:
        return tuple(inspect.signature(self.apply).parameters.values())

    def _named(self, kind: Any) -> tuple[str, ...]:
        return tuple(p.name for p in self._parameters if p.kind == kind)

    @property
    def arrays(self) -> int | None:
        """How many array operands there are at most; None for any number."""
        if self._named(inspect.Parameter.VAR_POSITIONAL):
            return None
        return len(self._named(inspect.Parameter.POSITIONAL_ONLY))

    @property
    def known(self) -> tuple[str, ...]:
        """The operands behind the arrays, whose values must be known."""
        return self._named(inspect.Parameter.POSITIONAL_OR_KEYWORD)

    @property
    def attributes(self) -> frozenset[str]:
        """The attributes that are honoured; known operands were attributes once."""
        return frozenset([*self.known, *self._named(inspect.Parameter.KEYWORD_ONLY)]) - {"facts"}

    @property
    def wants_facts(self) -> bool:
        """Whether the function has a parameter `facts`."""
        return "facts" in self._named(inspect.Parameter.KEYWORD_ONLY)


OPERATORS: dict[str, list[Operator]] = {}
"""For each name its operators, oldest first."""


def define(
    name: str, apply: Callable[..., Any], *, since: int = 1, moves: bool = False, ignored: str = ""
) -> None:
    """Enter a function into the table."""
    entry = Operator(name, since, apply, moves, frozenset(ignored.split()))
    OPERATORS.setdefault(name, []).append(entry)
    OPERATORS[name].sort(key=lambda each: each.since)


def implements(name: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that enters a function into the table, with `define`'s options."""

    def enter(apply: Callable[..., Any]) -> Callable[..., Any]:
        define(name, apply, **options)
        return apply

    return enter


def lookup(name: str, version: int) -> Operator | None:
    """The function for an operator in a version of the operator set, if there is one."""
    fitting = [each for each in OPERATORS.get(name, ()) if each.since <= version]
    return fitting[-1] if fitting else None


def namespace(*arrays: Any) -> Any:
    """numpy for numpy's arrays, jax.numpy as soon as there is another one."""
    return np if all(isinstance(a, np.ndarray | np.generic) for a in arrays) else jnp


def one_type(*arrays: Array | None) -> list[Any]:
    """The arrays in their common type, for functions of `jax.lax`, which promote nothing."""
    dtype = jnp.result_type(*(a for a in arrays if a is not None))
    return [None if a is None else a.astype(dtype) for a in arrays]


def number(value: Any) -> float:
    """A scalar that may have come as an array of one entry."""
    return float(np.asarray(value).reshape(()))


def integers(values: Any) -> tuple[int, ...]:
    """Axes or sizes, of which a single one may have come as a scalar."""
    return tuple(int(v) for v in np.atleast_1d(np.asarray(values, np.int64)))


# --- Arithmetic -----------------------------------------------------------------------------------

for _name, _apply in {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Neg": operator.neg,
    "Equal": operator.eq,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "And": operator.and_,
    "Or": operator.or_,
    "Xor": operator.xor,
    "Not": operator.invert,
}.items():
    define(_name, _apply)


def _define_unary(name: str, f: Callable[[Array], Array]) -> None:
    def apply(x, /):
        return f(x)

    define(name, apply)


for _name, _apply in {
    "Abs": jnp.abs,
    "Atan": jnp.arctan,
    "Asinh": jnp.arcsinh,
    "Ceil": jnp.ceil,
    "Cos": jnp.cos,
    "Cosh": jnp.cosh,
    "Erf": lax.erf,
    "Exp": jnp.exp,
    "Floor": jnp.floor,
    "Log": jnp.log,
    "Mish": jax.nn.mish,
    "HardSwish": jax.nn.hard_swish,
    "Reciprocal": jnp.reciprocal,
    "Relu": jax.nn.relu,
    "Round": jnp.round,
    "Sigmoid": jax.nn.sigmoid,
    "Sign": jnp.sign,
    "Sin": jnp.sin,
    "Sinh": jnp.sinh,
    "Softplus": jax.nn.softplus,
    "Softsign": jax.nn.soft_sign,
    "Sqrt": jnp.sqrt,
    "Tanh": jnp.tanh,
}.items():
    _define_unary(_name, _apply)


@implements("Div")
def _div(x, y, /):
    if jnp.issubdtype(x.dtype, jnp.integer):  # towards zero
        return abs(x) // abs(y) * namespace(x).sign(x) * namespace(y).sign(y)
    return x / y


@implements("Pow")
def _pow(x, /, exponent):
    powers = np.asarray(exponent)
    if powers.size > 1 or powers.ndim > x.ndim:
        return jnp.power(x, powers.astype(x.dtype))
    power = number(exponent)
    if power.is_integer():
        return x ** int(power)
    return jnp.sqrt(x) if power == 0.5 else x**power


@implements("Sum")
def _sum(*xs):
    return functools.reduce(operator.add, xs)


@implements("Mean")
def _mean(*xs):
    return _sum(*xs) / len(xs)


@implements("Max")
def _max(*xs):
    return functools.reduce(jnp.maximum, xs)


@implements("Min")
def _min(*xs):
    return functools.reduce(jnp.minimum, xs)


@implements("Where")
def _where(condition, x, y, /):
    return namespace(condition, x, y).where(condition, x, y)


@implements("Clip")
def _clip(x, /, min=None, max=None):
    if min is not None and max is not None:
        high = number(max)
        low = high if number(min) > high else number(min)  # as ONNX has it
        return lax.clamp(jnp.asarray(low, x.dtype), x, jnp.asarray(high, x.dtype))
    if min is not None:
        return jnp.maximum(x, number(min))
    return x if max is None else jnp.minimum(x, number(max))


# A cast to a type that holds the values is no operation: where a model is evaluated in a wider
# type, as in proofs, it must not narrow what the file does not narrow.
@implements("Cast", moves=True, ignored="saturate round_mode")
def _cast(x, /, *, to, facts):
    target, (source,) = jnp.dtype(_DTYPES[to]), map(jnp.dtype, facts.dtypes)
    floats = all(jnp.issubdtype(each, jnp.floating) for each in (source, target))
    if floats and jnp.promote_types(source, target) == target:
        target = jnp.promote_types(x.dtype, target)
    return x.astype(target)


_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64",
    9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16",
}  # fmt: skip


@implements("Identity", moves=True)
def _identity(x, /):
    return x


# --- Activations ----------------------------------------------------------------------------------


@implements("LeakyRelu")
def _leaky_relu(x, /, *, alpha=0.01):
    return jnp.where(x >= 0, x, x * alpha)


# With a slope per channel, a x + (1 - a) relu(x) has one kink in one equation, and its interval is
# exact for slopes in [0, 1].
@implements("PRelu")
def _prelu(x, slope, /):
    if slope.size == 1 and slope.ndim <= x.ndim:
        return _leaky_relu(x, alpha=slope.reshape(()))
    return slope * x + (1 - slope) * jax.nn.relu(x)


@implements("Elu")
def _elu(x, /, *, alpha=1.0):
    return jax.nn.elu(x, alpha)


@implements("Selu")
def _selu(x, /, *, alpha=1.6732631921768188, gamma=1.0507010221481323):
    return gamma * jax.nn.elu(x, alpha)


@implements("Celu")
def _celu(x, /, *, alpha=1.0):
    return alpha * jax.nn.elu(x / alpha)


@implements("HardSigmoid")
def _hard_sigmoid(x, /, *, alpha=0.2, beta=0.5):
    return _clip(alpha * x + beta, min=0.0, max=1.0)


@implements("ThresholdedRelu")
def _thresholded_relu(x, /, *, alpha=1.0):
    return jnp.where(x > alpha, x, 0.0)


@implements("Gelu")
def _gelu(x, /, *, approximate="none"):
    return jax.nn.gelu(x, approximate={"none": False, "tanh": True}[approximate])


@implements("Softmax", since=13)
def _softmax(x, /, *, axis=-1):
    return jax.nn.softmax(x, axis)


@implements("LogSoftmax", since=13)
def _log_softmax(x, /, *, axis=-1):
    return jax.nn.log_softmax(x, axis)


def _over_last_axes(f: Callable[..., Array], x: Array, axis: int) -> Array:
    """A function of one axis, of all axes from `axis` on taken as one."""
    axis %= x.ndim
    flat = x if axis == x.ndim - 1 else x.reshape(*x.shape[:axis], -1)
    return f(flat, -1).reshape(x.shape)


@implements("Softmax")
def _softmax_of_a_matrix(x, /, *, axis=1):
    return _over_last_axes(jax.nn.softmax, x, axis)


@implements("LogSoftmax")
def _log_softmax_of_a_matrix(x, /, *, axis=1):
    return _over_last_axes(jax.nn.log_softmax, x, axis)


# --- Reductions -----------------------------------------------------------------------------------


def _define_reduction(name: str, f: Callable[..., Array]) -> None:
    def apply(x, /, axes=None, *, keepdims=1, noop_with_empty_axes=0):
        axes = () if axes is None else integers(axes)
        over = axes if axes or noop_with_empty_axes else None
        return f(x, axis=over, keepdims=bool(keepdims))

    define(name, apply)


def _of(inner: Callable[[Array], Array], outer: Callable[[Array], Array]) -> Callable[..., Array]:
    """A sum of `inner`, and `outer` of it."""
    return lambda x, **options: outer(jnp.sum(inner(x), **options))


for _name, _apply in {
    "ReduceMax": jnp.max,
    "ReduceMean": jnp.mean,
    "ReduceMin": jnp.min,
    "ReduceProd": jnp.prod,
    "ReduceSum": jnp.sum,
    "ReduceL1": _of(jnp.abs, lambda s: s),
    "ReduceL2": _of(jnp.square, jnp.sqrt),
    "ReduceSumSquare": _of(jnp.square, lambda s: s),
}.items():
    _define_reduction(_name, _apply)


def along(x: Array, axes: Sequence[int]) -> tuple[int, ...]:
    """The axes of x, counted from the front."""
    for axis in axes:
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"axis {axis} of an array of shape {x.shape}")
    return tuple(axis % x.ndim for axis in axes)
