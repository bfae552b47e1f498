"""ONNX files for tests, and onnxruntime's answers."""

import functools

import jax
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

FLOAT, DOUBLE, INT64 = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64
onnxruntime.set_default_logger_severity(3)


# Compiled quickly rather than well: what is compiled here runs once.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random(shape, *, low=-2.0, high=2.0, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(dtype)


def file(nodes, shape, constants=(), *, opset=17, kind=FLOAT, inputs=None, outputs=("y",)):
    """The bytes of a net from "x" of a shape to "y"; constants are pairs of name and array."""
    inputs = [helper.make_tensor_value_info("x", kind, shape)] if inputs is None else inputs
    graph = helper.make_graph(
        nodes,
        "net",
        inputs,
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def single(op, shape, weights=(), *, opset=17, results=1, **attributes):
    """A net of one operator; weights are its further operands, None for one that is left out. With
    several results, each is flattened and they are joined."""
    names = ["" if w is None else f"w{i}" for i, w in enumerate(weights)]
    constants = [(n, w) for n, w in zip(names, weights, strict=True) if n]
    made = ["y"] if results == 1 else [f"y{i}" for i in range(results)]
    nodes = [helper.make_node(op, ["x", *names], made, op.lower(), **attributes)]
    if results > 1:
        nodes += [helper.make_node("Flatten", [name], [f"f{name}"]) for name in made]
        nodes += [helper.make_node("Concat", [f"f{name}" for name in made], ["y"], axis=1)]
    return file(nodes, shape, constants, opset=opset)


def reference(net, rows):
    """onnxruntime's outputs for rows, one by one, flattened."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(net, options)
    name = session.get_inputs()[0].name
    return np.stack([session.run(None, {name: row})[0].reshape(-1) for row in rows])


def assert_close(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    np.testing.assert_array_less(abs(ours - theirs) / np.maximum(1, abs(theirs)), 1e-5)


def parsed(net):
    return onnx.load_from_string(net)
