"""Each operator and attribute against onnxruntime: batches in one go, batches row by row."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_files import assert_close, quick_jit, random, reference, single
from thinned import one_in

from jaxcert import LinfBall
from jaxcert.bounds import crown_ibp, ibp
from jaxcert.errors import JaxcertError
from jaxcert.io import onnx

IMAGE = (1, 4, 6, 5)
VECTOR = (1, 6)
CASES = {}


def case(name, op, shape=VECTOR, weights=(), *, low=-2.0, together=True, **options):
    assert name not in CASES
    CASES[name] = (lambda: single(op, shape, weights, **options), shape, low, together)


def w(*shape, seed=1, low=-1.0):
    return random(shape, seed=seed, low=low, high=1.0)


def ints(*values):
    return np.array(values, np.int64)


def scalar(value, dtype=np.float32):
    return np.array(value, dtype)


# --- Arithmetic and activations -------------------------------------------------------------------

for op in """
    Abs Atan Asinh Ceil Cos Cosh Elu Erf Exp Floor HardSigmoid HardSwish Identity LeakyRelu Neg Relu
    Round Selu Sigmoid Sign Sin Sinh Softplus Softsign Tanh ThresholdedRelu Celu
""".split():
    case(op, op, IMAGE if op == "Relu" else VECTOR)
for op in ("Log", "Sqrt", "Reciprocal"):
    case(op, op, low=0.1)
for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean"):
    case(op, op, IMAGE, [w(4, 1, 1, low=0.5)])
case("Add of a matrix", "Add", (1, 2, 3), [w(1, 1, 3)])
case("Add of rows", "Add", (1, 3), [w(2, 3)], together=False)
case("Sum of three", "Sum", VECTOR, [w(6), w(1, 6)])
case("Max of three", "Max", VECTOR, [w(6), w(1)])
case("LeakyRelu slope", "LeakyRelu", alpha=0.3)
case("Elu alpha", "Elu", alpha=1.5)
case("Celu alpha", "Celu", alpha=0.5)
case("Selu gamma", "Selu", alpha=1.5, gamma=0.7)
case("HardSigmoid slope", "HardSigmoid", alpha=0.4, beta=0.3)
case("ThresholdedRelu alpha", "ThresholdedRelu", alpha=0.3)
case("Mish", "Mish", opset=18)
case("Gelu", "Gelu", opset=20)
case("Gelu tanh", "Gelu", opset=20, approximate="tanh")
case("PRelu", "PRelu", IMAGE, [w(4, 1, 1)])
case("PRelu scalar", "PRelu", IMAGE, [w(1, 1, 1)])
case("Pow square", "Pow", VECTOR, [scalar(2)])
case("Pow cube of one entry", "Pow", VECTOR, [scalar([3])])
case("Pow root", "Pow", VECTOR, [scalar(0.5)], low=0.1)
case("Pow other", "Pow", VECTOR, [scalar(1.3)], low=0.1)
case("Pow integer", "Pow", VECTOR, [ints(2)])
case("Pow many", "Pow", VECTOR, [scalar([1, 2, 0.5, 3, 1.5, 2])], low=0.1)
case("Clip", "Clip", VECTOR, [scalar(-0.5), scalar(1)])
case("Clip low", "Clip", VECTOR, [scalar(-0.5)])
case("Clip high", "Clip", VECTOR, [None, scalar(0.5)])
case("Clip nothing", "Clip")
case("Clip old", "Clip", opset=10, min=0.0, max=0.5)
case("Clip old low", "Clip", opset=6 + 1, min=0.0)
case("Dropout", "Dropout")
case("Dropout old", "Dropout", opset=9, ratio=0.3)
case("Dropout inputs", "Dropout", VECTOR, [scalar(0.3), scalar(False, bool)])
case("Cast", "Cast", to=1)
case("Softmax", "Softmax", (1, 2, 3, 4))
case("Softmax axis", "Softmax", (1, 2, 3, 4), axis=1)
case("Softmax old", "Softmax", (1, 2, 3, 4), opset=11)
case("Softmax old axis", "Softmax", (1, 2, 3, 4), opset=11, axis=2)
case("Softmax old last", "Softmax", (1, 2, 3, 4), opset=11, axis=-1)
case("Softmax old all", "Softmax", (1, 2, 3), opset=11, axis=0, together=False)
case("LogSoftmax", "LogSoftmax", (1, 2, 3))
case("LogSoftmax old", "LogSoftmax", (1, 2, 3), opset=11)

# --- Reductions -----------------------------------------------------------------------------------

for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare"):
    case(op, op, IMAGE, axes=[2, 3], keepdims=0)
    case(f"{op} inputs", op, IMAGE, [ints(1, -1)], opset=18)
case("ReduceProd", "ReduceProd", (1, 2, 3), axes=[2])
case("ReduceSum", "ReduceSum", IMAGE, [ints(-1)], keepdims=0)
case("ReduceSum old", "ReduceSum", IMAGE, opset=11, axes=[1])
case("ReduceSum noop", "ReduceSum", noop_with_empty_axes=1)
case("ReduceSum everything", "ReduceSum", (1, 2, 3), together=False)
case("ReduceMean examples", "ReduceMean", (1, 2, 3), axes=[0], together=False)
case("ReduceMean kept examples", "ReduceMean", (1, 2, 3), axes=[0], keepdims=1, together=False)

# --- Products, convolutions, pools ----------------------------------------------------------------

case("MatMul", "MatMul", (1, 6), [w(6, 4)])
case("MatMul matrix", "MatMul", (1, 2, 6), [w(6, 4)])
case("MatMul matrices", "MatMul", (1, 3, 2, 6), [w(3, 6, 4)])
case("MatMul vector", "MatMul", (1, 2, 6), [w(6)])
case("MatMul many", "MatMul", (1, 6), [w(2, 6, 4)], together=False)
case("Gemm", "Gemm", VECTOR, [w(6, 4), w(4)])
case("Gemm transB", "Gemm", VECTOR, [w(4, 6), w(1, 4)], transB=1)
case("Gemm scaled", "Gemm", VECTOR, [w(4, 6), scalar(0.5)], transB=1, alpha=0.5, beta=2.0)
case("Gemm no bias", "Gemm", VECTOR, [w(6, 4)])
case("Gemm transA", "Gemm", (1, 6), [w(1, 4)], transA=1, together=False)
KERNEL = w(4, 4, 3, 3)
case("Conv", "Conv", IMAGE, [KERNEL, w(4)])
case("Conv no bias", "Conv", IMAGE, [KERNEL], pads=[1, 1, 1, 1], kernel_shape=[3, 3])
case("Conv strides", "Conv", IMAGE, [KERNEL], strides=[2, 1], pads=[0, 1, 2, 1])
case("Conv dilations", "Conv", IMAGE, [w(2, 4, 2, 2)], dilations=[2, 3])
case("Conv groups", "Conv", IMAGE, [w(6, 2, 3, 3), w(6)], group=2)
case("Conv SAME_UPPER", "Conv", IMAGE, [w(4, 4, 2, 2)], auto_pad="SAME_UPPER", strides=[1, 2])
case("Conv SAME_LOWER", "Conv", IMAGE, [w(4, 4, 2, 2)], auto_pad="SAME_LOWER", strides=[1, 2])
case("Conv VALID", "Conv", IMAGE, [KERNEL], auto_pad="VALID")
case("Conv 1d", "Conv", (1, 4, 9), [w(2, 4, 3), w(2)], pads=[1, 0])
case("Conv 3d", "Conv", (1, 2, 4, 4, 3), [w(3, 2, 2, 2, 2)])
case("ConvTranspose", "ConvTranspose", IMAGE, [w(4, 2, 3, 3), w(2)])
UP = {"op": "ConvTranspose", "shape": IMAGE}
case("ConvTranspose strides", **UP, weights=[w(4, 2, 3, 3)], strides=[2, 3], pads=[1, 0, 0, 1])
case("ConvTranspose more", **UP, weights=[w(4, 2, 3, 3)], strides=[2, 2], output_padding=[1, 0])
case("ConvTranspose groups", **UP, weights=[w(4, 3, 2, 2)], group=2, dilations=[2, 1])
case("ConvTranspose shape", **UP, weights=[w(4, 2, 3, 3)], strides=[2, 2], output_shape=[12, 10])
case("ConvTranspose same", **UP, weights=[w(4, 2, 3, 3)], strides=[2, 2], auto_pad="SAME_UPPER")
for op in ("MaxPool", "AveragePool"):
    pool = {"op": op, "shape": IMAGE, "kernel_shape": [3, 2]}
    case(op, **pool)
    case(f"{op} strides", **pool, strides=[2, 2])
    case(f"{op} pads", **pool, strides=[1, 2], pads=[1, 0, 2, 1])
    case(f"{op} ceil", **pool, strides=[2, 2], ceil_mode=1)
    case(f"{op} ceil pads", **pool, strides=[2, 2], ceil_mode=1, pads=[1, 1, 0, 1])
    case(f"{op} SAME_UPPER", **pool, strides=[2, 2], auto_pad="SAME_UPPER")
    case(f"{op} SAME_LOWER", **pool, strides=[2, 2], auto_pad="SAME_LOWER")
    case(f"{op} VALID", **pool, auto_pad="VALID")
    case(f"{op} dilations", **pool, dilations=[2, 2], opset=19)
case("MaxPool 1d", "MaxPool", (1, 2, 9), kernel_shape=[3], strides=[3])
PADDED = {"op": "AveragePool", "shape": IMAGE, "kernel_shape": [3, 3], "count_include_pad": 1}
case("AveragePool counts", **PADDED, pads=[1, 1, 1, 1])
case("AveragePool counts uneven", **PADDED, pads=[1, 0, 2, 1], strides=[2, 2])
case("AveragePool counts ceil", **PADDED, pads=[1, 1, 1, 1], strides=[2, 3], ceil_mode=1, opset=19)
case("GlobalAveragePool", "GlobalAveragePool", IMAGE)
case("GlobalMaxPool", "GlobalMaxPool", IMAGE)

# --- Normalisation --------------------------------------------------------------------------------

STATISTICS = [w(4), w(4, seed=2), w(4, seed=3), w(4, seed=4, low=0.5)]
case("BatchNormalization", "BatchNormalization", IMAGE, STATISTICS)
case("BatchNormalization old", "BatchNormalization", (1, 4), STATISTICS, opset=8, epsilon=0.1)
case("LayerNormalization", "LayerNormalization", (1, 3, 5), [w(5), w(5, seed=2)])
case("LayerNormalization axes", "LayerNormalization", (1, 3, 5), [w(3, 5)], axis=1, epsilon=0.1)
case("InstanceNormalization", "InstanceNormalization", IMAGE, [w(4), w(4)])
case("GroupNormalization", "GroupNormalization", IMAGE, [w(4), w(4)], opset=21, num_groups=2)

# --- Movement -------------------------------------------------------------------------------------

case("Flatten", "Flatten", IMAGE)
case("Flatten axis", "Flatten", (1, 1, 3, 2), axis=2)
case("Flatten last", "Flatten", (1, 2, 3), axis=-2)
case("Flatten all", "Flatten", (1, 2, 3), axis=0, together=False)
case("Flatten rows", "Flatten", (1, 2, 3), axis=2, together=False)
for name, target in {
    "1 -1": [1, -1], "-1 n": [-1, 12], "0 -1": [0, -1], "fixed": [1, 4, 3], "0 0": [0, 0, 3, 2],
}.items():  # fmt: skip
    case(f"Reshape {name}", "Reshape", (1, 2, 6), [ints(*target)])
case("Reshape allowzero", "Reshape", (1, 2, 6), [ints(1, 12)], allowzero=1)
case("Reshape rows", "Reshape", (1, 2, 6), [ints(2, -1)], together=False)
case("Reshape vector", "Reshape", (1, 2, 6), [ints(-1)], together=False)
case("Transpose", "Transpose", (1, 2, 3, 4), perm=[0, 2, 3, 1])
case("Transpose rows", "Transpose", (1, 2, 3), together=False)
case("Transpose ones", "Transpose", (1, 1, 3), perm=[1, 0, 2], together=False)
case("Squeeze", "Squeeze", (1, 1, 3, 1), [ints(1, -1)])
case("Squeeze old", "Squeeze", (1, 1, 3), opset=11, axes=[1])
case("Squeeze all", "Squeeze", (1, 1, 3), together=False)
case("Unsqueeze", "Unsqueeze", VECTOR, [ints(1, -1)])
case("Unsqueeze old", "Unsqueeze", VECTOR, opset=11, axes=[2])
case("Unsqueeze rows", "Unsqueeze", VECTOR, [ints(0)], together=False)
case("Concat", "Concat", (1, 2, 3), [w(1, 1, 3)], axis=1)
case("Concat last", "Concat", (1, 2, 3), [w(1, 2, 2)], axis=-1)
case("Concat rows", "Concat", VECTOR, [w(1, 6)], axis=0, together=False)
case("Slice", "Slice", IMAGE, [ints(1, 0), ints(3, 4), ints(1, 3), ints(1, 2)])
case("Slice no axes", "Slice", (1, 6), [ints(0, 1), ints(9, 5)])
case("Slice back", "Slice", IMAGE, [ints(-1), ints(-99), ints(2), ints(-2)])
case("Slice old", "Slice", IMAGE, opset=9, starts=[1, -3], ends=[4, -1], axes=[2, -1])
case("Slice rows", "Slice", VECTOR, [ints(-1), ints(-9), ints(0), ints(-1)])
case("Slice three rows", "Slice", VECTOR, [ints(0, 1), ints(3, 2)])
case("Split", "Split", (1, 6, 2), [ints(1, 5)], results=2, axis=1)
case("Split even", "Split", VECTOR, results=3, axis=-1)
case("Split old", "Split", VECTOR, results=2, opset=11, axis=1, split=[4, 2])
case("Split count", "Split", (1, 7), results=3, opset=18, axis=1, num_outputs=3)
case("Gather", "Gather", (1, 5, 2), [ints(3, 0, -1)], axis=1)
case("Gather one", "Gather", (1, 5, 2), [scalar(-2, np.int64)], axis=1)
case("Gather run", "Gather", (1, 5, 2), [ints(1, 2, 3)], axis=1)
case("Gather matrix", "Gather", (1, 5, 2), [np.array([[0, 1], [4, 2]])], axis=1)
case("Gather rows", "Gather", (1, 5), [ints(0, 0)], axis=0, together=False)
case("Expand", "Expand", (1, 1, 3), [ints(2, 1)])
case("Expand rows", "Expand", (1, 3), [ints(2, 3)], together=False)
case("Tile", "Tile", (1, 2, 3), [ints(1, 2, 3)])
case("Pad", "Pad", IMAGE, [ints(0, 0, 1, 2, 0, 0, 0, 1)])
case("Pad value", "Pad", IMAGE, [ints(0, 1, 1, 2, 0, 0, -1, -1), scalar(0.5)])
case("Pad axes", "Pad", IMAGE, [ints(1, 2, -1, 0), None, ints(2, -1)], opset=18)
case("Pad nothing", "Pad", IMAGE, [ints(*[0] * 8)])
case("Pad edge", "Pad", IMAGE, [ints(0, 0, 1, 2, 0, 0, 2, 1)], mode="edge")
case("Pad reflect", "Pad", IMAGE, [ints(0, 0, 1, 2, 0, 0, 2, 1)], mode="reflect")
case("Pad wrap", "Pad", IMAGE, [ints(0, 0, 1, 2, 0, 0, 2, 1)], mode="wrap", opset=19)
case("Pad old", "Pad", IMAGE, opset=10, pads=[0, 0, 1, 0, 0, 1, 0, 0], value=0.3)
case("Pad rows", "Pad", VECTOR, [ints(1, 0, 0, 0)], together=False)
case("DepthToSpace", "DepthToSpace", (1, 8, 2, 3), blocksize=2)
case("DepthToSpace CRD", "DepthToSpace", (1, 8, 2, 3), blocksize=2, mode="CRD")
case("SpaceToDepth", "SpaceToDepth", (1, 2, 4, 6), blocksize=2)
SCALES = scalar([1, 1, 2, 3])
case("Upsample", "Upsample", IMAGE, [SCALES], opset=9)
case("Upsample old", "Upsample", IMAGE, opset=8, scales=[1.0, 1.0, 2.0, 3.0])
case("Resize old", "Resize", IMAGE, [SCALES], opset=10)
for mode in ("asymmetric", "half_pixel", "pytorch_half_pixel"):
    for rounding in ("floor", "round_prefer_floor") if mode == "asymmetric" else ("ceil",):
        options = {"coordinate_transformation_mode": mode, "nearest_mode": rounding}
        case(f"Resize {mode} {rounding}", "Resize", IMAGE, [None, SCALES], **options)
case("Resize sizes", "Resize", IMAGE, [None, None, ints(1, 4, 12, 15)])
case("Resize axes", "Resize", IMAGE, [None, scalar([2, 2])], opset=18, axes=[2, 3])


@pytest.mark.parametrize("name", CASES)
def test_operators_agree_with_onnxruntime(name):
    build, shape, low, together = CASES[name]
    net = build()
    model = onnx.read(net)
    x = random((3, *shape[1:]), low=low)
    mapped = dataclasses.replace(model.program, together=False)

    @quick_jit
    def answers(model, x):
        return model(x), mapped(model.weights, x)

    batch, one_by_one = answers(model, x)
    theirs = reference(net, x[:, None])
    assert_close(batch, theirs)
    assert_close(one_by_one, theirs)
    assert model.program.together == together
    assert model.outputs == theirs.shape[1]


def test_a_slice_of_all_examples_takes_all_of_any_batch():
    build, shape, _, _ = CASES["Slice three rows"]
    x = random((5, *shape[1:]))
    assert_close(onnx.read(build())(x), reference(build(), x[:, None]))


# --- Shapes at random -----------------------------------------------------------------------------

SIZES = st.lists(st.integers(1, 4), min_size=2, max_size=3).map(lambda sizes: (1, *sizes))


def agree_or_refuse(net, shape):
    """Ours and onnxruntime's agree; where onnxruntime fails, anything goes but an odd exception."""
    x = random((2, *shape[1:]))
    try:
        theirs = reference(net, x[:, None])
    except Exception:  # its exceptions have no base class of their own
        return
    if theirs.size:
        assert_close(onnx.read(net)(x), theirs)


@settings(max_examples=15)
@given(shape=SIZES, data=st.data())
def test_slices_at_random(shape, data):
    axes = data.draw(st.permutations(range(1, len(shape))))
    ends = st.integers(-6, 6)
    starts, stops = ([data.draw(ends) for _ in axes] for _ in range(2))
    steps = [data.draw(st.sampled_from([-2, -1, 1, 2])) for _ in axes]
    net = single("Slice", shape, [ints(*starts), ints(*stops), ints(*axes), ints(*steps)])
    agree_or_refuse(net, shape)


@settings(max_examples=15)
@given(shape=SIZES, data=st.data())
def test_reshapes_at_random(shape, data):
    size = int(np.prod(shape))
    first = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    target = data.draw(
        st.permutations([first, -1])
        | st.just([0, -1])
        | st.just([1, first, size // first])
        | st.just([-1, *shape[2:]])
    )
    agree_or_refuse(single("Reshape", shape, [ints(*target)]), shape)


@settings(max_examples=15)
@given(shape=SIZES, data=st.data())
def test_pads_at_random(shape, data):
    mode = data.draw(st.sampled_from(["constant", "edge", "reflect"]))
    widths = st.integers(-1 if mode == "constant" else 0, 2)
    pads = [data.draw(widths) if i % len(shape) else 0 for i in range(2 * len(shape))]
    agree_or_refuse(single("Pad", shape, [ints(*pads)], mode=mode), shape)


# --- Bounds ---------------------------------------------------------------------------------------

BOUNDED = (
    "PRelu", "Clip", "Gelu", "Conv strides", "ConvTranspose strides", "MaxPool pads",
    "AveragePool pads", "BatchNormalization", "LayerNormalization", "Pad edge",
)  # fmt: skip


@pytest.mark.parametrize("name", one_in(2, BOUNDED))
def test_bounds_hold_for_samples(name):
    build, shape, low, _ = CASES[name]
    model = onnx.read(build())
    ball = LinfBall(jnp.asarray(random((2, *shape[1:]), low=low)), 0.1)
    noise = random((5, *ball.x.shape), low=-0.1, high=0.1)

    @quick_jit
    def run(f, ball, noise):
        samples = (ball.x + noise).reshape(-1, *shape[1:])
        return f(samples).reshape(5, 2, -1), ibp(f)(ball), crown_ibp(f)(ball)

    samples, *boxes = run(model, ball, noise)
    for box in boxes:
        assert jnp.all((box.lower - 1e-5 <= samples) & (samples <= box.upper + 1e-5))


# --- What is refused ------------------------------------------------------------------------------

REFUSED = {
    "auto_pad": (single("Conv", IMAGE, [KERNEL], auto_pad="SAME"), "auto_pad"),
    "same": (
        single("MaxPool", IMAGE, kernel_shape=[2, 2], auto_pad="SAME_UPPER", dilations=[2, 2]),
        "ambiguous",
    ),
    "too large": (single("AveragePool", IMAGE, kernel_shape=[7, 1]), "do not fit"),
    "mode": (single("Pad", IMAGE, [ints(*[1] * 8)], mode="odd"), "mode=odd"),
    "linear": (single("Resize", IMAGE, [None, SCALES], mode="linear"), "nearest"),
    "down": (single("Resize", IMAGE, [None, scalar([1, 1, 0.5, 1])]), "0.5"),
    "align": (
        single("Resize", IMAGE, [None, SCALES], coordinate_transformation_mode="align_corners"),
        "align_corners",
    ),
    "training": (single("Dropout", VECTOR, [scalar(0.5), scalar(True, bool)]), "eval"),
    "old training": (single("Dropout", VECTOR, opset=6), "eval"),
    "training statistics": (
        single("BatchNormalization", IMAGE, STATISTICS, training_mode=1),
        "training_mode=1",
    ),
    "gather": (single("Gather", VECTOR, [ints(9)], axis=1), "beyond the 6 entries"),
    "axis": (single("Concat", VECTOR, [w(1, 6)], axis=2), "axis 2"),
    "broadcast": (single("Add", VECTOR, [w(6)], opset=6, broadcast=1), "broadcast=1"),
    "unheard of": (single("Relu", VECTOR, colour=3), "colour=3"),
    "mask": (single("Dropout", VECTOR, results=2), "an output that is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_disregarded_is_refused(name):
    net, said = REFUSED[name]
    with pytest.raises(JaxcertError, match=said) as raised:
        onnx.read(net)
    assert isinstance(raised.value, NotImplementedError)
