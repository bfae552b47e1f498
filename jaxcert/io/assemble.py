"""From the nodes of a file to a program and its weights: everything known is worked out here."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.errors import UnsupportedOperator
from jaxcert.io.operators import NEWEST_OPSET, Facts, Operator, lookup
from jaxcert.io.program import Program, Step, rows_stay_apart


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One operator of a file, with the names of its operands and results ("" where left out)."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    label: str = ""

    def __str__(self) -> str:
        return f"{self.operator} (node '{self.label or ' '.join(self.outputs)}')"


@dataclasses.dataclass(frozen=True, eq=False)
class Net:
    """What a file holds.

    Attributes:
      nodes: in order of evaluation.
      constants: the stored numbers, by name.
      input_name, output_name: of the one input and output.
      input_shape: of one example.
      leading: whether the input has an axis of size 1 or any size in front.
      dtype: of the input.
      opset: the version of ONNX's operators.
    """

    nodes: Sequence[Node]
    constants: Mapping[str, np.ndarray]
    input_name: str
    output_name: str
    input_shape: tuple[int, ...]
    leading: bool
    dtype: np.dtype
    opset: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Known:
    """A value that does not depend on the input.

    Attributes:
      array: the value.
      made: how, as which result and of how many, if by float arithmetic on weights; None for one
        that is stored in the file, or moved, or no float.
    """

    array: np.ndarray
    made: "tuple[_Call, int, int] | None" = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Made:
    """A value that a step makes out of the input; `one` is like it for a single example."""

    number: int
    one: jax.ShapeDtypeStruct


_Value: TypeAlias = _Known | _Made


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """An operator with its operands; None for one that is left out."""

    node: Node
    operator: Operator
    operands: tuple[_Value | None, ...]
    options: dict[str, Any]

    @property
    def known(self) -> bool:
        """Whether no operand depends on the input."""
        return all(v is None or isinstance(v, _Known) for v in self.operands)

    def __call__(self, *arrays: Any) -> tuple[Any, ...]:
        """The results."""
        results = self.operator.apply(*arrays, **self.options)
        return results if isinstance(results, tuple) else (results,)


def assemble(net: Net) -> tuple[Program, tuple[np.ndarray, ...]]:
    """A net as a program and its weights."""
    nodes = _needed(net)
    _require_known_operators(nodes, net.opset)
    shape = (1, *net.input_shape) if net.leading else net.input_shape
    assembly = _Assembly(net, jax.ShapeDtypeStruct(shape, net.dtype))
    with jax.enable_x64(True):
        for node in nodes:
            assembly.add(node)
        result = assembly.values[net.output_name]
        if isinstance(result, _Known):
            raise ValueError(f"the output '{net.output_name}' does not depend on the input")
        program = Program(
            tuple(assembly.steps),
            result.number,
            net.input_shape,
            math.prod(result.one.shape),
            net.leading,
            input_name=net.input_name,
            output_name=net.output_name,
        )
        like = tuple(jax.ShapeDtypeStruct(w.shape, w.dtype) for w in assembly.weights)
        together = rows_stay_apart(program, like, net.dtype)
    return dataclasses.replace(program, together=together), tuple(assembly.weights)


def _needed(net: Net) -> list[Node]:
    """The nodes that the output depends on."""
    names = [*net.constants, net.input_name, *(n for node in net.nodes for n in node.outputs if n)]
    twice = sorted(name for name, times in collections.Counter(names).items() if times > 1)
    if twice:
        raise ValueError(f"the file makes {twice} twice")
    wanted, needed = {net.output_name}, []
    for node in reversed(net.nodes):
        if wanted & set(node.outputs):
            needed.append(node)
            wanted |= set(node.inputs)
    made = {name for node in needed for name in node.outputs}
    missing = wanted - made - {*net.constants, net.input_name, ""}
    if missing:
        raise ValueError(f"nothing in the file makes {sorted(missing)}; is it complete?")
    return needed[::-1]


def _require_known_operators(nodes: Sequence[Node], opset: int) -> None:
    if opset > NEWEST_OPSET:
        raise UnsupportedOperator(
            f"the file uses version {opset} of ONNX's operators, which may mean something new by "
            f"known names; export it with opset_version={NEWEST_OPSET} or older"
        )
    unknown = [str(node) for node in nodes if lookup(node.operator, opset) is None]
    if unknown:
        raise UnsupportedOperator(
            f"no function for {', '.join(unknown)} in version {opset} of ONNX's operators; "
            "enter one with jaxcert.io.operators.define, or export the net without"
        )


class _Assembly:
    """A program as far as it has been assembled."""

    def __init__(self, net: Net, x: jax.ShapeDtypeStruct):
        self.opset = net.opset
        self.values: dict[str, _Value] = {
            name: _Known(array) for name, array in net.constants.items()
        }
        self.values[net.input_name] = _Made(0, x)
        self.steps: list[Step] = []
        self.weights: list[np.ndarray] = []
        self._count = 1  # values so far
        self._places: dict[Any, int] = {}  # of known values and calls that are in the program

    def add(self, node: Node) -> None:
        """One more node."""
        call = self._call(node)
        try:
            results = self._computed(call) if call.known else self._stepped(call)
        except (TypeError, ValueError, KeyError, NotImplementedError) as error:
            _refuse(node, f"cannot be evaluated: {error}", error)
        self.values.update(zip(node.outputs, results, strict=False))

    def _call(self, node: Node) -> _Call:
        operator = lookup(node.operator, self.opset)
        assert operator is not None
        inputs = [self._value(name, node) for name in node.inputs]
        arrays = len(inputs) if operator.arrays is None else operator.arrays
        operands, others = inputs[:arrays], inputs[arrays:]
        if any(v is not None for v in others[len(operator.known) :]):
            _refuse(node, f"has {len(node.inputs)} inputs, more than are known")
        options = self._honoured(node, operator)
        for name, value in zip(operator.known, others, strict=False):
            if isinstance(value, _Made):
                _refuse(node, f"takes '{name}' from the input; it must be known")
            if value is not None:
                options[name] = _plain(value.array)
        if operator.wants_facts:
            shapes = tuple(() if v is None else _like(v).shape for v in operands)
            dtypes = tuple("" if v is None else _like(v).dtype.name for v in operands)
            options["facts"] = Facts(shapes, dtypes, len(node.outputs))
        return _Call(node, operator, tuple(operands), options)

    def _value(self, name: str, node: Node) -> _Value | None:
        if name and name not in self.values:
            _refuse(node, f"reads '{name}', an output that is not supported")
        return self.values[name] if name else None

    def _honoured(self, node: Node, operator: Operator) -> dict[str, Any]:
        """The attributes as options; one that would be disregarded is refused."""
        options = {}
        for name, value in node.attributes.items():
            if name in operator.attributes:
                options[name] = value
            elif name not in operator.ignored and value != _default(node, name, self.opset):
                _refuse(node, f"has {name}={value!r}, which is not supported")
        return options

    def _computed(self, call: _Call) -> list[_Value]:
        """Results of a call on known values."""
        arrays = [v.array if isinstance(v, _Known) else None for v in call.operands]
        stored = all(not isinstance(v, _Known) or v.made is None for v in call.operands)
        results = [np.asarray(result) for result in call(*arrays)]
        return [
            _Known(array)
            if not jnp.issubdtype(array.dtype, jnp.floating) or (stored and call.operator.moves)
            else _Known(array, (call, i, len(results)))
            for i, array in enumerate(results)
        ]

    def _stepped(self, call: _Call) -> list[_Value]:
        """Results of a call on values that depend on the input."""
        known: list[np.ndarray] = []

        def run(*arrays: Any) -> Any:
            given = iter(arrays)
            results = call(*(None if v is None else next(given) for v in call.operands))
            known.extend(r for r in results if isinstance(r, np.ndarray))
            return results

        ones = jax.eval_shape(run, *(_like(v) for v in call.operands if v is not None))
        if known:  # a shape
            return [_Known(array) for array in known]
        first = self._append(call, len(ones))
        return [_Made(first + i, one) for i, one in enumerate(ones)]

    def _append(self, call: _Call, results: int) -> int:
        """A step for a call; the number of its first result."""
        places = tuple(self._place(v) for v in call.operands)
        options = tuple(sorted(call.options.items()))
        operator, label = call.operator, call.node.label
        self.steps.append(Step(operator.name, operator.since, places, options, results, label))
        self._count += results
        return self._count - results

    def _place(self, value: _Value | None) -> int | None:
        """Where a value is in the program, which it enters if need be."""
        if value is None or isinstance(value, _Made):
            return value and value.number
        if value.made is not None:
            call, i, count = value.made
            if call not in self._places:
                self._places[call] = self._append(call, count)
            return self._places[call] + i
        if value not in self._places:
            self.weights.append(value.array)
            self._places[value] = ~(len(self.weights) - 1)
        return self._places[value]


def _refuse(node: Node, why: str, cause: Exception | None = None) -> NoReturn:
    raise UnsupportedOperator(f"{node} {why}") from cause


def _like(value: _Value) -> jax.ShapeDtypeStruct:
    if isinstance(value, _Made):
        return value.one
    return jax.ShapeDtypeStruct(value.array.shape, value.array.dtype)


def _plain(array: np.ndarray) -> Any:
    """An array as nested tuples of Python numbers, which hash by value."""
    return tuple(_plain(part) for part in array) if array.ndim else array.item()


def _default(node: Node, attribute: str, opset: int) -> Any:
    """ONNX's default of an attribute; None without one."""
    import onnx

    if not onnx.defs.has(node.operator, opset, ""):
        return None
    found = onnx.defs.get_schema(node.operator, opset).attributes.get(attribute)
    if found is None or found.default_value.type == onnx.AttributeProto.UNDEFINED:
        return None
    value = onnx.helper.get_attribute_value(found.default_value)
    return value.decode() if isinstance(value, bytes) else value
