"""L2 and Linf certificates from a Lipschitz constant and the margin between the logits.

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

from jaxcert.bounds.interpreter import Value, lower, operand, upper
from jaxcert.bounds.rounding import UNIT
from jaxcert.certificate import Certificate, issue, predicted_class
from jaxcert.floats import ieee_float64, rounded_up
from jaxcert.graph import Atom, Graph, Var
from jaxcert.lipschitz import composite  # noqa: F401  (enters the rules of blocks)
from jaxcert.lipschitz.chain import centre, factors, speeds, stored_weights, weights
from jaxcert.lipschitz.enclosure import enclosed
from jaxcert.model import Model, Structure, is_traced, output_shape, split, uses_float64
from jaxcert.sets import Box, L2Ball, checked
from jaxcert.tracing import trace_float64

Array: TypeAlias = jax.Array


def certify(f: Model, x: Any, *, norm: float = 2) -> Certificate:
    """Proves the radius around each x within which f keeps its prediction.

    The constant of f up to its last dense layer comes from proved constants of its layers
    (`chain.py`, `composite.py`), and the radius is min_j (f_y - f_j) / (L ||w_y - w_j||) with the
    rows w of that layer, in the dual norm. A model that does not end in a dense layer gets
    (f_y - max_j f_j) / (sqrt(2) L) in L2 and (f_y - max_j f_j) / (2 L) in Linf. These are proofs
    about f over the reals with its stored weights: the logits are computed in float64, and what
    that may round (`enclosure.py`) comes off the margin. The weights of `jaxcert.nn` are those
    that the model computes from its parameters, which `jaxcert.nn.freeze` would store.

    Args:
      f: the model, (b, *input) -> (b, k) logits with independent rows.
      x: float (b, *input).
      norm: 2, or `jnp.inf` for nets built for it (`nn.LinfDistDense`, `nn.SortDense`).

    Returns:
      A `Certificate` for the norm. Under jit and vmap as well; not differentiable. The constants
      are computed anew in every call: for many batches of one model pass them all at once.

    Raises:
      UnsupportedEquation: an equation of f has no proved Lipschitz constant.
      MixedRows: an example's output depends on other examples.
    """
    _require_norm(norm)
    checked(L2Ball(x, 0.0))
    arrays, structure = split(f, x)
    output_shape(structure, arrays, x)
    prediction = _predict(arrays, structure, x)
    mode = uses_float64()
    with jax.enable_x64(True):
        arrays, x, prediction = ieee_float64((arrays, x, prediction))
        radius = _radius(arrays, structure, x, prediction, mode, norm)
    return issue(prediction, radius, norm=float(norm))


def constant(f: Model, input_shape: tuple[int, ...], *, norm: float = 2) -> Array:
    """Proves an upper bound on the Lipschitz constant of a model, layer by layer.

    Args:
      f: the model, (b, *input) -> (b, *out) with independent rows.
      input_shape: (*input), without the batch axis.
      norm: 2 or `jnp.inf`, of the inputs and of the outputs.

    Returns:
      A scalar in the default float type, rounded up: |f(x') - f(x)| <= constant |x' - x| for all x
      and x'. It is inf where the weights are not finite. Raises as `certify`.
    """
    _require_norm(norm)
    dtype = jnp.result_type(float)
    x = jax.ShapeDtypeStruct((1, *input_shape), dtype)
    arrays, structure = split(f)
    _require_input(arrays, structure, x)
    arrays, structure = split(f, x)
    mode = uses_float64()
    with jax.enable_x64(True):
        bound = _constant(ieee_float64(arrays), structure, tuple(input_shape), mode, norm)
        return rounded_up(bound, dtype)


@functools.partial(jax.jit, static_argnums=1)
def _predict(arrays: list[Any], structure: Structure, x: Array) -> Array:
    return predicted_class(structure.build(arrays)(x))


@functools.partial(jax.jit, static_argnums=(1, 4, 5))
def _radius(
    arrays: list[Any], structure: Structure, x: Array, prediction: Array, mode: bool, norm: float
) -> Array:
    with jax.enable_x64(True):
        traced = trace_float64(structure, arrays, x.shape, x.dtype, mode, whole=True)
        graph = traced[0]
        # XLA:CPU reads denormals as 0, so the point that was meant lies this close to the one used.
        read_as_zero = 0.0 if x.dtype == jnp.float64 else float(jnp.finfo(jnp.float32).tiny)
        wide = x.astype(jnp.float64)
        values = weights(graph)
        constants = factors(graph, values, norm)
        around = Box(wide - read_as_zero, wide + read_as_zero)
        logits = enclosed(traced, constants, stored_weights(graph), around, norm)
        slopes, speed = _slopes(graph, values, speeds(graph, constants, norm), norm)
        radius = margin_radius(prediction, lower(logits), upper(logits), slopes, speed)
        finite = jnp.all(jnp.isfinite(wide), axis=tuple(range(1, wide.ndim)))
        return jnp.where(finite, radius, 0.0)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _constant(
    arrays: list[Any], structure: Structure, shape: tuple[int, ...], mode: bool, norm: float
) -> Array:
    with jax.enable_x64(True):
        dtype = jnp.dtype(jnp.float64 if mode else jnp.float32)
        graph, _ = trace_float64(structure, arrays, (1, *shape), dtype, mode, whole=True)
        constants = factors(graph, weights(graph), norm)
        speed = _speed(speeds(graph, constants, norm), graph.outputs[0])
        return jnp.where(jnp.isfinite(speed), speed, jnp.inf)


def _speed(constants: dict[Var, Array], atom: Any) -> Array:
    """The constant of a value; 0 for one that does not depend on the input."""
    return constants[atom] if isinstance(atom, Var) and atom.bounded else jnp.zeros(())


def _slopes(
    graph: Graph, values: dict[Var, Any], constants: dict[Var, Array], norm: float
) -> tuple[Array | float, Array]:
    """Constants S_yj = slopes * speed of f_y - f_j, by rows of the last layer if there is one."""
    layer = _last_layer(graph)
    if layer is None:
        return BETWEEN_LOGITS[norm], _speed(constants, graph.outputs[0])
    features, kernel = layer
    rows = jax.tree.map(jnp.transpose, operand(values, kernel, True))
    return row_distances(rows, norm), constants[features]


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

BETWEEN_LOGITS = {2: math.sqrt(2) * (1 + 4 * UNIT), math.inf: 2.0}
"""The dual norm of e_y - e_j."""


def margin_certificate(
    logits: Any,
    *,
    logit_constant: Any = None,
    backbone_constant: Any = None,
    rows: Any = None,
    logit_error: Any = None,
    norm: float = 2,
) -> Certificate:
    """Proves the radius within which the largest logit stays the largest.

    Either `logit_constant=L`, a Lipschitz constant of the whole map x -> logits: the radius is
    (f_y - max_j f_j) / (sqrt(2) L) (Tsuzuku, Sato and Sugiyama, NeurIPS 2018, Proposition 1). Or
    `backbone_constant=L` of the map up to the input of the last layer, with that layer's weight
    `rows`: min_j (f_y - f_j) / (L ||w_y - w_j||), never smaller (Singla, Singla and Feizi, ICLR
    2022; Leino, Wang and Fredrikson, ICML 2021). The two constants have two names because the
    second form with the constant of the whole net would be wrong. In Linf the radii are
    (f_y - max_j f_j) / (2 L) (Zhang et al., ICML 2021) and the second form with the L1 norm.

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
      norm: 2 or `jnp.inf`, which the constants are about and the radius is in.

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
    _require_norm(norm)
    _require_one_form(logit_constant, backbone_constant, rows)
    whole = backbone_constant is None
    constant = logit_constant if whole else backbone_constant
    _require_logits(logits)
    _require_constant(constant, "logit_constant" if whole else "backbone_constant", logits)
    _require_rows(rows, logits)
    _require_error(logit_error, logits)
    with jax.enable_x64(True):
        prediction, radius = _margin_radius(logits, logit_error, rows, constant, norm)
    return issue(prediction, radius, norm=float(norm))


@functools.partial(jax.jit, static_argnums=4)
def _margin_radius(
    logits: Array, error: Any, rows: Any, constant: Any, norm: float
) -> tuple[Array, Array]:
    with jax.enable_x64(True):
        prediction = predicted_class(logits)
        low, high = _enclosed(logits, error)
        slopes = BETWEEN_LOGITS[norm] if rows is None else row_distances(rows, norm)
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
# e_y - e_j has norm sqrt(2); in Linf S_j = 2 L, its L1 norm. If f = W h + c with h L-Lipschitz,
# S_j = L ||w_y - w_j||, the L2 norm or, in Linf, the L1 norm (Hoelder's inequality). The last
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


def row_distances(rows: Value, norm: float = 2) -> Array:
    """||w_i - w_j|| for all pairs of rows in the dual norm, float64 (k, k), rounded up.

    Args:
      rows: (k, d), an array or a `Box` around it. Memory: k (k + d) floats.
    """
    with jax.enable_x64(True):
        middle, radius = centre(rows)
        wide, d = middle.astype(jnp.float64), middle.shape[1]

        def distance(row):
            apart = jnp.abs(wide - row)
            return jnp.sqrt(jnp.sum(apart**2, axis=1)) if norm == 2 else jnp.sum(apart, axis=1)

        distances = jax.lax.map(distance, wide)
        # Denormal entries that XLA:CPU reads as 0, and squares below 1e-308.
        least = 2.0**-510 if middle.dtype == jnp.float64 else 2.0**-124
        off = 2 * jnp.max(jnp.sum(radius, axis=1)) + d * least
        return distances * (1 + (d + 8) * UNIT) + off * (1 + (d + 8) * UNIT)


def _require_norm(norm: float) -> None:
    if norm not in BETWEEN_LOGITS:
        raise ValueError(f"Lipschitz certificates are for norm=2 or norm=jnp.inf, got {norm!r}")


def _require_input(arrays: list[Any], structure: Structure, x: jax.ShapeDtypeStruct) -> None:
    try:
        jax.eval_shape(lambda arrays, x: structure.build(arrays)(x), arrays, x)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the model takes no inputs of shape (b, {', '.join(map(str, x.shape[1:]))}), which "
            f"input_shape={x.shape[1:]} says; leave out the batch axis. It raised: {error}"
        ) from error


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
