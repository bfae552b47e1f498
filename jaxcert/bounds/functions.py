"""Interval rules for the idioms: known functions whose range over a box is known exactly.

Values at single points come from bounding the function's own equations at that point, which counts
every rounding and loses nothing, because a point has no width to lose.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxcert.bounds.interpreter import Rule, Value, define, lower, output, upper
from jaxcert.bounds.rules import unless
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
    least, most = jnp.minimum(low.lower, high.lower), jnp.maximum(low.upper, high.upper)
    spans = (lower(values[0]) <= 0) & (upper(values[0]) >= 0)
    return Box(
        jnp.where(spans, jnp.minimum(least, 0.0), least),
        jnp.where(spans, jnp.maximum(most, 0.0), most),
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
        spans = (lower(x) <= bottom + 0.01) & (upper(x) >= bottom - 0.01)
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
# softmax_i = logistic(z_i) and log softmax_i = -softplus(-z_i); a = l, b = u give the lower end
# and a = u, b = l the upper one. The sum is shifted by its own largest term, so that it lies
# between 1 and k and neither under- nor overflows: that is the largest b, and for the entry that is
# itself the largest, the second largest. Sums without one term are running sums from both sides,
# because subtracting the term would cancel. What the model itself subtracts before it exponentiates
# does not matter, if finite.
#
# An entry masked by -inf counts as the least finite number: e^b is then as good as zero beside any
# entry that is not near that number itself, and where all are, nothing is known. Its own result is
# the limit, 0 or -inf.


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
        (x, shift), (axis,) = values, eqn.params["axes"]
        least = float(jnp.finfo(lower(x).dtype).min)
        masked = lower(x) == -jnp.inf
        unclear = jnp.any(masked, axis, keepdims=True) & (
            jnp.max(lower(x), axis, keepdims=True) < least / 2
        )
        unclear |= ~(jnp.isfinite(lower(shift)) & jnp.isfinite(upper(shift)))
        if lower(x).shape[axis] == 1:
            unclear |= jnp.isnan(lower(x)) | jnp.isnan(upper(x))
            certain = link(jnp.full_like(lower(x), jnp.inf))
            return unless(unclear, Box(certain, certain))

        def end(a, b):
            a, b = jnp.maximum(a, least), jnp.maximum(b, least)
            largest = b == jnp.max(b, axis, keepdims=True)
            top = largest & (jax.lax.cumsum(largest.astype(jnp.int32), axis) == 1)
            if not outward:
                return link(_log_odds(a, b, top, axis))
            f = functools.partial(_linked, link=link, axis=axis)
            graph = simplify(trace(f, a, b, top, bounded=[True, True, False]))
            return output(graph, [Box(a, a), Box(b, b), top], outward)

        low, high = end(lower(x), upper(x)), end(upper(x), lower(x))
        limit = link(jnp.full((), -jnp.inf, lower(x).dtype))
        low = jnp.where(masked, limit, lower(low))
        high = jnp.where(upper(x) == -jnp.inf, limit, upper(high))
        return unless(unclear, Box(low, high))

    return rule


define("softmax", normaliser(jax.nn.sigmoid))
define("log_softmax", normaliser(lambda z: -jax.nn.softplus(-z)))


# The variance of n numbers is min_t mean (x_i - t)^2, so the mean of the largest squares about any
# one t is an upper bound. With P the projection x -> x - mean(x) it is also |P x|^2 / n, which is
# convex, so that each tangent v gives a lower bound that is linear in x,
#     |P x|^2 >= 2 <P v, x> - |P v|^2.
# The best v is the point of the box whose entries lie nearest to a common t; any v is sound.


def _largest_mean_square(low: Array, high: Array, t: Array, axes: tuple[int, ...]) -> Array:
    return jnp.mean(jnp.maximum(jnp.square(low - t), jnp.square(high - t)), axes)


def _tangent(x: Array, v: Array, axes: tuple[int, ...]) -> Array:
    direction = v - jnp.mean(v, axes, keepdims=True)
    return jnp.mean(2 * direction * x, axes) - jnp.mean(jnp.square(direction), axes)


def _most_alike(low: Array, high: Array, axes: tuple[int, ...]) -> Array:
    """The point of the box nearest to a common t; t by bisection on the sum of the distances."""

    def halve(_, ends):
        a, b = ends
        t = a / 2 + b / 2
        rises = jnp.sum(t - jnp.clip(t, low, high), axes, keepdims=True) > 0
        return jnp.where(rises, a, t), jnp.where(rises, t, b)

    ends = jnp.min(low, axes, keepdims=True), jnp.max(high, axes, keepdims=True)
    a, b = jax.lax.fori_loop(0, 60, halve, ends)
    return jnp.clip(a / 2 + b / 2, low, high)


def _variance(eqn, values, outward):
    x, axes = values[0], eqn.params["axes"]
    t = jnp.mean(lower(x) / 2 + upper(x) / 2, axes, keepdims=True)
    v = jax.lax.stop_gradient(_most_alike(lower(x), upper(x), axes))
    above = functools.partial(_largest_mean_square, axes=axes)
    below = functools.partial(_tangent, axes=axes)
    low = _enclosed(below, [Box(lower(x), upper(x)), v], outward)
    high = _enclosed(above, [lower(x), upper(x), t], outward)
    return Box(jnp.maximum(lower(low), 0), upper(high))


def _enclosed(f: Callable[..., Array], values: Sequence[Value], outward: bool) -> Value:
    """f over boxes and, in a proof, with its own rounding counted."""
    boxes = [v if isinstance(v, Box) or not outward else Box(v, v) for v in values]
    return output(trace(f, *map(lower, boxes)), boxes, outward)


define("variance", _variance)
