"""L2 certificates from a Lipschitz constant and the margin between the logits.

certify             of a model: constant and margin are found here
constant            of a model: the product of the constants of its layers
margin_certificate  of logits, for a constant that the caller has proved
"""

import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.bounds.interpreter import Value, interpret, lower, operand, upper
from jaxcert.bounds.rounding import UNIT
from jaxcert.certificate import Certificate, issue, predicted_class
from jaxcert.floats import ieee_float64, rounded_up
from jaxcert.graph import Atom, Graph, Var
from jaxcert.lipschitz.chain import centre, speeds
from jaxcert.model import Model, Structure, is_traced, output_shape, split, uses_float64
from jaxcert.sets import Box, L2Ball, checked
from jaxcert.tracing import trace_float64

Array: TypeAlias = jax.Array


def certify(f: Model, x: Any) -> Certificate:
    """Proves the L2 radius around each x within which f keeps its prediction.

    The constant of f up to its last dense layer is the product of proved constants of its layers
    (`chain.py`), and the radius is min_j (f_y - f_j) / (L ||w_y - w_j||) with the rows w of that
    layer. A model that does not end in a dense layer gets (f_y - max_j f_j) / (sqrt(2) L). Both
    are proofs about f over the reals with its stored weights: the logits are enclosed by `ibp`'s
    float64 interval arithmetic, and their rounding comes off the margin.

    Args:
      f: the model, (b, *input) -> (b, k) logits with independent rows.
      x: float (b, *input).

    Returns:
      A `Certificate` for the norm 2. Under jit and vmap as well; not differentiable. The constants
      are computed anew in every call: for many batches of one model pass them all at once.

    Raises:
      UnsupportedEquation: an equation of f has no proved Lipschitz constant.
      MixedRows: an example's output depends on other examples.
    """
    checked(L2Ball(x, 0.0))
    arrays, structure = split(f, x)
    output_shape(structure, arrays, x)
    prediction = _predict(arrays, structure, x)
    mode = uses_float64()
    with jax.enable_x64(True):
        arrays, x, prediction = ieee_float64((arrays, x, prediction))
        radius = _radius(arrays, structure, x, prediction, mode)
    return issue(prediction, radius, norm=2.0)


def constant(f: Model, input_shape: tuple[int, ...]) -> Array:
    """Proves an upper bound on the L2 Lipschitz constant of a model, layer by layer.

    Args:
      f: the model, (b, *input) -> (b, *out) with independent rows.
      input_shape: (*input), without the batch axis.

    Returns:
      A scalar in the default float type, rounded up: |f(x') - f(x)| <= constant |x' - x| for all x
      and x'. It is inf where the weights are not finite. Raises as `certify`.
    """
    dtype = jnp.result_type(float)
    arrays, structure = split(f, jax.ShapeDtypeStruct((1, *input_shape), dtype))
    mode = uses_float64()
    with jax.enable_x64(True):
        bound = _constant(ieee_float64(arrays), structure, tuple(input_shape), mode)
        return rounded_up(bound, dtype)


@functools.partial(jax.jit, static_argnums=1)
def _predict(arrays: list[Any], structure: Structure, x: Array) -> Array:
    return predicted_class(structure.build(arrays)(x))


@functools.partial(jax.jit, static_argnums=(1, 4))
def _radius(
    arrays: list[Any], structure: Structure, x: Array, prediction: Array, mode: bool
) -> Array:
    with jax.enable_x64(True):
        graph, _ = trace_float64(structure, arrays, x.shape, x.dtype, mode)
        # XLA:CPU reads denormals as 0, so the point that was meant lies this close to the one used.
        read_as_zero = 0.0 if x.dtype == jnp.float64 else float(jnp.finfo(jnp.float32).tiny)
        wide = x.astype(jnp.float64)
        values = interpret(graph, [Box(wide - read_as_zero, wide + read_as_zero)], outward=True)
        logits = operand(values, graph.outputs[0], True)
        slopes, speed = _slopes(graph, values)
        radius = margin_radius(prediction, lower(logits), upper(logits), slopes, speed)
        finite = jnp.all(jnp.isfinite(wide), axis=tuple(range(1, wide.ndim)))
        return jnp.where(finite, radius, 0.0)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _constant(arrays: list[Any], structure: Structure, shape: tuple[int, ...], mode: bool) -> Array:
    with jax.enable_x64(True):
        dtype = jnp.dtype(jnp.float64 if mode else jnp.float32)
        graph, _ = trace_float64(structure, arrays, (1, *shape), dtype, mode)
        weights = tuple(eqn for eqn in graph.equations if not eqn.bounded)
        values = interpret(Graph((), weights, ()), [], outward=True)
        speed = _speed(speeds(graph, values), graph.outputs[0])
        return jnp.where(jnp.isfinite(speed), speed, jnp.inf)


def _speed(constants: dict[Var, Array], atom: Any) -> Array:
    """The constant of a value; 0 for one that does not depend on the input."""
    return constants[atom] if isinstance(atom, Var) and atom.bounded else jnp.zeros(())


def _slopes(graph: Graph, values: dict[Var, Any]) -> tuple[Array | float, Array]:
    """Constants S_yj = slopes * speed of f_y - f_j, by rows of the last layer if there is one."""
    constants = speeds(graph, values)
    layer = _last_layer(graph)
    if layer is None:
        return ROOT_TWO, _speed(constants, graph.outputs[0])
    features, kernel = layer
    rows = jax.tree.map(jnp.transpose, operand(values, kernel, True))
    return row_distances(rows), constants[features]


def _last_layer(graph: Graph) -> tuple[Var, Atom] | None:
    """The input (b, d) and kernel (d, k) of a dense layer that only biases follow, or None."""
    producers = {out: eqn for eqn in graph.equations for out in eqn.outputs}
    current = graph.outputs[0]
    while isinstance(current, Var) and current in producers:
        eqn = producers[current]
        bounded = [a for a in eqn.inputs if isinstance(a, Var) and a.bounded]
        if len(bounded) != 1:
            return None
        if eqn.name == "dot_general":
            features, kernel = eqn.inputs
            plain = eqn.params["dimension_numbers"] == (((1,), (0,)), ((), ()))
            if features is bounded[0] and plain and len(features.shape) == 2 == len(kernel.shape):
                return bounded[0], kernel
        if eqn.name not in ("add", "sub"):
            return None
        current = bounded[0]
    return None


# --- margins --------------------------------------------------------------------------------------

ROOT_TWO = math.sqrt(2) * (1 + 4 * UNIT)


def margin_certificate(
    logits: Any,
    *,
    logit_constant: Any = None,
    backbone_constant: Any = None,
    rows: Any = None,
    logit_error: Any = None,
) -> Certificate:
    """Proves the L2 radius within which the largest logit stays the largest.

    Either `logit_constant=L`, a Lipschitz constant of the whole map x -> logits: the radius is
    (f_y - max_j f_j) / (sqrt(2) L) (Tsuzuku, Sato and Sugiyama, NeurIPS 2018, Proposition 1). Or
    `backbone_constant=L` of the map up to the input of the last layer, with that layer's weight
    `rows`: min_j (f_y - f_j) / (L ||w_y - w_j||), never smaller (Singla, Singla and Feizi, ICLR
    2022; Leino, Wang and Fredrikson, ICML 2021). The two constants have two names because the
    second form with the constant of the whole net would be wrong.

    What is proved about f rests on the arguments being what they are called. In particular the
    logits count as those of f, rounded once to their float type (off by at most one unit in the
    last place each). How much a forward pass rounds cannot be seen from its logits: pass a bound on
    it as `logit_error`, or let `lipschitz.certify`, which knows f, count it.

    Args:
      logits: float (b, k). A tie certifies nothing: radius 0. Logits that are not all finite give
        `ABSTAIN` and radius 0.
      logit_constant: positive, a scalar or one per example (b,), an upper bound.
      backbone_constant: likewise.
      rows: float (k, d), row j gives logit j = <row j, features> + bias. A Flax kernel is (d, k):
        pass `kernel.T`. A class with the same row as y never overtakes it and limits nothing; a
        radius that nothing limits (k = 1) is not finite and becomes 0.
      logit_error: absolute error of the logits, a scalar, (b,) or (b, k); replaces the default.

    Raises:
      TypeError: where not exactly one of the two forms is given.
      ValueError: for a concrete constant that is NaN, infinite or not above 0 (the constant 0 of a
        constant function included: no radius limits that), a negative error, or shapes that do not
        fit. Where such a value is traced, the radius is 0.

    Example:
      >>> certificate = margin_certificate(jnp.array([[3.0, 1.0], [1.0, 1.0]]), logit_constant=2.0)
      >>> print(certificate.prediction, certificate.radius.round(4))
      [0 0] [0.7071 0.    ]
    """
    _require_one_form(logit_constant, backbone_constant, rows)
    whole = backbone_constant is None
    constant = logit_constant if whole else backbone_constant
    _require_logits(logits)
    _require_constant(constant, "logit_constant" if whole else "backbone_constant", logits)
    _require_rows(rows, logits)
    _require_error(logit_error, logits)
    with jax.enable_x64(True):
        prediction, radius = _margin_radius(logits, logit_error, rows, constant)
    return issue(prediction, radius, norm=2.0)


@jax.jit
def _margin_radius(logits: Array, error: Any, rows: Any, constant: Any) -> tuple[Array, Array]:
    with jax.enable_x64(True):
        prediction = predicted_class(logits)
        low, high = _enclosed(logits, error)
        slopes = ROOT_TWO if rows is None else row_distances(rows)
        return prediction, margin_radius(prediction, low, high, slopes, constant)


def _enclosed(values: Array, error: Any) -> tuple[Array, Array]:
    """Logits with their error on both sides, float64 (b, k), rounded outward."""
    kind = jnp.finfo(values.dtype)
    values = values.astype(jnp.float64)
    if error is None:
        error = jnp.abs(values) * float(kind.eps) + float(kind.tiny)
    error = jnp.asarray(error, jnp.float64)
    error = error[:, None] if error.ndim == 1 else error
    error = jnp.where(error >= 0, error, jnp.nan)
    error = error + 4 * UNIT * (jnp.abs(values) + error)
    return values - error, values + error


# Let g_j = f_y - f_j, and S_j a Lipschitz constant of g_j. Then g_j(x') >= g_j(x) - S_j |x' - x|,
# which is above 0 as long as |x' - x| < g_j(x) / S_j. If f is L-Lipschitz, S_j = sqrt(2) L, since
# e_y - e_j has norm sqrt(2). If f = W h + c with h L-Lipschitz, S_j = L ||w_y - w_j||. The last
# factor keeps the computed radius below the quotient, so that `<=` may stand in the certificate.


def margin_radius(
    prediction: Array, low: Array, high: Array, slopes: Array | float, constant: Any
) -> Array:
    """min over j of (low_y - high_j) / (slopes_yj L), float64 (b,), rounded down.

    Args:
      prediction: y, int (b,).
      low: lower bounds of the logits, float64 (b, k).
      high: upper bounds of them.
      slopes: S / L for every pair of classes, (k, k), or one number for all.
      constant: L, a scalar or (b,). The radius is 0 where it is NaN, infinite or not above 0.
    """
    with jax.enable_x64(True):
        predicted = np.arange(low.shape[1], dtype=np.int32) == prediction[:, None]
        top = jnp.sum(jnp.where(predicted, low, 0.0), axis=1, keepdims=True)
        margin = top - high - 4 * UNIT * (jnp.abs(top) + jnp.abs(high))
        pairs = slopes[prediction] if isinstance(slopes, jax.Array) else slopes
        constant = jnp.asarray(constant, jnp.float64).reshape(-1, 1)
        constant = jnp.where((constant > 0) & jnp.isfinite(constant), constant, jnp.inf)
        radius = margin / (pairs * constant) * (1 - 16 * UNIT)
        return jnp.min(jnp.where(predicted, jnp.inf, radius), axis=1)


def row_distances(rows: Value) -> Array:
    """||w_i - w_j|| for all pairs of rows, float64 (k, k), rounded up.

    Args:
      rows: (k, d), an array or a `Box` around it. Memory: k (k + d) floats.
    """
    with jax.enable_x64(True):
        middle, radius = centre(rows)
        wide, d = middle.astype(jnp.float64), middle.shape[1]
        distances = jax.lax.map(lambda row: jnp.sqrt(jnp.sum((wide - row) ** 2, axis=1)), wide)
        # Denormal entries that XLA:CPU reads as 0, and squares below 1e-308.
        least = 2.0**-510 if middle.dtype == jnp.float64 else 2.0**-124
        off = 2 * jnp.max(jnp.sum(radius, axis=1)) + math.sqrt(d) * least
        return distances * (1 + (d + 8) * UNIT) + off * (1 + (d + 8) * UNIT)


def _require_one_form(logit_constant: Any, backbone_constant: Any, rows: Any) -> None:
    given = {"logit_constant": logit_constant, "backbone_constant": backbone_constant, "rows": rows}
    given = [name for name, value in given.items() if value is not None]
    if given not in (["logit_constant"], ["backbone_constant", "rows"]):
        raise TypeError(
            "pass either logit_constant= (of the whole net), or backbone_constant= (up to the "
            f"input of the last layer) with rows= (kernel.T); got {' and '.join(given) or 'none'}"
        )


def _require_logits(logits: Any) -> None:
    if not hasattr(logits, "dtype") or not jnp.issubdtype(logits.dtype, jnp.floating):
        got = getattr(logits, "dtype", type(logits).__name__)
        raise TypeError(f"logits must be a floating point array (b, k), got {got}")
    if logits.ndim != 2:
        raise ValueError(
            f"logits must have shape (b, k), got {logits.shape}; write logits[None] for one example"
        )


def _require_constant(constant: Any, name: str, logits: Any) -> None:
    if jnp.shape(constant) not in ((), logits.shape[:1]):
        raise ValueError(
            f"{name} must be a scalar or one per example {logits.shape[:1]}, got shape "
            f"{jnp.shape(constant)}"
        )
    if not is_traced(constant) and not np.all((np.asarray(constant) > 0) & np.isfinite(constant)):
        raise ValueError(f"{name} must be finite and above 0, got {constant}")


def _require_rows(rows: Any, logits: Any) -> None:
    if rows is None:
        return
    if jnp.ndim(rows) != 2 or rows.shape[0] != logits.shape[1]:
        raise ValueError(
            f"rows must be (k, d) with k={logits.shape[1]} classes, got {jnp.shape(rows)}; "
            "pass kernel.T for a Flax kernel (d, k)"
        )


def _require_error(error: Any, logits: Any) -> None:
    if error is None:
        return
    if jnp.shape(error) not in ((), logits.shape[:1], logits.shape):
        raise ValueError(
            f"logit_error must be a scalar, (b,) or (b, k) for logits {logits.shape}, "
            f"got shape {jnp.shape(error)}"
        )
    if not is_traced(error) and not np.all(np.asarray(error) >= 0):
        raise ValueError("logit_error must be >= 0 and not NaN")
