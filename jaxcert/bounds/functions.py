"""Interval rules for the idioms: known functions whose range over a box is known exactly.

Values at single points come from bounding the function's own equations at that point, which counts
every rounding and loses nothing, because a point has no width to lose.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxcert.bounds.interpreter import Rule, Value, define, lower, output, upper
from jaxcert.graph import Equation, trace
from jaxcert.idioms import simplify
from jaxcert.sets import Array, Box


def at_point(eqn: Equation, point: Array, constants: Sequence[Value], outward: bool) -> Box:
    """The equation's result where its bounded operand is a single point."""
    if not outward:
        (result,) = eqn.bind(point, *constants)
        return Box(result, result)
    assert eqn.inner is not None
    result = output(eqn.inner, [Box(point, point), *constants], outward)
    return Box(lower(result), upper(result))


def _ends(eqn: Equation, values: Sequence[Value], outward: bool) -> tuple[Box, Box]:
    x, *constants = values
    return tuple(at_point(eqn, end, constants, outward) for end in (lower(x), upper(x)))  # type: ignore


def _increasing(eqn, values, outward):
    low, high = _ends(eqn, values, outward)
    return Box(low.lower, high.upper)


def _bends_at_zero(eqn, values, outward):
    """f(0) = 0, monotone on either side of it, in whichever direction."""
    low, high = _ends(eqn, values, outward)
    zero = jnp.where((lower(values[0]) <= 0) & (upper(values[0]) >= 0), 0.0, jnp.nan)
    return Box(
        jnp.fmin(jnp.minimum(low.lower, high.lower), zero),
        jnp.fmax(jnp.maximum(low.upper, high.upper), zero),
    )


def valley(bottom: float, least: float) -> Rule:
    """Falling down to its least value at `bottom`, rising from there.

    The constants are those of exact coefficients. In a model of another float type the coefficients
    are rounded, which moves the least value by less than 4 eps of that type and `bottom` by less
    than the margin.
    """

    def rule(eqn, values, outward):
        low, high = _ends(eqn, values, outward)
        (x,) = values
        spans = (lower(x) <= bottom + 1e-3) & (upper(x) >= bottom - 1e-3)
        floor = least - 4 * float(jnp.finfo(eqn.outputs[0].dtype).eps)
        return Box(
            jnp.where(spans, floor, jnp.minimum(low.lower, high.lower)),
            jnp.maximum(low.upper, high.upper),
        )

    return rule


define("softplus soft_sign", _increasing)
define("leaky_relu elu", _bends_at_zero)
define("silu", valley(-1.2784645427610738, -0.2784645427610738))
define("gelu_erf", valley(-0.7517915246935645, -0.1699712074799037))
define("gelu_tanh", valley(-0.7524614220710163, -0.1700407505712541))
define("mish", valley(-1.1924312145154952, -0.3088434130172504))
define("hard_swish", valley(-1.5, -0.375))


# softmax_i rises with x_i and falls with every other x_j. With
#     z_i = a_i - log sum_{j != i} e^{b_j},
# softmax_i = logistic(z_i) and log softmax_i = -softplus(-z_i); a = l, b = u gives the lower end
# and a = u, b = l the upper one. The sum is shifted by its own largest term, so that it lies between 1
# and k and neither under- nor overflows: that is the largest b, and for the entry that is itself
# the largest, the second largest. Sums without one term are running sums from both sides, because
# subtracting the term would cancel.


def _log_odds(a: Array, b: Array, top: Array, axis: int) -> Array:
    """z above; `top` marks one largest entry of b along the axis."""
    first = jnp.max(b, axis, keepdims=True)
    second = jnp.max(jnp.where(top, jnp.finfo(b.dtype).min, b), axis, keepdims=True)
    without_top = jnp.where(top, 0.0, jnp.exp(jnp.where(top, second, b) - second))
    rest_of_top = jnp.log(jnp.sum(without_top, axis, keepdims=True)) + second
    rest = jnp.where(top, 1.0, _others(jnp.exp(b - first), axis))
    return a - jnp.where(top, rest_of_top, jnp.log(rest) + first)


def _others(terms: Array, axis: int) -> Array:
    """For each entry along the axis, the sum of all other entries."""
    size = terms.shape[axis]
    zero = jnp.zeros_like(jax.lax.slice_in_dim(terms, 0, 1, axis=axis))
    before = jax.lax.cumsum(jax.lax.slice_in_dim(terms, 0, size - 1, axis=axis), axis)
    after = jax.lax.cumsum(jax.lax.slice_in_dim(terms, 1, size, axis=axis), axis, reverse=True)
    return jnp.concatenate([zero, before], axis) + jnp.concatenate([after, zero], axis)


def _linked(a: Array, b: Array, top: Array, *, link, axis: int) -> Array:
    return link(_log_odds(a, b, top, axis))


def normaliser(link: Callable[[Array], Array]) -> Rule:
    """softmax or log softmax, as an increasing function of the log odds."""

    def rule(eqn, values, outward):
        (x,), axis = values, eqn.params["axis"]
        if lower(x).shape[axis] == 1:
            return Box(*[link(jnp.full_like(end, jnp.inf)) for end in (lower(x), upper(x))])

        def end(a, b):
            largest = b == jnp.max(b, axis, keepdims=True)
            top = largest & (jax.lax.cumsum(largest.astype(jnp.int32), axis) == 1)
            if not outward:
                return link(_log_odds(a, b, top, axis))
            f = functools.partial(_linked, link=link, axis=axis)
            graph = simplify(trace(f, a, b, top, bounded=[True, True, False]))
            return output(graph, [Box(a, a), Box(b, b), top], outward)

        low, high = end(lower(x), upper(x)), end(upper(x), lower(x))
        return Box(lower(low), upper(high))

    return rule


define("softmax", normaliser(jax.nn.sigmoid))
define("log_softmax", normaliser(lambda z: -jax.nn.softplus(-z)))
