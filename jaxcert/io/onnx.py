"""Nets in ONNX files as models: `read(path)` is a function of a batch, and a pytree of its weights.

What a file computes without its input, shapes above all, is computed when it is read; numbers that
are stored in it are the weights; the rest are the steps of a `Program`. Arithmetic on weights alone
stays among the steps, because a proof counts its rounding. See `operators.py` for what is known.
"""

import dataclasses
import gzip
import os
import pathlib
import zlib
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.errors import UnsupportedOperator
from jaxcert.io import layers as layers  # they enter their functions into the table
from jaxcert.io import movement as movement
from jaxcert.io.assemble import Net, Node, assemble
from jaxcert.io.program import Program
from jaxcert.pytrees import pytree

Array: TypeAlias = jax.Array


@pytree
@dataclasses.dataclass(frozen=True, eq=False)
class OnnxModel:
    """A net from an ONNX file: `f(x)` maps (b, *input_shape) to (b, outputs).

    Its leaves are the weights in the order in which they are used, everything else is static and
    equal for two nets of the same architecture.
    """

    weights: tuple[Any, ...]
    program: Program = dataclasses.field(metadata={"static": True})

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return self.program.input_shape

    @property
    def outputs(self) -> int:
        """How many logits there are."""
        return self.program.outputs

    @property
    def input_name(self) -> str:
        """What the file calls its input."""
        return self.program.input_name

    @property
    def output_name(self) -> str:
        """What the file calls its output."""
        return self.program.output_name

    def __call__(self, x: Array) -> Array:
        """Logits (b, outputs) of a batch (b, *input_shape), in the wider type of x and weights."""
        x = jnp.asarray(x)
        if x.shape[1:] != self.input_shape or x.ndim == 0:
            wanted = ", ".join(map(str, ("b", *self.input_shape)))
            raise ValueError(
                f"the net takes a batch of shape ({wanted}), got {x.shape}; use "
                f"x.reshape(-1, {', '.join(map(str, self.input_shape))})"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"the net takes floating point numbers, got {x.dtype}")
        return self.program([jnp.asarray(w) for w in self.weights], x)


# --- Files ----------------------------------------------------------------------------------------


def read(source: str | os.PathLike[str] | bytes) -> OnnxModel:
    """The net in an ONNX file, as a model.

    Args:
      source: a path or the file's bytes; compressed by gzip or not.

    Raises:
      UnsupportedOperator: naming all operators without a function here, or the node with an
        attribute that is not supported.
      ValueError: for a file that is broken, or has not one input with a batch axis of size 1 or any
        size in front (or a single axis) and one output.
      ImportError: without the package `onnx`.

    >>> from onnx import parser
    >>> head = '<ir_version: 8, opset_import: ["": 17]>'
    >>> net = parser.parse_model(head + "net (float[1, 3] x) => (float[1, 3] y) { y = Relu(x) }")
    >>> read(net.SerializeToString())(jnp.array([[1.0, -2.0, 3.0]]))
    Array([[1., 0., 3.]], dtype=float32)
    """
    program, weights = assemble(_net(_parsed(source)))
    return OnnxModel(tuple(_stored(w) for w in weights), program)


def _stored(weight: np.ndarray) -> Any:
    """On the device, but for types that JAX would narrow unless it is in x64 mode."""
    return weight if weight.dtype.itemsize == 8 else jnp.asarray(weight)


def _parsed(source: str | os.PathLike[str] | bytes) -> Any:
    """The file's protobuf message, complete."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ImportError('reading ONNX files needs: pip install "jaxcert[io]"') from error
    raw = source if isinstance(source, bytes) else pathlib.Path(source).read_bytes()
    name = "the given bytes" if isinstance(source, bytes) else str(source)
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        model = onnx.ModelProto.FromString(raw)
    except (DecodeError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{name}: not an ONNX file, or cut short; get it again") from error
    if not model.graph.node:
        raise ValueError(f"{name}: no net in it; is it an ONNX file?")
    outside = [t.name for t in model.graph.initializer if t.data_location == t.EXTERNAL]
    if outside:
        _load_outside(model, source, outside[0])
    return model


def _load_outside(model: Any, source: Any, first: str) -> None:
    """Numbers that lie in files beside the net's."""
    from onnx import checker, external_data_helper

    try:
        if isinstance(source, bytes):
            raise FileNotFoundError("bytes have no folder")
        folder = str(pathlib.Path(source).parent)
        external_data_helper.load_external_data_for_model(model, folder)
    except (OSError, ValueError, checker.ValidationError) as error:
        raise ValueError(
            f"the numbers of '{first}' lie in another file, which must be beside the net's: {error}"
        ) from error


def _net(model: Any) -> Net:
    graph = model.graph
    nodes = [_node(node) for node in graph.node]
    constants = {tensor.name: _array(tensor) for tensor in graph.initializer}
    constants |= {n.outputs[0]: _constant(n) for n in nodes if n.operator == "Constant"}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise ValueError(
            f"a model has one input and one output, this net has the inputs "
            f"{[value.name for value in inputs]} and the outputs "
            f"{[value.name for value in graph.output]}"
        )
    if graph.sparse_initializer:
        raise UnsupportedOperator("sparse initializers are not supported; export dense ones")
    shape, leading = _input_shape(inputs[0])
    return Net(
        [node for node in nodes if node.operator != "Constant"],
        constants,
        inputs[0].name,
        graph.output[0].name,
        shape,
        leading,
        _input_dtype(inputs[0]),
        _opset(model),
    )


def _opset(model: Any) -> int:
    versions = {entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")}
    if len(versions) != 1:
        raise ValueError(f"the file names {len(versions)} versions of ONNX's operators: {versions}")
    return versions.pop()


def _input_shape(value: Any) -> tuple[tuple[int, ...], bool]:
    """The shape of one example, and whether there is an axis for the batch before it."""
    kind = value.type.tensor_type
    sizes = [d.dim_value if d.HasField("dim_value") else 0 for d in kind.shape.dim]
    written = [d.dim_param or d.dim_value or "?" for d in kind.shape.dim]
    one = sizes if len(sizes) == 1 else sizes[1:]
    if not sizes or not all(size > 0 for size in one):
        raise ValueError(
            f"the input '{value.name}' has the shape {written}; export it with fixed sizes, but "
            "for the batch"
        )
    if len(sizes) > 1 and sizes[0] > 1:
        raise ValueError(
            f"the input '{value.name}' has the shape {written}, whose first axis should be the "
            "batch; export the net with one example, or a batch of any size"
        )
    return tuple(one), len(sizes) > 1


def _input_dtype(value: Any) -> np.dtype:
    import onnx

    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"the input '{value.name}' holds {dtype}, not floating point numbers")
    return dtype


def _node(node: Any) -> Node:
    operator = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
    attributes = {a.name: _attribute(a) for a in node.attribute}
    return Node(operator, tuple(node.input), tuple(node.output), attributes, node.name)


def _attribute(attribute: Any) -> Any:
    """An attribute as a hashable Python value, a tensor as an array."""
    import onnx

    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return _array(value)
    if isinstance(value, bytes):
        return value.decode()
    return value if isinstance(value, int | float | str) else tuple(value)


def _constant(node: Node) -> np.ndarray:
    """The value of a Constant node, in whichever attribute it is."""
    types = {"value_int": np.int64, "value_ints": np.int64}
    types |= {"value_float": np.float32, "value_floats": np.float32}
    ((name, value),) = node.attributes.items()
    if name != "value" and name not in types:
        raise UnsupportedOperator(f"{node} has its value as {name}, which is not supported")
    return value if name == "value" else np.asarray(value, types[name])


def _array(tensor: Any) -> np.ndarray:
    from onnx import numpy_helper

    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the numbers of '{tensor.name}' are broken: {error}") from error
