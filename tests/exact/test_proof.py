"""Proofs in files: found, checked, and rejected when anything about them is wrong."""

import ast
import dataclasses
import itertools
import json
import pathlib
from fractions import Fraction

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from jaxcert.errors import NotProved, ProofRejected, UnsupportedOperator
from jaxcert.exact import proof, record
from jaxcert.exact.enclosures import Bounds
from jaxcert.exact.flat import flat
from jaxcert.exact.proof import INPUT, LEAF
from jaxcert.io import onnx as reader

# --- Files ----------------------------------------------------------------------------------------


def onnx_bytes(nodes, shape, constants, kind=TensorProto.DOUBLE):
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def dense(seed, sizes, alpha=None, dtype=np.float32):
    """The layers of a random net and its file's bytes; with LeakyRelu if alpha is given."""
    rng = np.random.default_rng(seed)
    layers = [
        (rng.normal(size=(m, n)).astype(dtype) / np.sqrt(n).astype(dtype), rng.normal(size=m) / 4)
        for n, m in itertools.pairwise(sizes)
    ]
    return write_dense([(w, b.astype(dtype)) for w, b in layers], alpha)


def write_dense(layers, alpha=None):
    nodes, constants, x = [], {}, "x"
    for i, (w, b) in enumerate(layers):
        constants |= {f"w{i}": w, f"b{i}": b}
        last = i == len(layers) - 1
        out = "y" if last else f"z{i}"
        nodes.append(helper.make_node("Gemm", [x, f"w{i}", f"b{i}"], [out], transB=1))
        if not last:
            name, options = ("Relu", {}) if alpha is None else ("LeakyRelu", {"alpha": alpha})
            nodes.append(helper.make_node(name, [out], [f"a{i}"], **options))
        x = f"a{i}"
    kind = TensorProto.FLOAT if layers[0][0].dtype == np.float32 else TensorProto.DOUBLE
    return layers, onnx_bytes(nodes, [1, layers[0][0].shape[1]], constants, kind)


def vnnlib(lower, upper, k, unsafe):
    lines = [f"(declare-const X_{i} Real)" for i in range(len(lower))]
    lines += [f"(declare-const Y_{j} Real)" for j in range(k)]
    for i, (l, u) in enumerate(zip(lower, upper, strict=True)):
        lines += [f"(assert (>= X_{i} {l:.12f}))", f"(assert (<= X_{i} {u:.12f}))"]
    return "\n".join([*lines, f"(assert {unsafe})"])


def run(layers, x, alpha=0.0):
    for i, (w, b) in enumerate(layers):
        x = x @ np.asarray(w, np.float64).T + b
        x = np.maximum(alpha * x, x) if i < len(layers) - 1 else x
    return x


@dataclasses.dataclass
class Instance:
    layers: list
    network: pathlib.Path
    prop: pathlib.Path
    file: pathlib.Path
    report: proof.Report

    def check(self, changed=None, *, exact=False, network=None, prop=None):
        """Check the proof, or another one."""
        file = self.file
        if changed is not None:
            file = self.file.with_suffix(".changed")
            proof.save(changed, file)
        return proof.check(file, network or self.network, prop or self.prop, exact=exact)

    def loaded(self):
        return proof.load(self.file)

    def question(self, prop=None):
        prop = self.prop.read_bytes() if prop is None else prop
        return proof.Question.of(self.network.read_bytes(), prop)


def make(folder, layers, network, prop):
    (folder / "net.onnx").write_bytes(network)
    (folder / "prop.vnnlib").write_text(prop)
    files = folder / "net.onnx", folder / "prop.vnnlib", folder / "proof.npz"
    return Instance(layers, *files, record.prove(*files, seconds=60))


LOW, HIGH = np.array([-1.0, -1.0]), np.array([1.0, 1.0])


def extremes(layers, low, high):
    points = np.random.default_rng(9).uniform(low, high, (20000, len(low)))
    y = run(layers, points)
    return y.min(0), y.max(0)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A proof by splits of inputs, of two ands, one of them of two rows."""
    layers, network = dense(3, (2, 8, 8, 2))
    low, high = extremes(layers, LOW, HIGH)
    first, second = high[0] + 0.1, low[1] - 0.1
    ands = f"(or (>= Y_0 {first:.6f}) (and (<= Y_1 {second:.6f}) (<= Y_0 100.0)))"
    return make(tmp_path_factory.mktemp("few"), layers, network, vnnlib(LOW, HIGH, 2, ands))


BOX = np.full(20, -0.55), np.full(20, 0.55)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A proof by splits of hidden values."""
    layers, network = dense(5, (20, 6, 6, 2))
    known = Bounds(flat(reader.read(network))).domain(BOX[0][None], BOX[1][None])
    _, high = extremes(layers, *BOX)
    first = 0.75 * high[0] + 0.25 * known.upper[-1][0, 0]
    second = known.upper[-1][0, 1] + 0.1
    ands = f"(or (>= Y_0 {first:.6f}) (>= Y_1 {second:.6f}))"
    return make(tmp_path_factory.mktemp("many"), layers, network, vnnlib(*BOX, 2, ands))


# --- Proofs that hold -----------------------------------------------------------------------------


def test_proofs_split_and_are_checked(few, many):
    for each, kind in ((few, True), (many, False)):
        assert each.check() == each.report
        assert each.report.splits >= 3
        assert each.report.leaves == each.report.splits + each.report.trees
        layer = each.loaded().layer
        assert ((layer[layer != LEAF] == INPUT) == kind).all()
    assert many.report.trees == 2
    assert len(many.loaded().hidden) > 0
    assert many.loaded().multipliers.any()


@pytest.mark.parametrize("name", ["few", "many"])
def test_rationals_agree(name, request):
    each = request.getfixturevalue(name)
    exact = each.check(exact=True)
    assert abs(exact.margin - each.report.margin) < 1e-9
    assert dataclasses.replace(exact, margin=0) == dataclasses.replace(each.report, margin=0)


def test_the_same_files_compressed_differently(few, tmp_path):
    import gzip

    (tmp_path / "n.gz").write_bytes(gzip.compress(few.network.read_bytes()))
    (tmp_path / "p.gz").write_bytes(gzip.compress(few.prop.read_bytes()))
    assert few.check(network=tmp_path / "n.gz", prop=tmp_path / "p.gz") == few.report


def test_what_is_false_or_takes_too_long_is_not_proved(few, tmp_path):
    _, high = extremes(few.layers, LOW, HIGH)
    (tmp_path / "sat").write_text(vnnlib(LOW, HIGH, 2, f"(>= Y_0 {high[0] - 0.05:.6f})"))
    with pytest.raises(NotProved, match="unsafe outputs at"):
        record.prove(few.network, tmp_path / "sat", tmp_path / "proof")
    with pytest.raises(NotProved, match="time ran out"):
        record.prove(few.network, few.prop, tmp_path / "proof", seconds=0)
    assert [path.name for path in tmp_path.iterdir()] == ["sat"]


def test_two_cases(tmp_path):
    layers, network = dense(8, (2, 6, 1))
    _, high = extremes(layers, LOW, HIGH)
    halves = ["(and (<= X_0 0.1) (>= Y_0 {0}))", "(and (>= X_0 0.1) (>= Y_0 {0}))"]
    ands = f"(or {' '.join(halves)})".replace("{0}", f"{high[0] + 0.1:.6f}")
    each = make(tmp_path, layers, network, vnnlib(LOW, HIGH, 1, ands))
    assert each.report.trees == 2
    p = each.loaded()
    nodes = _nodes_of_tree(p, 0)
    leaves = sum(p.layer[:nodes] == LEAF)
    ends = {"case": 1, "claims": 1, "layer": nodes, "place": nodes, "value": nodes}
    ends |= {"weights": leaves, "rule": leaves}
    first = {name: getattr(p, name)[:end] for name, end in ends.items()}
    with pytest.raises(ProofRejected, match="there is no tree for 1"):
        each.check(dataclasses.replace(p, **first))


def _nodes_of_tree(p, start):
    """Where the subtree at a node ends."""
    end = start + 1
    if p.layer[start] != LEAF:
        end = _nodes_of_tree(p, _nodes_of_tree(p, end))
    return end


# --- Proofs that do not ---------------------------------------------------------------------------


def put(name, index, value):
    def change(p):
        array = getattr(p, name).copy()
        array[index] = value
        return dataclasses.replace(p, **{name: array})

    return change


def cut(name, end):
    return lambda p: dataclasses.replace(p, **{name: getattr(p, name)[:end]})


def without_last_leaf(p):
    return dataclasses.replace(p, layer=p.layer[:-1], place=p.place[:-1], value=p.value[:-1])


def root_as_leaf(p):
    """The lower child of the root in its place, as if the other one did not exist."""
    end = _nodes_of_tree(p, 1)
    keep = {name: getattr(p, name)[1:end] for name in ("layer", "place", "value")}
    leaves = (p.layer[1:end] == LEAF).sum() * p.claims[0].sum()
    return dataclasses.replace(p, **keep, weights=p.weights[:leaves], rule=p.rule[:leaves])


def swapped(p):
    """The children of the root of the first tree that has any, without what their leaves hold."""
    root = int(np.flatnonzero(p.layer != LEAF)[0])
    middle, end = _nodes_of_tree(p, root + 1), _nodes_of_tree(p, root)
    order = [
        *range(root + 1),
        *range(middle, end),
        *range(root + 1, middle),
        *range(end, len(p.layer)),
    ]
    return dataclasses.replace(
        p, **{name: getattr(p, name)[order] for name in ("layer", "place", "value")}
    )


def deep(p):
    chain = np.zeros(3000, np.int32) + INPUT
    return dataclasses.replace(p, layer=chain, place=chain * 0, value=np.linspace(1, 0.5, 3000))


def first_split(p):
    return int(np.flatnonzero(p.layer != LEAF)[0])


TAMPERED = {
    "slope above": ("many", put("slopes", (0, 0), 1.5), "slope is out of its range"),
    "slope below": ("many", put("slopes", (-1, 3), -0.1), "slope is out of its range"),
    "hidden slope": ("many", put("hidden_slopes", 0, 1.01), "slope is out of its range"),
    "slopes missing": ("many", cut("slopes", -1), "ends too early"),
    "fewer slopes": ("many", lambda p: dataclasses.replace(p, slopes=p.slopes[:, 1:]), "length"),
    "hidden slopes missing": ("many", cut("hidden_slopes", -1), "ends too early"),
    "hidden bounds missing": ("many", cut("hidden", -1), "more hidden slopes"),
    "other hidden kink": ("many", put("hidden", (0, 1), 7), "no such hidden"),
    "other hidden entry": ("many", put("hidden", (0, 2), 6), "no such hidden"),
    "other hidden case": ("many", put("hidden", (0, 0), 1), "no such hidden"),
    "third side": ("many", put("hidden", (0, 3), 2), "no such hidden"),
    "hidden form": ("many", lambda p: dataclasses.replace(p, hidden=p.hidden[:, 1:]), "form"),
    "negative multiplier": ("many", put("multipliers", 0, -1e-3), "multiplier is negative"),
    "large multipliers": ("many", put("multipliers", slice(None), 9.0), "is not positive"),
    "multipliers missing": ("many", cut("multipliers", -1), "ends too early"),
    "negative weight": ("few", put("weights", (0, 1), -1.0), "weight is negative"),
    "no weights": ("few", put("weights", 0, 0.0), "is not positive"),
    "too many weights": ("few", put("weights", (0, 1), 1.0), "more weights than rows"),
    "unknown rule": ("few", put("rule", 0, 3), "no such rule"),
    "negative rule": ("few", put("rule", 0, -1), "no such rule"),
    "rule without slopes": ("few", put("rule", 0, 2), "ends too early"),
    "leaf missing": ("few", without_last_leaf, "ends too early"),
    "refutation missing": ("few", cut("rule", -1), "refutations are incomplete"),
    "place missing": ("few", cut("place", -1), "nodes are incomplete"),
    "child missing": ("few", root_as_leaf, "is not positive"),
    "swapped children, inputs": ("few", swapped, "not positive|outside of its range"),
    "swapped children, hidden": ("many", swapped, "not positive|outside"),
    "split outside": ("few", lambda p: put("value", first_split(p), 1.5)(p), "input is split outs"),
    "split moved": ("few", lambda p: put("value", first_split(p), 0.999)(p), r"not positive|outs"),
    "hidden split outside": ("many", lambda p: put("value", first_split(p), 1e6)(p), "hidden valu"),
    "hidden split moved": ("many", lambda p: put("value", first_split(p), 0.3)(p), "not positive"),
    "split of another input": ("few", lambda p: put("place", first_split(p), 2)(p), "such entry"),
    "split of input -1": ("few", lambda p: put("place", first_split(p), -1)(p), "such entry"),
    "split of another kink": ("many", lambda p: put("layer", first_split(p), 2)(p), "such kink"),
    "split of kink -3": ("many", lambda p: put("layer", first_split(p), -3)(p), "such kink"),
    "deep": ("few", deep, "too deep"),
    "case": ("few", put("case", 0, 1), "no such case"),
    "case -1": ("few", put("case", 0, -1), "no such case"),
    "and not claimed": ("few", put("claims", (0, 1), False), "no tree for 1|more than its trees"),
    "trees incomplete": ("few", cut("claims", 0), "trees are incomplete"),
    "NaN": ("many", put("multipliers", 0, np.nan), "'multipliers' is not finite"),
    "infinity": ("few", put("value", 0, np.inf), "'value' is not finite"),
    "float32": ("few", lambda p: dataclasses.replace(p, value=p.value.astype("f")), "type or rank"),
    "rank": ("few", lambda p: dataclasses.replace(p, rule=p.rule[:, None]), "type or rank"),
    "version": ("few", lambda p: dataclasses.replace(p, header=p.header | {"version": 2}), "vers"),
    "no hash": ("few", lambda p: dataclasses.replace(p, header={"version": 1}), "another network"),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERED)
def test_tampered(what, request):
    name, change, why = TAMPERED[what]
    each = request.getfixturevalue(name)
    with pytest.raises(ProofRejected, match=why):
        each.check(change(each.loaded()))


def test_swapped_refutations(many):
    """What refutes one child of a hidden split need not refute the other."""
    p, reasons = many.loaded(), []
    depths = _depths(p)
    for i in np.flatnonzero(np.diff(depths) == 0).tolist():
        slopes, weights, multipliers = p.slopes.copy(), p.weights.copy(), p.multipliers.copy()
        for array in (slopes, weights):
            array[[i, i + 1]] = array[[i + 1, i]]
        part = slice(sum(depths[:i]), sum(depths[: i + 2]))
        multipliers[part] = np.roll(multipliers[part], depths[i])
        changed = dataclasses.replace(p, slopes=slopes, weights=weights, multipliers=multipliers)
        try:
            assert many.check(changed).margin > 0
        except ProofRejected as error:
            reasons.append(str(error))
    assert reasons
    assert set(reasons) == {"a leaf's bound is not positive"}


def _depths(p):
    """How many splits are above each leaf."""
    found, stack = [], []
    for layer in p.layer:
        depth = stack.pop() if stack else 0
        found += [depth] if layer == LEAF else []
        stack += [] if layer == LEAF else [depth + 1] * 2
    return found


@pytest.mark.parametrize("layer", [0, 2])
def test_another_net(many, tmp_path, layer):
    layers = [(w.copy(), b.copy()) for w, b in many.layers]
    layers[layer][0][0, 0] += 1e-3
    (tmp_path / "net").write_bytes(write_dense(layers)[1])
    with pytest.raises(ProofRejected, match="another network"):
        many.check(network=tmp_path / "net")


def forged(each, network, prop):
    return dataclasses.replace(each.loaded(), header=proof.header(network, prop))


@pytest.mark.parametrize("name", ["few", "many"])
def test_forged_hashes(name, request, tmp_path):
    """With the right hashes it is the bounds that tell nets and properties apart."""
    each = request.getfixturevalue(name)
    layers = [*each.layers[:-1], (each.layers[-1][0], each.layers[-1][1] + np.float32(1))]
    network, prop = write_dense(layers)[1], each.prop.read_bytes()
    (tmp_path / "net").write_bytes(network)
    with pytest.raises(ProofRejected, match=r"not positive|outside"):
        each.check(forged(each, network, prop), network=tmp_path / "net")
    wider = prop.replace(b"<= X_0 ", b"<= X_0 1")
    (tmp_path / "prop").write_bytes(wider)
    with pytest.raises(ProofRejected, match="another property"):
        each.check(prop=tmp_path / "prop")
    with pytest.raises(ProofRejected, match=r"not positive|outside"):
        each.check(forged(each, each.network.read_bytes(), wider), prop=tmp_path / "prop")


def test_broken_files(few, tmp_path):
    content, file = few.file.read_bytes(), tmp_path / "file"
    arrays = dict(np.load(few.file))

    def rejected(why):
        with pytest.raises(ProofRejected, match=why):
            proof.check(file, few.network, few.prop)

    for end in (0, 10, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:end])
        rejected("cannot be read")
    for changes in (
        {"slopes": np.array([[{}]], object)},
        {"header": np.frombuffer(b"{", np.uint8)},
        {"header": np.frombuffer(b"\xff", np.uint8)},
        {"more": np.zeros(1)},
    ):
        with file.open("wb") as out:
            np.savez(out, **arrays | changes)
        rejected("cannot be read")
    with file.open("wb") as out:
        np.savez(out, **arrays | {"header": np.frombuffer(json.dumps([1]).encode(), np.uint8)})
    rejected("not a dictionary")
    del arrays["rule"]
    with file.open("wb") as out:
        np.savez(out, **arrays)
    rejected("cannot be read")


# A property that is false by little: whatever is changed in the proof of one that is true, nothing
# may prove it.

_CHANGES = st.lists(
    st.tuples(
        st.sampled_from(sorted(proof.FORMS)),
        st.integers(0, 10**6),
        st.one_of(
            st.floats(0, 1), st.sampled_from([0.0, 1.0, -1.0, -2.0, 2.0, 1e-3, 1e9, 1e300, -0.5])
        ),
    ),
    max_size=6,
)


@given(name=st.sampled_from(["few", "many"]), changes=_CHANGES)
def test_nothing_proves_what_is_false(name, changes, request):
    each = request.getfixturevalue(name)
    low, high = (LOW, HIGH) if name == "few" else BOX
    _, most = extremes(each.layers, low, high)
    false = vnnlib(low, high, 2, f"(or (>= Y_0 {most[0] - 0.01:.6f}) (>= Y_1 1000.0))")
    arrays = {key: getattr(each.loaded(), key).copy() for key in proof.FORMS}
    with np.errstate(all="ignore"):
        for key, place, value in changes:
            if arrays[key].size:
                cast = np.float64(value).astype(arrays[key].dtype)
                arrays[key].flat[place % arrays[key].size] = cast
        with pytest.raises(ProofRejected):
            proof.Check(each.question(false.encode()), proof.Proof({}, **arrays)).run()


# --- Nets -----------------------------------------------------------------------------------------

node = helper.make_node


def some(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape) / 2


HOW = {"strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 2], "group": 2}
CONV = node("Conv", ["x", "k", "c"], ["y"], **HOW)
CONSTANTS = {"k": some(1, 4, 1, 3, 2), "c": some(2, 4)}
NORM = dict(zip("sbmv", (some(3, 2), some(4, 2), some(5, 2), some(6, 2) ** 2), strict=True))

NETS = {
    "conv": ([CONV], [1, 2, 5, 6], CONSTANTS),
    "norm": ([node("BatchNormalization", ["x", *"sbmv"], ["y"], epsilon=0.125)],
             [1, 2, 3, 3], NORM),
    "average": ([node("AveragePool", ["x"], ["y"], kernel_shape=[2, 3], strides=[1, 2])],
                [1, 2, 4, 5], {}),
    "transposed": ([node("Transpose", ["x"], ["y"], perm=[0, 2, 1])], [1, 2, 3], {}),
    "reshaped": ([node("Reshape", ["x", "n"], ["y"])], [1, 2, 6], {"n": np.array([0, -1])}),
    "rows": ([node("MatMul", ["x", "a"], ["y"])], [1, 2, 3], {"a": some(1, 3, 4)}),
    "scaled": ([node("Mul", ["a", "x"], ["u"]), node("Div", ["u", "c"], ["v"]),
                node("Sub", ["c", "v"], ["y"])],
               [1, 2, 3], {"a": some(1, 3), "c": some(2, 2, 1)}),
    "gemm": ([node("Gemm", ["x", "a", "c"], ["y"], alpha=0.5, beta=2.0)],
             [1, 3], {"a": some(1, 3, 4), "c": some(2, 4)}),
    "residual": ([node("Gemm", ["x", "a"], ["u"]), node("LeakyRelu", ["u"], ["v"], alpha=0.25),
                  node("Gemm", ["v", "c"], ["w"]), node("Sub", ["x", "w"], ["s"]),
                  node("Add", ["s", "u"], ["t"]), node("Relu", ["t"], ["y"])],
                 [1, 5], {"a": some(1, 5, 5), "c": some(2, 5, 5)}),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_nets_are_what_the_files_say(name):
    content = onnx_bytes(*NETS[name])
    net = flat(reader.read(content))
    points = np.random.default_rng(0).normal(size=(5, net.sizes[0]))
    # Boxes of no width hold one value.
    known = Bounds(net).domain(points, points)
    evaluator = ReferenceEvaluator(onnx.load_from_string(content))
    shape = NETS[name][1]
    theirs = [evaluator.run(None, {"x": p.reshape(shape)})[0].reshape(-1) for p in points]
    low, high = known.lower[net.result], known.upper[net.result]
    np.testing.assert_allclose(low, theirs, rtol=1e-9, atol=1e-9)
    assert (low <= np.array(theirs) + 1e-14).all()
    assert (high >= np.array(theirs) - 1e-14).all()


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Sigmoid", ["x"], ["y"])],
        [node("Mul", ["x", "x"], ["y"])],
        [node("MatMul", ["a", "x"], ["y"])],
        [node("LeakyRelu", ["x"], ["y"], alpha=1.5)],
        [node("AveragePool", ["x"], ["y"], kernel_shape=[2], pads=[1, 1])],
        [node("Div", ["a", "x"], ["y"])],
    ],
    ids=lambda nodes: nodes[0].op_type,
)
def test_other_nets_are_refused(nodes):
    content = onnx_bytes(nodes, [1, 3, 3], {"a": np.eye(3)})
    with pytest.raises(UnsupportedOperator, match="the checker of proofs does not know"):
        flat(reader.read(content))


# --- Bounds ---------------------------------------------------------------------------------------


def random_bound(seed, bounds, b=3):
    """Boxes, cuts at 0, slopes, multipliers and rows, all random."""
    rng, net = np.random.default_rng(seed), bounds.net
    middle, width = rng.normal(size=(b, net.sizes[0])), rng.uniform(0, 1, (b, 1))
    known = bounds.domain(middle - width, middle + width)
    pushes, signs = {}, {}
    for y in net.kinks:
        z = net.operand(y)
        crosses = (known.lower[z] < 0) & (known.upper[z] > 0)
        sign = (
            rng.integers(-1, 2, crosses.shape) * crosses * (rng.uniform(size=crosses.shape) < 0.2)
        )
        known.lower[z] = np.where(sign > 0, 0, known.lower[z])
        known.upper[z] = np.where(sign < 0, 0, known.upper[z])
        signs[z] = sign
        pushes[z] = rng.exponential(size=(2, *sign.shape)) * (sign != 0)
    slopes = rng.uniform(bounds.least, 1, (b, 1, bounds.entries))
    slopes = np.where(rng.uniform(size=slopes.shape) < 0.5, np.nan, slopes)
    rows = rng.normal(size=(b, 1, net.sizes[net.result]))
    return known, signs, slopes, pushes, rows


def inside(net, known, signs, points):
    """All values at points (b, p, m), and which of these are where the cuts say."""
    values, fine = [points], np.ones(points.shape[:2], bool)
    for v, step in enumerate(net.steps):
        if step is None:
            continue
        total = sum(weight.apply(values[x]) for x, weight in step.parts)
        total = total if step.offset is None else total + step.offset
        values.append(total if step.left is None else np.maximum(step.left * total, total))
        if v in signs:
            fine &= (signs[v][:, None] * values[v] >= 0).all(2)
    return values, fine


@pytest.mark.parametrize("name", ["residual", "conv", "dense", "leaky"])
def test_bounds_hold_at_samples(name):
    if name in NETS:
        content = onnx_bytes(*NETS[name])
    else:
        content = dense(1, (3, 6, 5, 2), 0.125 if name == "leaky" else None)[1]
    bounds = Bounds(flat(reader.read(content)))
    net, met = bounds.net, 0
    for seed in range(12):
        known, signs, slopes, pushes, rows = random_bound(seed, bounds)
        least, _ = bounds.below(net.result, rows, known, slopes, pushes)
        share = np.random.default_rng(seed).uniform(size=(3, 400, net.sizes[0])).round(1)
        low, high = known.lower[0][:, None], known.upper[0][:, None]
        values, fine = inside(net, known, signs, low + share * (high - low))
        value = (rows * values[net.result]).sum(2)
        assert (value >= least - 1e-12)[fine].all()
        met += fine.sum()
        for low, high, at in zip(known.lower, known.upper, values, strict=True):
            assert ((at >= low[:, None] - 1e-12) & (at <= high[:, None] + 1e-12))[fine].all()
    assert met > 500


def exactly(layers, x):
    """A relu net in rationals."""
    for i, (w, b) in enumerate(layers):
        x = [
            sum((Fraction(float(a)) * v for a, v in zip(row, x, strict=True)), Fraction(float(c)))
            for row, c in zip(w, b, strict=True)
        ]
        x = [max(v, Fraction(0)) for v in x] if i < len(layers) - 1 else x
    return x


@pytest.mark.parametrize("seed", range(3))
def test_rounding_is_counted(seed):
    """The float64 bound is below the exact one by little, which holds at corners, in rationals.

    Boxes are so narrow that only rounding is between the bounds and the values.
    """
    layers, content = dense(seed, (3, 6, 6, 2))
    net = flat(reader.read(content))
    floats, rationals = Bounds(net), Bounds(net, exact=True)
    middle = np.random.default_rng(seed).normal(size=(1, 3))
    known = floats.domain(middle - 2.0**-45, middle + 2.0**-45)
    slopes = np.full((1, 1, floats.entries), np.nan)
    rows = np.array([[[1.0, -1.0]]])
    least, _ = floats.below(net.result, rows, known, slopes)
    exact, _ = rationals.below(net.result, rationals.number(rows), known, slopes)
    assert isinstance(exact[0, 0], Fraction)
    assert exact[0, 0] - Fraction(1, 10**12) < Fraction(least[0, 0]) <= exact[0, 0]
    ends = zip(known.lower[0][0].tolist(), known.upper[0][0].tolist(), strict=True)
    for corner in itertools.product(*ends):
        y = exactly(layers, list(map(Fraction, corner)))
        assert y[0] - y[1] >= exact[0, 0]
        for low, high, value in zip(
            known.lower[net.result][0], known.upper[net.result][0], y, strict=True
        ):
            assert Fraction(low) <= value <= Fraction(high)


def test_what_is_too_large_proves_nothing(tmp_path):
    layers, _ = dense(0, (2, 3, 1), dtype=np.float64)
    layers[0][0][0, 0] = 1e200
    (tmp_path / "net").write_bytes(write_dense(layers)[1])
    (tmp_path / "prop").write_text(vnnlib(LOW, HIGH, 1, "(>= Y_0 1e300)"))
    with pytest.raises(ProofRejected, match="below 2"):
        record.prove(tmp_path / "net", tmp_path / "prop", tmp_path / "proof")


def test_the_checker_imports_nothing_of_the_search():
    folder = pathlib.Path(proof.__file__).parent
    allowed = {"jaxcert.exact.enclosures", "jaxcert.exact.flat", "jaxcert.errors"}
    for name in ("proof.py", "enclosures.py", "flat.py"):
        tree = ast.parse((folder / name).read_text())
        froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        ours = {str(n.module) for n in froms if str(n.module).startswith("jaxcert")}
        assert all(module in allowed or module.startswith("jaxcert.io") for module in ours)
        plain = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert not any(module.startswith(("jax", "optax", "scipy")) for module in plain)


def test_acas_xu(data, tmp_path):
    folder = data / "vnncomp" / "acasxu"
    files = (
        folder / "onnx" / "ACASXU_run2a_5_2_batch_2000.onnx.gz",
        folder / "vnnlib" / "prop_3.vnnlib.gz",
    )
    report = record.prove(*files, tmp_path / "proof")
    assert report.splits > 0
    assert proof.check(tmp_path / "proof", *files) == report
