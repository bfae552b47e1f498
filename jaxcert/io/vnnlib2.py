"""VNN-LIB 2.0, through the package `vnnlib`, as the commands of VNN-LIB 1.0.

The package parses and checks the types; here its tree becomes the forms that the reader of 1.0
takes, with the elements of the one input as X_0, X_1, ... and of the one output as Y_0, Y_1, ...,
both in row-major order. Numbers come from their text, not from the package's floats.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from jaxcert.io.sexpr import Atom, Form, Node, Source

PREFIX = re.compile(r"(?:\s|;[^\n]*+)*+\(\s*(?:vnnlib-version|declare-network)\b")
"""How a file of version 2.0 starts."""

_OPERATORS = {
    "And": "and",
    "Or": "or",
    "LessEqual": "<=",
    "GreaterEqual": ">=",
    "LessThan": "<",
    "GreaterThan": ">",
    "Equal": "=",
    "Plus": "+",
    "Minus": "-",
    "Negate": "-",
    "Multiply": "*",
}
_REAL_TYPES = ("Real", "F16", "BF16", "F32", "F64")


def commands(source: Source) -> Iterator[Form]:
    """The commands of VNN-LIB 1.0 that say the same as a text of version 2.0.

    Raises:
      VnnlibError: without the package `vnnlib`, where that package refuses the text, and for
        anything but one network with one real input, one real output and no hidden tensors.
    """
    try:
        import vnnlib
    except ImportError:
        source.wrong(0, "VNN-LIB 2.0", "the package that reads it: pip install vnnlib")
    try:
        query = vnnlib.parse_query_string(source.text)
    except vnnlib.VNNLibException as error:
        _fail(source, str(error))
    names = {}
    for kind, tensor in zip("XY", _input_and_output(query, source), strict=True):
        names[tensor.name] = (kind, tensor.shape)
        for index in range(math.prod(tensor.shape)):
            yield Form([Atom("declare-const", 0), Atom(f"{kind}_{index}", 0), Atom("Real", 0)], 0)
    for assertion in query.assertions:
        formula = _form(assertion.expr, names, source)
        yield Form([Atom("assert", formula.at), formula], formula.at)


def _input_and_output(query: Any, source: Source) -> tuple[Any, Any]:
    """The one input and the one output of the one network."""
    counts = [(len(n.inputs), len(n.outputs), len(n.hidden)) for n in query.networks]
    if counts != [(1, 1, 0)]:
        found = " and ".join(
            f"a network of {i} inputs, {o} outputs, {h} hidden" for i, o, h in counts
        )
        source.wrong(0, found, "one network of 1 input, 1 output, 0 hidden")
    tensors = query.networks[0].inputs[0], query.networks[0].outputs[0]
    for tensor in tensors:
        if tensor.dtype.name not in _REAL_TYPES:
            source.wrong(0, f"{tensor.name} of another type", "real, float16, float32 or float64")
    return tensors


def _form(node: Any, names: dict[str, tuple[str, list[int]]], source: Source) -> Node:
    """A node of the package's tree as a form; the package knows its line, not its column."""
    if hasattr(node, "indices"):
        kind, shape = names[node.name]
        flat = 0
        for index, size in zip(node.indices, shape, strict=True):
            flat = flat * size + index
        return Atom(f"{kind}_{flat}", source.line_start(node.line))
    if hasattr(node, "lexeme"):
        return Atom(node.lexeme, source.line_start(node.line))
    arguments = [_form(child, names, source) for child in node.children()]
    at = arguments[0].at
    name = type(node).__name__
    if name not in _OPERATORS:
        source.wrong(at, name, f"one of {' '.join(dict.fromkeys(_OPERATORS.values()))}")
    return Form([Atom(_OPERATORS[name], at), *arguments], at)


def _fail(source: Source, message: str) -> NoReturn:
    """Raise what the package said, at the place it named: a sentence, or JSON with a list."""
    place = re.fullmatch(r"Parse error: (.*) at line (\d+), column (\d+): (.*)", message, re.DOTALL)
    if place:
        at = source.line_start(int(place[2])) + int(place[3])
        source.fail(min(at, len(source.text)), f"{place[1]}: {place[4]}")
    try:
        first = json.loads(message)["errors"][0]
        line, words = int(first["line"]), f"{first['message']}: {first['offendingSymbol']}"
    except (ValueError, LookupError, TypeError):
        source.fail(0, message)
    source.fail(source.line_start(line), f"{words}. {first['hint']}")
