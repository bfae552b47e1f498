"""Walking a graph with boxes: the table of interval rules, and the loop that applies them."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp

from jaxcert.blocks import WEIGHTS
from jaxcert.graph import Atom, Equation, Graph, Var, read, unsupported
from jaxcert.model import as_float64
from jaxcert.sets import Array, Box

Value: TypeAlias = Any
"""A `Box`, or an array where the value is exact."""

Rule: TypeAlias = Callable[[Equation, Sequence[Value], bool], Any]
"""(equation, operands, outward) -> `Box`, or a list of them for several outputs."""

RULES: dict[str, Rule] = {}


def define(names: str, rule: Rule) -> None:
    """Enter a rule for each primitive of a space-separated list."""
    RULES.update(dict.fromkeys(names.split(), rule))


def lower(value: Value) -> Array:
    """The lower end of a value; an exact one is its own."""
    return value.lower if isinstance(value, Box) else value


def upper(value: Value) -> Array:
    """The upper end of a value."""
    return value.upper if isinstance(value, Box) else value


def middle(value: Value) -> Array:
    """A point in the middle of a value."""
    return value.lower + (value.upper - value.lower) / 2 if isinstance(value, Box) else value


def interpret(graph: Graph, inputs: Sequence[Value], outward: bool) -> dict[Var, Value]:
    """Every value of the graph, given its inputs."""
    env: dict[Var, Value] = dict(zip(graph.inputs, inputs, strict=True))
    for eqn in graph.equations:
        values = [operand(env, atom, outward) for atom in eqn.inputs]
        env.update(zip(eqn.outputs, apply_rule(eqn, values, outward), strict=True))
    return env


def operand(env: dict[Var, Value], atom: Atom, outward: bool) -> Value:
    """The value of an atom; a proof computes in float64, to which weights widen exactly."""
    value: Any = read(env, atom)
    if outward and not isinstance(value, Box):
        return as_float64(jnp.asarray(value))
    return value


def output(graph: Graph, inputs: Sequence[Value], outward: bool) -> Value:
    """The value of the graph's first output."""
    return operand(interpret(graph, inputs, outward), graph.outputs[0], outward)


def _both_or_neither(box: Box) -> Box:
    """A box of which one end is unknown (NaN) is unknown."""
    if not jnp.issubdtype(box.lower.dtype, jnp.floating):
        return box
    unknown = jnp.isnan(box.lower) | jnp.isnan(box.upper)
    return Box(*[jnp.where(unknown, jnp.nan, end) for end in (box.lower, box.upper)])


def apply_rule(eqn: Equation, values: Sequence[Value], outward: bool) -> Sequence[Value]:
    """The outputs of an equation, boxes unless everything is exact."""
    # Weights among themselves are simply computed, except in a proof: there 1 / sqrt(variance) of
    # a batch normalisation is rounded, hence an interval.
    if not outward and not any(isinstance(v, Box) for v in values):
        return eqn.bind(*values)
    if eqn.name == WEIGHTS:  # the numbers that the model computes, exactly (`blocks.py`)
        stored = eqn.bind(*map(middle, values))
        stored = [as_float64(each) for each in stored] if outward else stored
        return [Box(each, each) for each in stored]
    if eqn.name not in RULES:
        hint = f"register one: jaxcert.bounds.register('{eqn.name}', rule)"
        raise unsupported(eqn, "ibp", hint)
    result = RULES[eqn.name](eqn, values, outward)
    results = result if isinstance(result, list) else [result]
    if outward:
        return [_both_or_neither(box) for box in results]
    # Rules compute in whatever type their arithmetic promotes to; the model's own comes back here.
    return [
        Box(box.lower.astype(out.dtype), box.upper.astype(out.dtype))
        for box, out in zip(results, eqn.outputs, strict=True)
    ]
