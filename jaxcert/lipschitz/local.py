"""Lipschitz constants on sets of inputs, tighter than on the whole space, and radii they prove.

For x and x' in a set S, the operand of every activation lies in a proved interval at both, so its
secant slope lies between the least and the greatest derivative on that interval: relus that keep
their sign on S become linear. The rest is as on the whole space, for every example by itself.

Everything happens with the graph for two examples that the matrices came from, so that slopes and
matrices surely belong to the same neurons; a batch goes through it pair by pair.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.bounds.concretise import box_of
from jaxcert.bounds.interpreter import interpret, lower, operand, upper
from jaxcert.bounds.linear import bounder, crown
from jaxcert.bounds.rounding import TINY, UNIT
from jaxcert.bounds.transform import Method
from jaxcert.bounds.walk import Walk
from jaxcert.certificate import Certificate, issue, predicted_class
from jaxcert.floats import ieee_float64, rounded_up
from jaxcert.graph import Var
from jaxcert.lipschitz import ellipsoids, layerwise
from jaxcert.lipschitz.chain import stored_weights
from jaxcert.lipschitz.ellipsoids import Layer, Multipliers
from jaxcert.lipschitz.estimate import (
    Net,
    layers_and_slopes,
    norm_constant,
    require_search,
    rules,
)
from jaxcert.lipschitz.feedforward import cut, slopes_of
from jaxcert.lipschitz.slopes import Slopes
from jaxcert.model import Model, Structure, as_float64, output_shape, split, uses_float64
from jaxcert.sets import AnySet, Array, Box, InputSet, L2Ball, checked, like, uncut


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What a compiled proof depends on beside arrays."""

    net: Net
    method: Method
    steps: int
    rate: float
    tries: int = 0


def local_constant(
    f: Model,
    region: AnySet,
    *,
    method: Method = crown,
    steps: int = 20,
    learning_rate: float = 0.3,
) -> Array:
    """Proves, for each example, an upper bound on the L2 Lipschitz constant of f on its set.

    Args:
      f: the model, as for `product_bound`.
      region: where inputs lie, usually an `L2Ball`; any set, for |f(x') - f(x)| <= constant |x' -
        x| for all x and x' in it.
      method: what bounds the operands of activations: `bounds.crown` (also with options, in a
        `functools.partial`), or `bounds.ibp`, which is faster.
      steps: of gradient descent on the multipliers, see `lipsdp_bound`; with 0 they are those of
        ECLipsE-Fast, which is much faster.
      learning_rate: of these steps.

    Returns:
      (b,) in the default float type, rounded up, all rounding counted; inf where nothing is proved.
      Works under jit and vmap; not differentiable. Memory and errors as for `product_bound`.

    Example:
      >>> from jaxcert import L2Ball
      >>> x = jnp.array([[2.0, 0.0], [0.5, 0.0]])
      >>> constant = local_constant(jax.nn.relu, L2Ball(-x, 1.0), steps=0)
      >>> print(constant.round(3))
      [1. 1.]
    """
    require_search(steps, learning_rate)
    region = uncut(checked(region))
    dtype = jnp.result_type(float)
    arrays, net = _split(f, like(region))
    setting = _Setting(net, method, steps, learning_rate)
    with jax.enable_x64(True):
        arrays, region = ieee_float64((arrays, region))
        layers, _ = layers_and_slopes(net, arrays)
        return rounded_up(_local(setting, arrays, layers, region), dtype)


def _split(f: Model, x: Any) -> tuple[list[Any], Net]:
    arrays, structure = split(f, x)
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    return arrays, Net(structure, jnp.shape(x)[1:], dtype, uses_float64(), rules())


@functools.partial(jax.jit, static_argnums=0)
def _local(setting: _Setting, arrays: list[Any], layers: list[Layer], region: InputSet) -> Array:
    with jax.enable_x64(True):
        hidden = _Hidden(setting, arrays)
        pairs, count = _in_pairs(as_float64(region))

        def constant(each: tuple[list[Slopes], Array]) -> Array:
            return norm_constant(layers, each[0], setting.steps, setting.rate)

        def constants(pair: InputSet) -> Array:
            return jax.lax.map(constant, (hidden.slopes(pair), jnp.arange(2)))

        return jax.lax.map(constants, pairs).reshape(-1)[:count]


class _Hidden:
    """What happens between the layers of a model on sets of inputs, for pairs of examples."""

    def __init__(self, setting: _Setting, arrays: list[Any]):
        traced = setting.net.traced(arrays)
        self.rows, self.method = traced[1], setting.method
        self.chain = cut(traced)
        self.known = stored_weights(self.chain.graph)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(2, n) for every activation layer."""
        return [(2, math.prod(s.target.shape) // 2) for s in self.chain.segments[:-1]]

    def slopes(self, pair: InputSet) -> list[Slopes]:
        """(2, n) for every activation layer, on the sets of two examples."""
        return slopes_of(self.chain, self.known, self._boxes(pair))

    def _boxes(self, pair: InputSet) -> dict[Var, Any]:
        if not self.chain.segments[:-1]:
            return {}
        refine = bounder(self.method)
        if refine is None:
            return interpret(self.chain.graph, [box_of(pair, True)], outward=True)
        walk = Walk(self.chain.graph, self.rows, pair, True)
        walk.run(refine)
        return walk.boxes

    def logits(self, x: Array) -> Box:
        """Enclosures (2, k) at two inputs."""
        values = interpret(self.chain.graph, [Box(x, x)], outward=True)
        found = operand(values, self.chain.graph.outputs[0], True)
        return Box(lower(found), upper(found))


def _in_pairs(region: Any) -> tuple[Any, int]:
    """A pytree of arrays (b, ...) as (ceil(b / 2), 2, ...), the last one repeated; and b."""
    if not isinstance(region, Box):
        shape = jnp.shape(region.x)
        eps = jnp.broadcast_to(jnp.asarray(region.eps, jnp.float64), shape[:1])
        valid = region.valid
        if valid is not None:
            ends = (jnp.asarray(end, jnp.float64) for end in (valid.lower, valid.upper))
            valid = Box(*[jnp.broadcast_to(end, shape) for end in ends])
        region = dataclasses.replace(region, eps=eps, valid=valid)
    count = jnp.shape(like(region))[0]
    return jax.tree.map(_paired, region), count


def _paired(array: Array) -> Array:
    if array.shape[0] % 2:
        array = jnp.concatenate([array, array[-1:]])
    return array.reshape(-1, 2, *array.shape[1:])


# --- radii ----------------------------------------------------------------------------------------
# Let S be the ball of radius r_0 around x, and L_j a constant of f_y - f_j on S: L_j^2 is at least
# (e_y - e_j)' G (e_y - e_j). For |x' - x| <= r_0 both points are in S, so (f_y - f_j)(x') >= (f_y -
# f_j)(x) - L_j |x' - x|, and y stays the largest logit within R(r_0) = min_j (f_y - f_j)(x) / L_j,
# as long as that is at most r_0: min(R(r_0), r_0) is certified for every r_0. R falls with r_0, so
# the best r_0 is where R(r_0) = r_0, and lies between r_0 and R(r_0) for each r_0 that was tried;
# how good the result is depends on that, not whether it holds.


def certify_local(
    f: Model,
    x: Any,
    *,
    largest: Any = 1.0,
    valid: Box | None = None,
    method: Method = crown,
    tries: int = 8,
    steps: int = 5,
    learning_rate: float = 0.3,
) -> Certificate:
    """Proves an L2 radius around each x within which f keeps its prediction, by local constants.

    For a ball around x and a Lipschitz constant L_j of f_y - f_j on it, the radius is the smaller
    one of the ball's and of min_j (f_y - f_j) / L_j; the ball's is found by bisection for each
    example. Rounding is counted in logits, constants and quotients.

    Args:
      f: the model, as for `product_bound`, with logits (b, k), k >= 2.
      x: float (b, *input).
      largest: the largest radius to try, a scalar or one per example (b,).
      valid: a `Box` that every input lies in anyway.
      method: what bounds the operands of activations, as for `local_constant`.
      tries: how many radii are tried.
      steps: of gradient descent on the multipliers for each of these, from where the one before
        ended.
      learning_rate: of these steps.

    Returns:
      A `Certificate` for the norm 2, with radius 0 where nothing is proved. Works under jit and
      vmap; not differentiable. Memory and errors as for `product_bound`.
    """
    require_search(steps, learning_rate)
    if tries < 1:
        raise ValueError(f"tries must be at least 1, got {tries}")
    region: Any = checked(L2Ball(x, largest, valid))
    arrays, net = _split(f, region.x)
    if output_shape(net.structure, arrays, region.x).shape[1] < 2:
        raise ValueError("the model must return at least 2 logits, (b, k) with k >= 2")
    prediction = _predict(arrays, net.structure, region.x)
    setting = _Setting(net, method, steps, learning_rate, tries)
    with jax.enable_x64(True):
        arrays, region, prediction = ieee_float64((arrays, region, prediction))
        layers, _ = layers_and_slopes(net, arrays)
        radius = _radius(setting, arrays, layers, region, prediction)
    return issue(prediction, radius, norm=2.0, within=region.valid)


@functools.partial(jax.jit, static_argnums=1)
def _predict(arrays: list[Any], structure: Structure, x: Array) -> Array:
    return predicted_class(structure.build(arrays)(x))


@functools.partial(jax.jit, static_argnums=0)
def _radius(
    setting: _Setting, arrays: list[Any], layers: list[Layer], ball: L2Ball, prediction: Array
) -> Array:
    with jax.enable_x64(True):
        if not layers:
            return jnp.zeros(prediction.shape)
        hidden = _Hidden(setting, arrays)
        pairs, count = _in_pairs(as_float64(ball))

        def radii(pair: Any) -> Array:
            return _radii_of_pair(setting, hidden, layers, *pair)

        return jax.lax.map(radii, (pairs, _paired(prediction))).reshape(-1)[:count]


def _radii_of_pair(
    setting: _Setting, hidden: _Hidden, layers: list[Layer], ball: L2Ball, prediction: Array
) -> Array:
    logits = hidden.logits(ball.x)
    chosen = np.arange(logits.lower.shape[1], dtype=np.int32) == prediction[:, None]
    top = jnp.sum(jnp.where(chosen, logits.lower, 0.0), axis=1, keepdims=True)
    margin = top - logits.upper - 4 * UNIT * (jnp.abs(top) + jnp.abs(logits.upper))
    largest = jnp.broadcast_to(jnp.asarray(ball.eps, jnp.float64), prediction.shape)

    def attempt(_: Any, state: Any) -> Any:
        low, high, tried, best, ahead = state
        slopes = hidden.slopes(dataclasses.replace(ball, eps=tried))

        def of_one(each: Any) -> Any:
            return _radius_of_one(setting, layers, *each)

        reach, ahead = jax.lax.map(of_one, (slopes, chosen, margin, ahead))
        best = jnp.fmax(best, jnp.minimum(reach, tried))
        inside = reach >= tried  # the best radius to try lies between these two
        low = jnp.where(inside, tried, jnp.fmax(low, reach))
        high = jnp.where(inside, jnp.fmin(high, reach), tried)
        return low, high, low / 2 + high / 2, best, ahead

    nothing = jnp.zeros_like(largest)
    ahead = Multipliers(
        tuple(jnp.zeros(size) for size in hidden.sizes),
        tuple(jnp.zeros(size[:1]) for size in hidden.sizes),
    )
    state = nothing, largest, largest, nothing, ahead
    return jax.lax.fori_loop(0, setting.tries, attempt, state)[3]


def _radius_of_one(
    setting: _Setting,
    layers: list[Layer],
    slopes: list[Slopes],
    chosen: Array,
    margin: Array,
    ahead: Multipliers,
) -> tuple[Array, Multipliers]:
    """The radius that local slopes prove, and how far the multipliers are from their start."""
    plain = [layer.matrix for layer in layers]
    needed = jnp.where(chosen, jnp.inf, jnp.maximum(margin, 2.0**-200))

    def goal(g: Array) -> Array:
        """Minus the logarithm of the radius, up to a constant."""
        return jnp.log(jnp.max(ellipsoids.pairs(g, chosen) / jnp.square(needed)) + 2.0**-900) / 2

    first = ellipsoids.start(plain, slopes)
    moved = jax.tree.map(jnp.add, first, ahead)
    found = ellipsoids.optimised(plain, slopes, moved, goal, setting.steps, setting.rate)
    _, scales = ellipsoids.recursion(plain, slopes, found)
    bounds = ellipsoids.pair_bounds(ellipsoids.output_bound(layers, slopes, scales), chosen)
    scale = ellipsoids.product([layer.scale for layer in layers])
    product = layerwise.product_of_norms(layers, slopes) * math.sqrt(2) * (1 + 4 * UNIT)
    constant = jnp.fmin(bounds * scale * (1 + 4 * UNIT) + TINY, product)
    radius = jnp.where(chosen, jnp.inf, margin / constant * (1 - 16 * UNIT))
    radius = jnp.min(jnp.where(jnp.isnan(radius), 0.0, radius))
    ahead = jax.tree.map(jnp.subtract, found, first)
    return radius, jax.tree.map(lambda a: jnp.where(jnp.isfinite(a), a, 0.0), ahead)
