"""Lipschitz constants through a graph: each equation's constant from those of its operands.

Every rule below is a proof for one primitive, in the L2 norm, the Linf norm or both. A primitive
without one is an error: taking it for 1 would certify what is not true. Blocks (`jaxcert.blocks`)
have their rules in `composite.py`.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.blocks import WEIGHTS
from jaxcert.bounds.interpreter import (
    Value,
    apply_rule,
    interpret,
    lower,
    middle,
    operand,
    upper,
)
from jaxcert.bounds.rounding import TINY, UNIT
from jaxcert.errors import UnsupportedEquation
from jaxcert.graph import Equation, Graph, Var, holds_all, stored, unsupported
from jaxcert.lipschitz import constants
from jaxcert.model import as_float64
from jaxcert.sets import Array, Box

Rule: TypeAlias = Callable[[Equation, int, list[Value]], Array | float]
"""(equation, position of the bounded operand, operands: None for it) -> its constant."""

RULES: dict[float, dict[str, Rule]] = {2: {}, math.inf: {}}
"""The rules by norm and primitive."""

_HINT = (
    "covered are dense and convolution layers, 1-Lipschitz activations, pooling, and the layers of "
    "jaxcert.nn; for other models use bounds.certify with an L2Ball or a LinfBall"
)


Factors: TypeAlias = dict[Equation, Array | float]
"""The constant of each equation with one bounded operand."""


def factors(graph: Graph, values: dict[Var, Value], norm: float) -> Factors:
    """The constants of the equations of a float64 graph with one bounded input.

    Args:
      graph: the graph.
      values: those that are not bounded, as `weights` gives them.
      norm: 2 or inf, of the input and of every value.
    """
    found: Factors = {}
    for eqn in graph.equations:
        places = [i for i, a in enumerate(eqn.inputs) if isinstance(a, Var) and a.bounded]
        if any(_narrows(eqn, place) for place in places):
            raise unsupported(eqn, "lipschitz", f"it rounds to a narrower type; {_HINT}")
        if len(places) == 1:
            found[eqn] = _factor(eqn, places[0], values, norm)
    return found


def speeds(graph: Graph, constants: Factors, norm: float) -> dict[Var, Array]:
    """For every bounded value of the graph, a Lipschitz constant as a map of the input."""
    known = {graph.inputs[0]: jnp.ones(())}
    for eqn in graph.equations:
        if eqn.bounded:
            result = change(eqn, known, constants, norm)
            known.update(dict.fromkeys(eqn.outputs, result * (1 + 4 * UNIT) + TINY))
    return known


def change(eqn: Equation, known: dict[Var, Array], constants: Factors, norm: float) -> Array:
    """What an equation makes of changes of its bounded operands, known up to these sizes."""
    changes = [known[a] for a in eqn.inputs if isinstance(a, Var) and a.bounded]
    return changes[0] * constants[eqn] if eqn in constants else _join(eqn, changes, norm)


def _narrows(eqn: Equation, place: int) -> bool:
    kinds = eqn.outputs[0].dtype, eqn.inputs[place].dtype
    return all(jnp.issubdtype(k, jnp.floating) for k in kinds) and not holds_all(*kinds)


# Of f and g with the constants L_f and L_g, where d is the change of x:
#   |(f + g)(x') - (f + g)(x)| <= (L_f + L_g) |d|;
#   the entries of (f, g) side by side change by at most sqrt(L_f^2 + L_g^2) |d| in L2, and by
#   max(L_f, L_g) |d| in Linf. An entry of max(f, g) or min(f, g) changes by at most as much as one
#   of the two entries it compares, and a selection by known numbers takes each entry from one.


def _join(eqn: Equation, changes: list[Array], norm: float) -> Array:
    """The same for an equation with several bounded operands."""
    sizes = jnp.stack(changes)
    if eqn.name in ("add", "sub"):
        return jnp.sum(sizes, axis=0)
    predicate = eqn.inputs[0]
    chosen = eqn.name == "select_n" and not (isinstance(predicate, Var) and predicate.bounded)
    if eqn.name in ("concatenate", "stack", "max", "min") or chosen:
        largest = jnp.max(sizes, axis=0)
        if norm == math.inf:
            return largest
        # In units of the largest, so that no square vanishes or overflows.
        unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
        return unit * jnp.sqrt(jnp.sum((sizes / unit) ** 2, axis=0)) * (1 + 2 * UNIT * len(sizes))
    raise unsupported(eqn, "lipschitz", f"several operands depend on the input; {_HINT}")


def _factor(eqn: Equation, place: int, values: dict[Var, Value], norm: float) -> Array | float:
    if eqn.name not in RULES[norm]:
        raise unsupported(eqn, "lipschitz", _HINT)
    operands = [
        None if i == place else operand(values, atom, True) for i, atom in enumerate(eqn.inputs)
    ]
    try:
        return RULES[norm][eqn.name](eqn, place, operands)
    except UnsupportedEquation as error:
        raise UnsupportedEquation(f"{error} ({eqn.where()})") from error


def define(names: str, rule: Rule, *norms: float) -> None:
    """Enter a rule for each primitive of a space-separated list, in these norms (both if none)."""
    for norm in norms or (2, math.inf):
        RULES[norm].update(dict.fromkeys(names.split(), rule))


# --- weights --------------------------------------------------------------------------------------
# Parametrised weights are numbers of float32, say, which another program, another device or float64
# would round differently. A constant holds for all of these: for kernels within a radius of
# four times the difference, in the mean square, between their values in float32 and in float64.


def stored_weights(graph: Graph, *, outward: bool = True) -> dict[Var, Value]:
    """Every value that is not bounded, parametrised weights as the model computes them.

    float64 enclosures, or plain arrays in the model's own types with `outward=False`.
    """
    unbounded = tuple(eqn for eqn in graph.equations if not eqn.bounded)
    return interpret(Graph((), unbounded, ()), [], outward=outward)


def weights(graph: Graph) -> dict[Var, Value]:
    """Every value of a float64 graph that is not bounded, as constants are proved for it."""
    values: dict[Var, Value] = {}
    for eqn in graph.equations:
        if eqn.bounded:
            continue
        given = [operand(values, atom, True) for atom in eqn.inputs]
        found = _around(eqn, given) if eqn.name == WEIGHTS else apply_rule(eqn, given, True)
        values.update(zip(eqn.outputs, found, strict=True))
    return values


def _around(eqn: Equation, given: list[Value]) -> list[Box]:
    assert eqn.inner is not None
    middles = [middle(value) for value in given]
    boxes = []
    computed = as_float64(eqn.bind(*middles))
    precise = as_float64(stored(eqn.inner, middles, eqn.outputs))
    for value, exact, wide in zip(computed, precise, eqn.inner.outputs, strict=True):
        # Where nothing wider was traced, units of the type itself.
        unit = 64 * float(jnp.finfo(wide.dtype).eps)
        mean = jnp.mean(jnp.abs(value - exact) ** 2) * 16 + jnp.mean(jnp.abs(value) ** 2) * unit**2
        boxes.append(Box(value - jnp.sqrt(mean), value + jnp.sqrt(mean)))
    return boxes


# --- values that are not bounded ------------------------------------------------------------------


def centre(value: Value) -> tuple[Array, Array]:
    """An array and, for each of its entries, how far the exact one may lie from it."""
    if not isinstance(value, Box):
        value = jnp.asarray(value)
        return value, jnp.zeros(value.shape, jnp.float64)
    point = middle(value)
    radius = jnp.maximum(point - value.lower, value.upper - point)
    return point, radius * (1 + 4 * UNIT) + float(jnp.finfo(jnp.float64).tiny)


def _size(value: Value) -> Array:
    """max |c|."""
    return jnp.max(jnp.maximum(jnp.abs(lower(value)), jnp.abs(upper(value))))


def proved(norm: Callable[[Array], Array], kernel: Value) -> Array:
    """A bound on the norm of a layer whose kernel is known up to a radius.

    A change E of the kernel changes a dense layer by at most ||E||_F in norm, and a convolution by
    at most the sum of ||E_t||_F over its taps t, each of which moves pixels and applies a matrix.
    """
    point, radius = centre(kernel)
    axes = (-2, -1) if point.ndim > 2 else None
    change = jnp.sum(jnp.sqrt(jnp.sum(radius**2, axes)))
    # The last term covers squares that vanish.
    return norm(point) + change * (1 + 2 * (point.size + 4) * UNIT) + point.size * 2.0**-510


# --- elementwise ----------------------------------------------------------------------------------
# Functions that act on each entry alone have the constant max |g'|. A maximum or minimum with a
# constant, and clamp, are 1-Lipschitz. Entries that are moved, dropped or joined by constants keep
# their distances or lose some; so do sorted ones, since sorting is continuous and a permutation,
# hence an isometry, on each of finitely many pieces. max over an axis: |max x' - max x| is at most
# the largest |x'_i - x_i|. The slopes of gelu, silu and their like are largest at one point, where
# they are below the numbers written here.

_ONE = """
    relu neg abs max min clamp tanh atan asinh sin cos softplus soft_sign add sub stop_gradient
    convert_element_type reshape transpose squeeze expand_dims rev slice split unstack concatenate
    stack select_n pad sort reduce_max reduce_min
"""

_STEEPEST = {"logistic": 0.25, "erf": 1.1284, "gelu_erf": 1.129, "gelu_tanh": 1.13, "silu": 1.0999,
             "mish": 1.0886, "hard_swish": 1.5}  # fmt: skip


def _only_first(eqn: Equation, place: int) -> None:
    if place != 0:
        raise unsupported(eqn, "lipschitz", f"operand {place} depends on the input; {_HINT}")


def _clamp(eqn, place, operands):
    if place != 1:
        raise unsupported(eqn, "lipschitz", f"the limits depend on the input; {_HINT}")
    return 1.0


def _pad(eqn, place, operands):
    _only_first(eqn, place)
    return 1.0


def _sort(eqn, place, operands):
    if len(eqn.inputs) != 1:
        raise unsupported(eqn, "lipschitz", f"only single arrays may be sorted; {_HINT}")
    return 1.0


def _select_n(eqn, place, operands):
    if place == 0:
        raise unsupported(eqn, "lipschitz", f"the condition depends on the input; {_HINT}")
    return 1.0


def _elu(eqn, place, operands):
    _only_first(eqn, place)
    return jnp.maximum(1.0, _size(operands[1]))  # a exp(x) below 0


def _leaky_relu(eqn, place, operands):
    _only_first(eqn, place)
    return jnp.maximum(1.0, _size(operands[1]))


def _mul(eqn, place, operands):
    return _size(operands[1 - place])


def _div(eqn, place, operands):
    _only_first(eqn, place)
    low, high = lower(operands[1]), upper(operands[1])
    least = jnp.where((low > 0) | (high < 0), jnp.minimum(jnp.abs(low), jnp.abs(high)), 0.0)
    return 1 / jnp.min(least) * (1 + 4 * UNIT)


# --- copies and sums ------------------------------------------------------------------------------
# n copies of each entry: sqrt(n). Sums of n entries each, every entry in one sum: sqrt(n) by
# Cauchy-Schwarz. Windows of w entries with every entry in at most m windows: ||A||^2 <= ||A||_inf
# ||A||_1 = w m for sums, and sum over windows of max^2 <= m sum of squares for maxima.


def _root(n: int) -> float:
    return math.sqrt(n) * (1 + 2 * UNIT)


def _broadcast(eqn, place, operands):
    return _root(math.prod(eqn.outputs[0].shape) // math.prod(eqn.inputs[0].shape))


def _reduce_sum(eqn, place, operands):
    return _root(math.prod(eqn.inputs[0].shape) // math.prod(eqn.outputs[0].shape))


def _overlap(eqn: Equation) -> int:
    """In how many windows an entry lies at the most."""
    if any(d != 1 for d in eqn.params["base_dilation"]):
        raise unsupported(eqn, "lipschitz", f"the input of the windows is dilated; {_HINT}")
    axes = zip(
        eqn.params["window_dimensions"],
        eqn.params["window_strides"],
        eqn.params["window_dilation"],
        strict=True,
    )
    return math.prod(-(-size // stride) if step == 1 else size for size, stride, step in axes)


def _window_sum(eqn, place, operands):
    return _root(math.prod(eqn.params["window_dimensions"]) * _overlap(eqn))


def _window_max(eqn, place, operands):
    return _root(_overlap(eqn))


# --- layers ---------------------------------------------------------------------------------------


def _dot_general(eqn, place, operands):
    """The kernel as matrices (p, contracted, free), one per entry of the axes paired with x.

    x contributes other axes, along which the same matrix acts on each slice: the layer is block
    diagonal, and its norm the largest of the blocks' norms.
    """
    contracting, pairs = eqn.params["dimension_numbers"]
    contracted, paired = contracting[1 - place], pairs[1 - place]
    shape = eqn.inputs[1 - place].shape
    free = [axis for axis in range(len(shape)) if axis not in (*contracted, *paired)]
    sizes = [math.prod(shape[a] for a in axes) for axes in (paired, contracted, free)]

    def norm(kernel):
        blocks = jnp.transpose(kernel, (*paired, *contracted, *free)).reshape(sizes)
        return jnp.max(jax.lax.map(constants.dense, blocks))

    return proved(norm, operands[1 - place])


def _conv(eqn, place, operands):
    _only_first(eqn, place)
    params, dims = eqn.params, eqn.params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise unsupported(eqn, "lipschitz", "use feature_group_count instead of batch groups")
    out, into, *window = dims.rhs_spec
    kernel = jax.tree.map(lambda k: jnp.transpose(k, (*window, into, out)), operands[1])
    shape = eqn.inputs[0].shape

    def norm(kernel):
        return constants.conv(
            kernel,
            [shape[axis] for axis in (*dims.lhs_spec[2:], dims.lhs_spec[1])],
            strides=params["window_strides"],
            padding=params["padding"],
            input_dilation=params["lhs_dilation"],
            kernel_dilation=params["rhs_dilation"],
            feature_group_count=params["feature_group_count"],
        )

    return proved(norm, kernel)


# --- the same in Linf -----------------------------------------------------------------------------
# Copies change as much as their originals; a sum of n entries by at most n times the largest
# change, a weighted one by the sum of the absolute weights.


def _row_sum(eqn, place, operands):
    return float(math.prod(eqn.inputs[0].shape) // math.prod(eqn.outputs[0].shape))


def _window_size(eqn, place, operands):
    return float(math.prod(eqn.params["window_dimensions"]))


def _absolute_sum(kernel: Value, axes: tuple[int, ...]) -> Array:
    size = jnp.maximum(jnp.abs(lower(kernel)), jnp.abs(upper(kernel)))
    n = math.prod(size.shape[axis] for axis in axes)
    # A sum of n numbers that may be stored as denormals, which XLA:CPU reads as 0.
    return jnp.max(jnp.sum(size, axes)) * (1 + 2 * (n + 4) * UNIT) + n * 2.0**-125


def _dot_general_linf(eqn, place, operands):
    contracting, _ = eqn.params["dimension_numbers"]
    return _absolute_sum(operands[1 - place], contracting[1 - place])


def _conv_linf(eqn, place, operands):
    _only_first(eqn, place)
    if eqn.params["batch_group_count"] != 1:
        raise unsupported(eqn, "lipschitz", "use feature_group_count instead of batch groups")
    return _absolute_sum(operands[1], eqn.params["dimension_numbers"].rhs_spec[1:])


def _is(slope: float) -> Rule:
    return lambda eqn, place, operands: slope


define(_ONE, _is(1.0))
for _name, _slope in _STEEPEST.items():
    define(_name, _is(_slope))
define("clamp", _clamp)
define("pad", _pad)
define("sort", _sort)
define("select_n", _select_n)
define("leaky_relu", _leaky_relu)
define("elu", _elu)
define("mul", _mul)
define("div", _div)

define("broadcast_in_dim", _broadcast, 2)
define("reduce_sum", _reduce_sum, 2)
define("reduce_window_sum", _window_sum, 2)
define("reduce_window_max", _window_max, 2)
define("dot_general", _dot_general, 2)
define("conv_general_dilated", _conv, 2)

define("broadcast_in_dim reduce_window_max", _is(1.0), math.inf)
define("reduce_sum", _row_sum, math.inf)
define("reduce_window_sum", _window_size, math.inf)
define("dot_general", _dot_general_linf, math.inf)
define("conv_general_dilated", _conv_linf, math.inf)
