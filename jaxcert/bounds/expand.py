"""Functions of several bounded operands as compositions of simpler ones.

A maximum is y + relu(x - y), a quotient x times 1 / y, a softmax 1 / sum_j exp(x_j - x_i), a
variance the mean of the squares of centred numbers. Each rewrite is an identity of real functions,
so what is proved of the composition holds for the function; and each was chosen because its
pieces have tight lines. The interval of the original equation stays at hand, which is sometimes
the narrower one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcert.graph import Atom, Equation, Graph, Var, prune, splice, trace
from jaxcert.idioms import simplify


@dataclasses.dataclass(frozen=True)
class Expanded:
    """A graph after expansion.

    Attributes:
      graph: the graph of the simpler equations.
      originals: for the result of each expanded equation, that equation with the operands it has
        in the new graph; its interval rule holds too.
      coarse: operands whose boxes are not worth a linear bound of their own, because the box of
        the expanded equation's operand is bounded that way instead.
      fine: operands of expanded equations for which that is so.
    """

    graph: Graph
    originals: dict[Var, Equation]
    coarse: frozenset[Var]
    fine: frozenset[Var]


def expand(graph: Graph) -> Expanded:
    """The graph with every compound equation written out."""
    renamed: dict[Var, Atom] = {}
    equations: list[Equation] = []
    originals: dict[Var, Equation] = {}
    coarse: set[Var] = set()
    fine: set[Var] = set()
    for eqn in graph.equations:
        inputs = tuple(renamed.get(a, a) if isinstance(a, Var) else a for a in eqn.inputs)
        eqn = dataclasses.replace(eqn, inputs=inputs)
        rewrite = REWRITES.get(eqn.name)
        simpler = rewrite(eqn) if rewrite is not None and eqn.bounded else None
        if simpler is None:
            equations.append(eqn)
            continue
        part = _traced(simpler, eqn)
        start = len(equations)
        result = splice(part, inputs, equations)
        renamed[eqn.outputs[0]] = result
        originals[result] = dataclasses.replace(eqn, outputs=(result,))
        if eqn.name in _BOUND_OPERANDS:
            fine.update(a for a in inputs if isinstance(a, Var) and a.bounded)
            coarse.update(out for new in equations[start:] for out in new.outputs)
    outputs = tuple(renamed.get(a, a) if isinstance(a, Var) else a for a in graph.outputs)
    new = dataclasses.replace(graph, equations=tuple(equations), outputs=outputs)
    alive = prune(new)
    # An original may read what its expansion does not, a softmax's shift for one.
    operands = [a for eqn in originals.values() for a in eqn.inputs]
    both = prune(dataclasses.replace(new, outputs=(*outputs, *operands)))
    needed = {a for e in alive.equations for a in e.inputs if isinstance(a, Var)}
    coarse |= {a for e in both.equations for a in e.inputs if isinstance(a, Var)} - needed
    return Expanded(
        dataclasses.replace(both, outputs=outputs), originals, frozenset(coarse), frozenset(fine)
    )


def _traced(f: Callable[..., Any], eqn: Equation) -> Graph:
    specs = [jax.ShapeDtypeStruct(tuple(a.shape), a.dtype) for a in eqn.inputs]
    bounded = [isinstance(a, Var) and a.bounded for a in eqn.inputs]
    return simplify(trace(f, *specs, bounded=bounded))


def _bounded(eqn: Equation) -> list[bool]:
    return [isinstance(a, Var) and a.bounded for a in eqn.inputs]


def _if_all_bounded(f: Callable[..., Any]) -> Callable[[Equation], Any]:
    return lambda eqn: f if all(_bounded(eqn)) else None


def _maximum(x, y):
    return y + jnp.maximum(x - y, 0)


def _minimum(x, y):
    return y - jnp.maximum(y - x, 0)


def _quotient(eqn):
    return (lambda x, y: x * lax.integer_pow(y, -1)) if _bounded(eqn)[1] else None


def _power(eqn):
    return (lambda x, y: jnp.exp(y * jnp.log(x))) if _bounded(eqn)[1] else None


def _clamp(eqn):
    bounded = _bounded(eqn)
    if bounded == [False, True, False]:
        return None
    return lambda low, x, high: _minimum(_maximum(x, low), high)


def _differences(x, axis):
    """x_j - x_i, with i along the old axis and j along a new one behind it; a mask's -inf counts as
    the least number, as it does in the interval rule."""
    x = jnp.maximum(x, float(jnp.finfo(x.dtype).min))
    return jnp.expand_dims(x, axis) - jnp.expand_dims(x, axis + 1)


def _softmax(eqn):
    (axis,) = eqn.params["axes"]

    def f(x, _):
        return lax.integer_pow(jnp.sum(jnp.exp(_differences(x, axis)), axis + 1), -1)

    return f


def _log_softmax(eqn):
    (axis,) = eqn.params["axes"]
    return lambda x, _: -jnp.log(jnp.sum(jnp.exp(_differences(x, axis)), axis + 1))


def _variance(eqn):
    axes = eqn.params["axes"]

    def f(x):
        return jnp.mean(jnp.square(x - jnp.mean(x, axes, keepdims=True)), axes)

    return f


def _window_maximum(eqn):
    """The taps of each window side by side, padded by the least number there is."""
    p = eqn.params
    if any(d != 1 for d in p["base_dilation"]):
        return None

    def f(x):
        least = float(jnp.finfo(x.dtype).min)
        x = lax.pad(x, jnp.asarray(least, x.dtype), [(*pair, 0) for pair in p["padding"]])
        taps = [[]]
        for size, dilation in zip(p["window_dimensions"], p["window_dilation"], strict=True):
            taps = [[*tap, i * dilation] for tap in taps for i in range(size)]
        shape = eqn.outputs[0].shape
        ends = [
            [t + (n - 1) * s + 1 for t, n, s in zip(tap, shape, p["window_strides"], strict=True)]
            for tap in taps
        ]
        parts = [
            lax.slice(x, tap, end, p["window_strides"]) for tap, end in zip(taps, ends, strict=True)
        ]
        return jnp.max(jnp.stack(parts, -1), -1)

    return f


def _window_minimum(eqn):
    largest = _window_maximum(eqn)
    return None if largest is None else lambda x: -largest(-x)


REWRITES: dict[str, Callable[[Equation], Callable[..., Any] | None]] = {
    "max": _if_all_bounded(_maximum),
    "min": _if_all_bounded(_minimum),
    "div": _quotient,
    "pow": _power,
    "clamp": _clamp,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "variance": _variance,
    "reduce_min": lambda eqn: lambda x: -jnp.max(-x, eqn.params["axes"]),
    "reduce_window_max": _window_maximum,
    "reduce_window_min": _window_minimum,
}

# Expansions in which the least number of the operand's type stands for minus infinity.
CLAMPED = frozenset(["softmax", "log_softmax", "reduce_window_max", "reduce_window_min"])

# Where bounding the operand is better, or cheaper, than bounding what the expansion makes of it.
_BOUND_OPERANDS = CLAMPED
