"""Files as models: shapes worked out when reading, structure shared, broken files refused."""

import gzip
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx as reader
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from onnx_files import (
    DOUBLE,
    FLOAT,
    assert_close,
    file,
    parsed,
    quick_jit,
    random,
    reference,
    single,
)

from jaxcert import LinfBall
from jaxcert.bounds import certify, crown, crown_ibp, ibp
from jaxcert.errors import UnsupportedEquation, UnsupportedOperator
from jaxcert.io import onnx
from jaxcert.model import as_float64, split
from jaxcert.tracing import trace_float64

node = helper.make_node


def w(*shape, seed=1, dtype=np.float32):
    return random(shape, seed=seed, dtype=dtype)


def ints(*values):
    return np.array(values, np.int64)


def dense_net(names="uvw", seed=0, kind=FLOAT):
    """A relu net (1, 6) -> (1, 3)."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    a, b, c = names
    nodes = [
        node("Gemm", ["x", f"{a}.weight", f"{a}.bias"], [b], f"layer {a}", transB=1),
        node("Relu", [b], [c], f"relu {a}"),
        node("MatMul", [c, f"{b}.weight"], ["y"]),
    ]
    constants = [
        (f"{a}.weight", w(5, 6, seed=seed, dtype=dtype)),
        (f"{a}.bias", w(5, seed=seed + 1, dtype=dtype)),
        (f"{b}.weight", w(5, 3, seed=seed + 2, dtype=dtype)),
    ]
    return file(nodes, [1, 6], constants, kind=kind)


# --- Real nets ------------------------------------------------------------------------------------


TRACES = []


@quick_jit
def run(f, x):
    TRACES.append(f.program)
    return f(x)


# All architectures that are at hand, and two nets of one.
NETS = """
    acasxu/onnx/ACASXU_run2a_1_1_batch_2000 acasxu/onnx/ACASXU_run2a_5_9_batch_2000
    cifar10_resnet/onnx/resnet_2b cifar10_resnet/onnx/resnet_4b
    collins_rul_cnn/onnx/NN_rul_full_window_20 collins_rul_cnn/onnx/NN_rul_full_window_40
    collins_rul_cnn/onnx/NN_rul_small_window_20 dist_shift/onnx/mnist_concat
    eran/nets/ffnnSIGMOID__Point_6x200 eran/nets/mnist_relu_9_200
    mnist_fc/onnx/mnist-net_256x2 mnist_fc/onnx/mnist-net_256x4 mnist_fc/onnx/mnist-net_256x6
    oval21/onnx/cifar_base_kw oval21/onnx/cifar_deep_kw oval21/onnx/cifar_wide_kw
    rl_benchmarks/onnx/cartpole rl_benchmarks/onnx/dubinsrejoin rl_benchmarks/onnx/lunarlander
    sri_resnet_a/onnx/resnet_3b2_bn_mixup_adv_4.0_bs128_lr-1
    tllverifybench/onnx/tllBench_n=2_N=M=8_m=1_instance_0_0
    tllverifybench/onnx/tllBench_n=2_N=M=32_m=1_instance_3_0
    verivital/Convnet_avgpool verivital/Convnet_maxpool vit/onnx/ibp_3_3_8 vit/onnx/pgd_2_3_16
""".split()


@pytest.mark.parametrize("name", NETS)
def test_real_nets_agree_with_onnxruntime(data, name):
    path = data / "vnncomp" / f"{name}.onnx.gz"
    model = onnx.read(path)
    x = random((2, *model.input_shape), low=-1, high=1)
    theirs = reference(gzip.decompress(path.read_bytes()), x[:, None])
    assert_close(run(model, x), theirs)
    assert model.program.together


def test_real_nets_of_one_architecture_share_a_program(data):
    first, second = (onnx.read(data / "vnncomp" / f"{name}.onnx.gz") for name in NETS[:2])
    assert jax.tree.structure(first) == jax.tree.structure(second)


# --- Structure ------------------------------------------------------------------------------------


def test_nets_of_one_architecture_are_compiled_once():
    first, second = onnx.read(dense_net()), onnx.read(dense_net("pqr", seed=7))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert split(first)[1] == split(second)[1]
    assert hash(split(first)[1]) == hash(split(second)[1])
    before, x = len(TRACES), random((2, 6))
    assert not jnp.array_equal(run(first, x), run(second, x))
    assert len(TRACES) == before + 1
    other = onnx.read(single("Relu", (1, 6)))
    assert jax.tree.structure(first) != jax.tree.structure(other)


def test_a_model_says_what_it_is():
    model = onnx.read(dense_net())
    assert (model.input_shape, model.outputs) == ((6,), 3)
    assert (model.input_name, model.output_name) == ("x", "y")
    assert [leaf.shape for leaf in jax.tree.leaves(model)] == [(5, 6), (5,), (5, 3)]


def test_a_model_can_be_pickled():
    model, x = onnx.read(dense_net()), random((2, 6))
    again = pickle.loads(pickle.dumps(model))
    assert again.program == model.program
    assert jnp.array_equal(again(x), model(x))


def test_weights_can_be_differentiated():
    model, x = onnx.read(dense_net()), random((2, 6))
    gradient = jax.grad(lambda f: jnp.sum(f(x) ** 2))(model)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("x", [np.zeros((6,)), np.zeros((2, 2, 3)), np.zeros((2, 5))])
def test_another_shape_is_an_error(x):
    with pytest.raises(ValueError, match=r"shape \(b, 6\).*reshape\(-1, 6\)"):
        onnx.read(dense_net())(x)


def test_integers_are_an_error():
    with pytest.raises(TypeError, match="got uint8"):
        onnx.read(dense_net())(np.zeros((2, 6), np.uint8))


# --- Types ----------------------------------------------------------------------------------------


def test_in_float64_all_is_float64():
    constants = [("half", np.float32(0.5)), ("scale", w(6))]
    nodes = [
        node("Mul", ["x", "scale"], ["a"]),
        node("Cast", ["a"], ["b"], to=TensorProto.FLOAT),
        node("LeakyRelu", ["b"], ["c"], alpha=0.1),
        node("Add", ["c", "half"], ["d"]),
        node("Clip", ["d"], ["e"]),
        node("Softmax", ["e"], ["y"]),
    ]
    model, x = onnx.read(file(nodes, [1, 6], constants)), random((2, 6))
    narrow = model(x)
    assert narrow.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = as_float64(model)(x.astype(np.float64))
        program = str(jax.make_jaxpr(as_float64(model))(x.astype(np.float64)))
    assert wide.dtype == jnp.float64
    assert "f32" not in program
    np.testing.assert_allclose(narrow, wide, rtol=1e-6)


def test_a_narrowing_cast_stays():
    nodes = [
        node("Cast", ["x"], ["a"], to=TensorProto.FLOAT16),
        node("Cast", ["a"], ["y"], to=TensorProto.FLOAT),
    ]
    net, x = file(nodes, [1, 6]), random((2, 6))
    assert_close(onnx.read(net)(x), reference(net, x[:, None]))
    with jax.enable_x64(True):
        y = as_float64(onnx.read(net))(x.astype(np.float64))
    assert jnp.array_equal(y, x.astype(np.float16))


def test_double_weights_stay_double():
    net = dense_net(kind=DOUBLE)
    model, x = onnx.read(net), random((2, 6), dtype=np.float64)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {np.dtype(np.float64)}
    with jax.enable_x64(True):
        np.testing.assert_allclose(model(x), reference(net, x[:, None]), rtol=1e-13)
    assert_close(model(x.astype(np.float32)), reference(net, x[:, None]))


# --- What is worked out when reading --------------------------------------------------------------


def attention(batch="batch", scaled=True):
    """Self-attention with a class token as PyTorch exports it, (b, 2, 3, 4) -> (b, 3)."""
    shape = [node("Shape", ["x"], ["shape"]), node("Gather", ["shape", "i0"], ["b"])]
    shape += [node("Unsqueeze", ["b", "first"], ["bs"])]
    shape += [node("Concat", ["bs", "minus", "four"], ["target"], axis=0)]
    tokens = [
        node("Reshape", ["x", "target"], ["tokens"]),
        node("Concat", ["bs", "one", "four"], ["blank"], axis=0),
        node("ConstantOfShape", ["blank"], ["zeros"]),
        node("Add", ["zeros", "token"], ["class"]),
        node("Concat", ["class", "tokens"], ["t"], axis=1),
    ]
    heads = [node("MatMul", ["t", name], [name * 2]) for name in "qkv"]
    heads += [
        node("Transpose", ["kk"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["qq", "kt"], ["scores"]),
        node("Shape", ["qq"], ["size"]),
        node("Slice", ["size", "two", "three"], ["width"]),
        node("Cast", ["width"], ["float width"], to=TensorProto.FLOAT),
        node("Sqrt", ["float width"], ["root"]),
        node("Div", ["scores", "root"], ["scaled"]),
        node("Softmax", ["scaled"], ["shares"], axis=-1),
        node("MatMul", ["shares", "vv"], ["mixed"]),
        node("Transpose", ["out"], ["turned"]),
        node("MatMul", ["mixed", "turned"], ["z"]),
        node("ReduceMean", ["z"], ["y"], axes=[1], keepdims=0),
    ]
    sizes = {"first": 0, "minus": -1, "four": 4, "one": 1, "two": 2, "three": 3}
    constants = [(name, ints(size)) for name, size in sizes.items()]
    constants += [("i0", np.array(0)), ("token", w(4)), ("out", w(3, 5, seed=9))]
    constants += [(name, w(4, 5, seed=i)) for i, name in enumerate("qkv")]
    return file(shape + tokens + heads, [batch, 2, 3, 4], constants)


def test_shapes_are_worked_out_and_weights_are_moved():
    net, x = attention(), random((3, 2, 3, 4))
    model = onnx.read(net)
    assert_close(model(x), reference(net, x[:, None]))
    assert model.program.together
    assert jax.tree.structure(model) == jax.tree.structure(onnx.read(attention(1)))
    names = [step.name for step in model.program.steps]
    assert not {"Shape", "Gather", "Cast", "ConstantOfShape"} & set(names)
    assert names.count("Transpose") == 1  # that of the weight is done
    assert names.count("Sqrt") == 1  # arithmetic is not: a proof counts its rounding
    box = jax.jit(lambda f, ball: ibp(f)(ball))(model, LinfBall(jnp.asarray(x), 0.01))
    assert jnp.all((box.lower <= model(x)) & (model(x) <= box.upper))


def test_all_forms_of_constants():
    nodes = [
        node("Constant", [], ["a"], value=numpy_helper.from_array(w(6))),
        node("Constant", [], ["b"], value_float=0.3),
        node("Constant", [], ["c"], value_floats=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        node("Constant", [], ["d"], value_ints=[1, 2, 3]),
        node("Constant", [], ["e"], value_int=2),
        node("Add", ["x", "a"], ["f"]),
        node("Mul", ["f", "b"], ["g"]),
        node("Mul", ["g", "c"], ["h"]),
        node("Reshape", ["h", "d"], ["i"]),
        node("Gather", ["i", "e"], ["y"], axis=2),
    ]
    net, x = file(nodes, [1, 6]), random((2, 6))
    model = onnx.read(net)
    assert_close(model(x), reference(net, x[:, None]))
    assert [leaf.shape for leaf in jax.tree.leaves(model)] == [(6,), (), (6,)]


def test_integers_and_masks():
    nodes = [
        node("Shape", ["x"], ["shape"], start=1),
        node("Size", ["x"], ["size"]),
        node("Div", ["size", "minus four"], ["count"]),  # -7 / 4 rounds towards zero
        node("Neg", ["count"], ["one"]),
        node("Range", ["zero", "size", "one"], ["numbers"]),
        node("Equal", ["numbers", "three"], ["mask"]),
        node("Not", ["mask"], ["others"]),
        node("ReduceProd", ["shape"], ["product"], keepdims=1),
        node("Concat", ["ones", "product"], ["target"], axis=0),
        node("Where", ["others", "x", "half"], ["z"]),
        node("Reshape", ["z", "target"], ["y"]),
    ]
    constants = [("zero", np.array(0)), ("three", np.array(3)), ("minus four", np.array(-4))]
    constants += [("half", np.float32(0.5)), ("ones", ints(1))]
    net, x = file(nodes, [1, 7], constants), random((2, 7))
    assert_close(onnx.read(net)(x), reference(net, x[:, None]))


def test_an_input_without_a_batch_axis_gets_one():
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Relu", ["a"], ["y"])]
    net, x = file(nodes, [6], [("w", w(6, 3))]), random((4, 6))
    model = onnx.read(net)
    assert (model.input_shape, model.outputs) == ((6,), 3)
    assert_close(model(x), reference(net, x))


def test_listed_initializers_are_no_inputs():
    inputs = [helper.make_tensor_value_info(name, FLOAT, [1, 6]) for name in ("w", "x")]
    net = file([node("Add", ["x", "w"], ["y"])], None, [("w", w(1, 6))], inputs=inputs)
    assert onnx.read(net).input_name == "x"


def test_what_the_output_does_not_need_is_left_out():
    nodes = [node("Relu", ["x"], ["y"]), node("Unheard", ["x"], ["z"])]
    assert len(onnx.read(file(nodes, [1, 6])).program.steps) == 1


# --- Bounds ---------------------------------------------------------------------------------------


def test_bounds_and_proofs_of_a_file():
    model, x = onnx.read(dense_net()), random((2, 6))
    ball = LinfBall(jnp.asarray(x), 0.01)
    for method in (ibp, crown_ibp, crown):
        box = jax.jit(lambda f, ball: method(f)(ball))(model, ball)  # noqa: B023
        assert jnp.all((box.lower <= model(x)) & (model(x) <= box.upper))
    certificate = certify(model, ball, method=ibp)
    assert jnp.array_equal(certificate.prediction, jnp.argmax(model(x), 1))


def test_proofs_see_the_net_in_float64():
    for net in (dense_net(), single("Gather", (1, 6), [ints(3, 0, 1)], axis=1)):
        arrays, structure = split(onnx.read(net))
        shape = (2, *structure.build(arrays).input_shape)  # type: ignore
        with jax.enable_x64(True):
            graph, _ = trace_float64(structure, arrays, shape, jnp.float32, mode=False)
        assert graph.inputs[0].dtype == jnp.float64


def test_errors_of_bounds_name_the_node():
    net = single("ReduceProd", (1, 2, 3), axes=[2])
    with pytest.raises(UnsupportedEquation, match=r"reduce_prod.*in reduceprod"):
        ibp(onnx.read(net))(LinfBall(jnp.ones((2, 2, 3)), 0.1))


# --- Files ----------------------------------------------------------------------------------------


def test_paths_bytes_and_gzip(tmp_path):
    net, x = dense_net(), random((2, 6))
    (tmp_path / "net.onnx").write_bytes(net)
    (tmp_path / "net.onnx.gz").write_bytes(gzip.compress(net))
    wanted = onnx.read(net)(x)
    for source in (tmp_path / "net.onnx", str(tmp_path / "net.onnx.gz"), gzip.compress(net)):
        assert jnp.array_equal(onnx.read(source)(x), wanted)


def stored_outside(folder):
    model = parsed(dense_net())
    external_data_helper.convert_model_to_external_data(
        model, location="numbers", size_threshold=0, convert_attribute=False
    )
    reader.save(model, folder / "net.onnx")
    return folder / "net.onnx"


def test_numbers_in_another_file(tmp_path):
    x = random((2, 6))
    path = stored_outside(tmp_path)
    assert jnp.array_equal(onnx.read(path)(x), onnx.read(dense_net())(x))
    (tmp_path / "numbers").unlink()
    for source in (path, path.read_bytes()):
        with pytest.raises(ValueError, match=r"numbers of 'u\.weight' lie in another file"):
            onnx.read(source)


def short_weight():
    model = parsed(dense_net())
    model.graph.initializer[0].raw_data = b"1234"
    return model.SerializeToString()


def with_opsets(*versions):
    model = parsed(dense_net())
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid("", v) for v in versions)
    return model.SerializeToString()


BROKEN = {
    "text": (b"no net", "not an ONNX file, or cut short"),
    "nothing": (b"", "no net in it"),
    "short": (dense_net()[:200], "not an ONNX file, or cut short"),
    "short gzip": (gzip.compress(dense_net())[:100], "not an ONNX file, or cut short"),
    "weight": (short_weight(), "numbers of 'u.weight' are broken"),
    "twice": (file([node("Relu", ["x"], ["y"])] * 2, [1, 6]), r"makes \['y'\] twice"),
    "missing": (file([node("Add", ["x", "w"], ["y"])], [1, 6]), r"nothing .* makes \['w'\]"),
    "shape": (file([node("Relu", ["x"], ["y"])], [1, "width"]), r"\[1, 'width'\]; export it"),
    "no axes": (file([node("Relu", ["x"], ["y"])], []), "export it with fixed sizes"),
    "batch": (file([node("Relu", ["x"], ["y"])], [16, 6]), "first axis should be the batch"),
    "integers": (file([node("Neg", ["x"], ["y"])], [1, 6], kind=TensorProto.INT64), "int64"),
    "constant": (file([node("Relu", ["w"], ["y"])], [1, 6], [("w", w(6))]), "does not depend"),
    "versions": (with_opsets(11, 13), "names 2 versions"),
    "inputs": (
        file(
            [node("Add", ["x", "z"], ["y"])],
            None,
            inputs=[helper.make_tensor_value_info(name, FLOAT, [1, 6]) for name in "xz"],
        ),
        r"inputs \['x', 'z'\]",
    ),
    "outputs": (
        file([node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["z"])], [1, 6], outputs="yz"),
        r"outputs \['y', 'z'\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_say_so(name):
    net, said = BROKEN[name]
    with pytest.raises(ValueError, match=said):
        onnx.read(net)


def test_all_unknown_operators_are_named_at_once():
    nodes = [
        node("LSTM", ["x"], ["a"], "first"),
        node("Gelu", ["a"], ["b"], domain="com.microsoft"),
        node("LSTM", ["b"], ["y"], "last"),
    ]
    with pytest.raises(UnsupportedOperator) as raised:
        onnx.read(file(nodes, [1, 6]))
    said = str(raised.value)
    assert all(f"LSTM (node '{name}')" in said for name in ("first", "last"))
    assert "com.microsoft::Gelu (node 'b')" in said


def test_operators_of_the_future_are_refused():
    with pytest.raises(UnsupportedOperator, match="version 99"):
        onnx.read(with_opsets(99))


def test_axes_from_the_input_are_refused():
    nodes = [node("Cast", ["x"], ["a"], to=TensorProto.INT64), node("Tile", ["x", "a"], ["y"])]
    with pytest.raises(UnsupportedOperator, match="takes 'repeats' from the input"):
        onnx.read(file(nodes, [1, 2]))


def test_the_package_is_needed_only_to_read():
    code = (
        "import sys; sys.modules['onnx'] = None\n"
        "import jaxcert.io\n"
        "try: jaxcert.io.onnx.read(b'')\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'reading ONNX files needs: pip install "jaxcert[io]"'
