"""Lipschitz constants through a graph: each equation's constant times that of its operand.

Every rule below is a proof for one primitive, in the L2 norm. A primitive without one is an error:
taking it for 1 would certify what is not true. Two bounded operands are covered for sums only.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.bounds.interpreter import Value, lower, operand, upper
from jaxcert.bounds.rounding import TINY, UNIT
from jaxcert.errors import UnsupportedEquation
from jaxcert.graph import Equation, Graph, Var, holds_all, unsupported
from jaxcert.lipschitz import constants
from jaxcert.sets import Array, Box

Rule: TypeAlias = Callable[[Equation, int, list[Value]], Array | float]
"""(equation, position of the bounded operand, operands: None for it) -> its constant."""

RULES: dict[str, Rule] = {}

_HINT = (
    "covered are chains of dense and stride-1 convolution layers with 1-Lipschitz activations; for "
    "other models use bounds.certify with an L2Ball"
)


def speeds(graph: Graph, values: dict[Var, Value]) -> dict[Var, Array]:
    """For every bounded value of a float64 graph, a Lipschitz constant as a map of the input.

    Args:
      graph: a graph with one bounded input.
      values: what `interpret(..., outward=True)` gives; only values that are not bounded are used.
    """
    known = {graph.inputs[0]: jnp.ones(())}
    for eqn in graph.equations:
        if not eqn.bounded:
            continue
        if eqn.name == "convert_element_type" and _narrows(eqn):
            raise unsupported(eqn, "lipschitz", f"it rounds to a narrower type; {_HINT}")
        incoming = {
            i: known[a] for i, a in enumerate(eqn.inputs) if isinstance(a, Var) and a.bounded
        }
        if len(incoming) > 1:
            result = _sum(eqn, list(incoming.values()))
        else:
            ((place, speed),) = incoming.items()
            result = speed * _factor(eqn, place, values)
        known.update(dict.fromkeys(eqn.outputs, result * (1 + 4 * UNIT) + TINY))
    return known


def _narrows(eqn: Equation) -> bool:
    return not holds_all(eqn.outputs[0].dtype, eqn.inputs[0].dtype)


def _sum(eqn: Equation, incoming: list[Array]) -> Array:
    # |(f + g)(x') - (f + g)(x)| <= (L_f + L_g) |x' - x|, the triangle inequality.
    if eqn.name not in ("add", "sub"):
        raise unsupported(eqn, "lipschitz", f"both operands depend on the input; {_HINT}")
    return jnp.sum(jnp.stack(incoming))


def _factor(eqn: Equation, place: int, values: dict[Var, Value]) -> Array | float:
    if eqn.name not in RULES:
        raise unsupported(eqn, "lipschitz", _HINT)
    operands = [
        None if i == place else operand(values, atom, True) for i, atom in enumerate(eqn.inputs)
    ]
    try:
        return RULES[eqn.name](eqn, place, operands)
    except UnsupportedEquation as error:
        raise UnsupportedEquation(f"{error} ({eqn.where()})") from error


# --- values that are not bounded ------------------------------------------------------------------


def centre(value: Value) -> tuple[Array, Array]:
    """An array and, for each of its entries, how far the exact one may lie from it."""
    if not isinstance(value, Box):
        value = jnp.asarray(value)
        return value, jnp.zeros(value.shape, jnp.float64)
    middle = value.lower + (value.upper - value.lower) / 2
    radius = jnp.maximum(middle - value.lower, value.upper - middle)
    return middle, radius * (1 + 4 * UNIT) + float(jnp.finfo(jnp.float64).tiny)


def _size(value: Value) -> Array:
    """max |c|."""
    return jnp.max(jnp.maximum(jnp.abs(lower(value)), jnp.abs(upper(value))))


def _norm(kernel: Value, norm: Callable[[Array], Array]) -> Array:
    """A bound on the norm of a kernel that is known up to a radius.

    A change of one entry by r changes a dense or convolution layer by at most r in norm.
    """
    middle, radius = centre(kernel)
    return norm(middle) + jnp.sum(radius) * (1 + 2 * middle.size * UNIT)


# --- elementwise ----------------------------------------------------------------------------------
# Functions that act on each entry alone have the constant max |g'|. A maximum or minimum with a
# constant, and clamp, are 1-Lipschitz. Entries that are moved, dropped or joined by constants keep
# their distances or lose some; so do sorted ones, since sorting is continuous and a permutation,
# hence an isometry, on each of finitely many pieces. max over an axis: |max x' - max x| is at most
# the largest |x'_i - x_i|.

_ONE = """
    relu neg abs max min clamp tanh atan asinh sin cos softplus soft_sign add sub stop_gradient
    convert_element_type reshape transpose squeeze expand_dims rev slice pad sort
    reduce_max reduce_min
"""


def _one(eqn: Equation, place: int, operands: list[Value]) -> float:
    return 1.0


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


def _logistic(eqn, place, operands):
    return 0.25  # s' = s (1 - s)


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

    return _norm(operands[1 - place], norm)


def _conv(eqn, place, operands):
    _only_first(eqn, place)
    params, dims = eqn.params, eqn.params["dimension_numbers"]
    out, into, *window = dims.rhs_spec
    shape = eqn.inputs[0].shape

    def norm(kernel):
        return constants.conv(
            jnp.transpose(kernel, (*window, into, out)),
            [shape[axis] for axis in (*dims.lhs_spec[2:], dims.lhs_spec[1])],
            strides=params["window_strides"],
            padding=params["padding"],
            input_dilation=params["lhs_dilation"],
            kernel_dilation=params["rhs_dilation"],
            feature_group_count=params["feature_group_count"] * params["batch_group_count"],
        )

    return _norm(operands[1], norm)


RULES.update(dict.fromkeys(_ONE.split(), _one))
RULES.update(
    clamp=_clamp,
    pad=_pad,
    sort=_sort,
    logistic=_logistic,
    leaky_relu=_leaky_relu,
    mul=_mul,
    div=_div,
    broadcast_in_dim=_broadcast,
    reduce_sum=_reduce_sum,
    reduce_window_sum=_window_sum,
    reduce_window_max=_window_max,
    dot_general=_dot_general,
    conv_general_dilated=_conv,
)
