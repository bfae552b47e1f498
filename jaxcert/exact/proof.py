"""Proofs in files, and a checker that trusts nothing in them.

A proof says that no input of a property file's box leads to its unsafe outputs. It holds trees of
splits and, for each leaf, what a linear bound needs: slopes and multipliers. `check` takes the net
and the property from the user's own ONNX and VNN-LIB files and everything else from the proof as
hints: any slopes and multipliers in their ranges give a bound that holds, if perhaps a weak one.

Proved by a `Report`: the statement about the net over the real numbers with the weights in its
file. Trusted: the two readers (`jaxcert.io`), Python, NumPy, and float64 arithmetic as IEEE 754 has
it (with `exact`, rationals instead). Nothing of the search is imported.

The file is a compressed npz of the arrays of `Proof`, without pickles.
"""

import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import zipfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np

from jaxcert.exact.flat import flat
from jaxcert.io import onnx, vnnlib
from jaxcert.io.unsafe import rounded_down

Array: TypeAlias = Any
File: TypeAlias = str | os.PathLike[str]

VERSION = 1
LEAF, INPUT = -2, -1  # what `layer` says of a leaf and of a split of an input
ADAPTIVE, CHORD, STORED = range(3)  # rules for slopes
DEEPEST = 1000
BATCH = 32  # leaves checked at a time
LARGEST_FILE = 2**31


@dataclasses.dataclass(frozen=True)
class Report:
    """What was proved, and how: the number of trees, splits and leaves, and the smallest of all
    lower bounds, which is positive."""

    trees: int
    splits: int
    leaves: int
    margin: float


# --- Files ----------------------------------------------------------------------------------------
#
# A tree is for one case of the property and for some of the ands of its unsafe outputs, all of which
# each leaf refutes. Its nodes stand in preorder: a split, then all of its lower child, then all of
# its upper child, so that no child can be missing or shared.


@dataclasses.dataclass(frozen=True, eq=False)
class Proof:
    """What a file holds.

    Attributes:
      header: version of the format, hashes of the files, and who wrote it.
      case: of each tree, (t,).
      claims: which ands of the case's unsafe outputs it refutes, bool (t, most ands of a case).
      layer: of each node, `LEAF`, `INPUT`, or the number of the kink whose operand is split, (n,).
      place, value: which input or entry is split, and where, (n,); 0 for leaves.
      weights: of the rows of the and, >= 0, for each refutation, (r, most rows of an and): leaf by
        leaf, and by and.
      rule: how its slopes are chosen, (r,).
      slopes: those that are stored, in order, (s, entries of all kinks).
      multipliers: >= 0, of the splits of hidden values above its leaf, from the root, (m,).
      hidden: which hidden values are bounded with stored slopes on the whole box of a case: case,
        kink, entry, and 0 for the lower or 1 for the upper bound, (h, 4).
      hidden_slopes: of the kinks before each, one after the other.
    """

    header: dict[str, Any]
    case: Array
    claims: Array
    layer: Array
    place: Array
    value: Array
    weights: Array
    rule: Array
    slopes: Array
    multipliers: Array
    hidden: Array
    hidden_slopes: Array


_FORMS = {
    "case": (np.int32, 1), "claims": (np.bool_, 2), "layer": (np.int32, 1),
    "place": (np.int32, 1), "value": (np.float64, 1), "weights": (np.float64, 2),
    "rule": (np.int8, 1), "slopes": (np.float64, 2), "multipliers": (np.float64, 1),
    "hidden": (np.int32, 2), "hidden_slopes": (np.float64, 1),
}  # fmt: skip


def save(proof: Proof, path: File) -> None:
    """Write a file."""
    arrays = {name: np.asarray(getattr(proof, name), dtype) for name, (dtype, _) in _FORMS.items()}
    header = np.frombuffer(json.dumps(proof.header).encode(), np.uint8)
    with open(path, "wb") as file:
        np.savez_compressed(file, header=header, **arrays)


def load(path: File) -> Proof:
    """Read a file, of which nothing is believed but its arrays' types."""
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
            _require(sum(m.file_size for m in members) < LARGEST_FILE, "the file is too large")
        names = sorted(f"{name}.npy" for name in ("header", *_FORMS))
        _require(sorted(m.filename for m in members) == names, "the file has other parts")
        with np.load(path, allow_pickle=False) as parts:
            arrays = {name: parts[name] for name in _FORMS}
            header = json.loads(parts["header"].tobytes().decode())
    except ProofRejected:
        raise
    except Exception as error:  # whatever is wrong with a file, it is no proof
        raise ProofRejected(f"the file cannot be read: {error!r}") from error
    for name, (dtype, rank) in _FORMS.items():
        a = arrays[name]
        _require(a.dtype == dtype and a.ndim == rank, f"{name} has another type or shape")
        _require(a.dtype.kind != "f" or np.isfinite(a).all(), f"{name} holds NaN or infinities")
    _require(isinstance(header, dict), "the header is no dictionary")
    return Proof(header, **arrays)


def uncompressed(path: File) -> bytes:
    """A user's file, whether it is compressed by gzip or not."""
    raw = pathlib.Path(path).read_bytes()
    return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw


def header(network: bytes, prop: bytes) -> dict[str, Any]:
    """The header of proofs about these files."""
    hashes = (hashlib.sha256(content).hexdigest() for content in (network, prop))
    return {"version": VERSION, **dict(zip(("network", "property"), hashes, strict=True))}


def _require(condition: Any, otherwise: str) -> None:
    if not condition:
        raise ProofRejected(otherwise)


# --- Checking -------------------------------------------------------------------------------------


def check(
    proof_file: File, network_file: File, property_file: File, *, exact: bool = False
) -> Report:
    """Check that a file proves a property of a net: no input of any of the property's cases gives
    an output that it calls unsafe.

    Args:
      proof_file: the proof.
      network_file: ONNX; affine operators, Relu and LeakyRelu.
      property_file: VNN-LIB.
      exact: evaluate in rationals; for nets of a few thousand weights.

    Raises:
      ProofRejected: it does not prove it, with the reason.
      UnsupportedOperator, VnnlibError, ValueError: the net or the property cannot be read.
    """
    network, prop = uncompressed(network_file), uncompressed(property_file)
    proof = load(proof_file)
    for name, value in header(network, prop).items():
        _require(proof.header.get(name) == value, f"the proof is for another {name}")
    question = Question.of(network, prop, exact)
    return Check(question, proof).run()


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A net and the property of it to prove.

    Attributes:
      bounds: of the net, with a value for the rows of each and of unsafe outputs.
      boxes: of the cases, (1, n) twice.
      claims: of each case, the values with the rows of its ands. An and is refuted where a
        weighted sum of its rows is positive: then not all of them are at most 0.
    """

    bounds: Bounds
    boxes: list[tuple[Array, Array]]
    claims: list[list[int]]

    @classmethod
    def of(cls, network: bytes, prop: bytes, exact: bool = False) -> "Question":
        """The question that two files put."""
        net = flat(onnx.read(network))
        problem = vnnlib.parse(prop.decode("utf-8-sig", errors="replace"))
        wanted = problem.inputs, problem.outputs
        sizes = net.sizes[0], net.sizes[net.result]
        _require(sizes == wanted, f"the net has {sizes} inputs and outputs, the property {wanted}")
        _require(not (exact and net.rounded), "this net has weights that are no rationals")
        rows = [_rows(rows, sizes[1]) for case in problem.cases for rows in case.unsafe]
        numbers = itertools.count(len(net.steps))
        claims = [[next(numbers) for _ in case.unsafe] for case in problem.cases]
        boxes = [tuple(end[None] for end in case.box()) for case in problem.cases]
        return cls(Bounds(net.extended(rows), exact), boxes, claims)


def _rows(rows: Sequence[vnnlib.Row], k: int) -> tuple[Array, Array]:
    """a . y + c of each row; where that cannot be said exactly, c is rounded down."""
    matrix = np.zeros((len(rows), k))
    for matrix_row, row in zip(matrix, rows, strict=True):
        for i, a in row.terms:
            matrix_row[i] = a
            _require(Fraction(matrix_row[i]) == a, "a row has coefficients that float64 has not")
    return matrix, np.array([rounded_down(row.offset) for row in rows])


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A box of inputs (1, n), whether it is less than its case's, and the splits of hidden values
    above: kink, entry, value, and 1 for what is above it or 0 for what is below."""

    lower: Array
    upper: Array
    own: bool = False
    cuts: tuple[tuple[int, int, float, int], ...] = ()


class _Cursor:
    """A place in an array that is read from the beginning to the end."""

    def __init__(self, array: Array):
        self.array, self.at = array, 0

    def take(self, n: int = 1) -> Array:
        self.at += n
        _require(self.at <= len(self.array), "the proof ends too early")
        return self.array[self.at - n : self.at]


class Check:
    """One pass over a proof, in the order of the file."""

    def __init__(self, question: Question, proof: Proof):
        self.question, self.proof, self.bounds = question, proof, question.bounds
        self.net, n = question.bounds.net, len(proof.layer)
        _require(len(proof.place) == n == len(proof.value), "nodes have different lengths")
        _require(len(proof.case) == len(proof.claims), "trees have different lengths")
        _require(len(proof.weights) == len(proof.rule), "refutations have different lengths")
        self._require_slopes(proof.slopes)
        _require((proof.weights >= 0).all(), "a weight is negative")
        _require((proof.multipliers >= 0).all(), "a multiplier is negative")
        self.nodes, self.refutations = _Cursor(np.arange(n)), _Cursor(np.arange(len(proof.rule)))
        self.slopes, self.multipliers = _Cursor(proof.slopes), _Cursor(proof.multipliers)
        self.stored, self.roots, self.leaves = self._stored(), {}, 0
        self.margin = np.inf

    def _require_slopes(self, slopes: Array) -> None:
        least = self.bounds.least[: slopes.shape[-1]]
        _require(slopes.shape[-1] == len(least), "slopes have another length")
        _require(((slopes >= least) & (slopes <= 1)).all(), "a slope is out of its range")

    def _stored(self) -> dict[int, dict]:
        """The slopes for hidden values, by case."""
        found, slopes = {}, _Cursor(self.proof.hidden_slopes)
        _require(self.proof.hidden.shape[1] == 4, "hidden values have another form")
        for case, kink, entry, side in self.proof.hidden.tolist():
            _require(0 <= kink < len(self.net.kinks) and side in (0, 1), "no such hidden value")
            vector = slopes.take(self.bounds.parts[kink].start)
            self._require_slopes(vector)
            found.setdefault(case, {})[kink, entry, side] = vector
        _require(slopes.at == len(self.proof.hidden_slopes), "there are too many hidden slopes")
        return found

    def run(self) -> Report:
        """Demand that every and of every case is refuted in every leaf of a tree."""
        proof, claims = self.proof, self.question.claims
        open_claims = {claim for case in claims for claim in case}
        for case, chosen in zip(proof.case.tolist(), proof.claims, strict=True):
            _require(0 <= case < len(claims), "there is no such case")
            _require(not chosen[len(claims[case]) :].any(), "there is no such and")
            mine = [claim for claim, use in zip(claims[case], chosen, strict=False) if use]
            for _, leaves in itertools.groupby(self._leaves(case), lambda leaf: leaf.own):
                while some := list(itertools.islice(leaves, BATCH)):
                    self._refute(mine, some, self._known(case, some))
            open_claims -= set(mine)
        _require(not open_claims, f"{len(open_claims)} of the unsafe outputs have no tree")
        for cursor in (self.nodes, self.refutations, self.slopes, self.multipliers):
            _require(cursor.at == len(cursor.array), "the proof holds more than it uses")
        return Report(len(proof.case), len(proof.layer) - self.leaves, self.leaves, self.margin)

    def _leaves(self, case: int) -> Iterator[Leaf]:
        """The leaves of the next tree."""
        stack = [Leaf(*self.question.boxes[case])]
        while stack:
            node = stack.pop()
            (i,) = self.nodes.take()
            layer, place = int(self.proof.layer[i]), int(self.proof.place[i])
            if layer == LEAF:
                self.leaves += 1
                yield node
            else:
                stack += self._children(node, layer, place, float(self.proof.value[i]))[::-1]
            _require(len(stack) <= DEEPEST, "a tree is too deep")

    def _children(self, node: Leaf, layer: int, place: int, value: float) -> list[Leaf]:
        """What is below a split, and what is above it."""
        known = layer == INPUT or 0 <= layer < len(self.net.kinks)
        _require(known, "there is no such kink")
        size = self.net.sizes[0 if layer == INPUT else self.net.kinks[layer]]
        _require(0 <= place < size, "there is no such entry")
        if layer != INPUT:
            cuts = [(*node.cuts, (layer, place, value, side)) for side in (0, 1)]
            return [dataclasses.replace(node, cuts=each) for each in cuts]
        inside = node.lower[0, place] <= value <= node.upper[0, place]
        _require(inside, "an input is split outside of its range")
        here = np.arange(size) == place
        lower, upper = (np.where(here, value, end) for end in (node.lower, node.upper))
        return [Leaf(node.lower, upper, True, node.cuts), Leaf(lower, node.upper, True, node.cuts)]

    def _known(self, case: int, leaves: list[Leaf]) -> Domain:
        """Boxes of all values in leaves of a case."""
        if leaves[0].own:
            ends = ([getattr(leaf, end) for leaf in leaves] for end in ("lower", "upper"))
            known = self.bounds.domain(*map(np.concatenate, ends))
        else:
            if case not in self.roots:
                box, stored = self.question.boxes[case], self.stored.get(case)
                self.roots[case] = self.bounds.domain(*box, stored)
            known = self.roots[case].copy()
        for z in {self.net.operand(self.net.kinks[cut[0]]) for leaf in leaves for cut in leaf.cuts}:
            for ends in (known.lower, known.upper):
                ends[z] = np.array(np.broadcast_to(ends[z], (len(leaves), ends[z].shape[1])))
        for i, leaf in enumerate(leaves):
            for kink, entry, value, side in leaf.cuts:
                z = self.net.operand(self.net.kinks[kink])
                inside = known.lower[z][i, entry] <= value <= known.upper[z][i, entry]
                _require(inside, "a hidden value is split outside of its range")
                (known.upper, known.lower)[side][z][i, entry] = value
        return known

    def _refute(self, claims: list[int], leaves: list[Leaf], known: Domain) -> None:
        """Demand that a weighted sum of the rows of each and is positive in each leaf."""
        taken = [[self._refutation(leaf) for _ in claims] for leaf in leaves]
        for claim, column in zip(claims, zip(*taken, strict=True), strict=True):
            index, stored, multipliers = zip(*column, strict=True)
            weights, rule = self.proof.weights[list(index)], self.proof.rule[list(index)]
            _require(not weights[:, self.net.sizes[claim] :].any(), "there are too many weights")
            slopes = self._slopes(known, rule, np.stack(stored))
            pushes = self._pushes(leaves, multipliers)
            rows = self.bounds.number(weights[:, None, : self.net.sizes[claim]])
            least, _ = self.bounds.below(claim, rows, known, slopes, pushes)
            self.margin = min(self.margin, float(least.min()))
            _require((least > 0).all(), "a leaf's bound is not positive")

    def _refutation(self, leaf: Leaf) -> tuple[int, Array, Array]:
        """The next refutation: its number, stored slopes and multipliers."""
        (i,) = self.refutations.take()
        _require(ADAPTIVE <= self.proof.rule[i] <= STORED, "there is no such rule")
        stored = self.slopes.take()[0] if self.proof.rule[i] == STORED else self.bounds.least
        return i, stored, self.multipliers.take(len(leaf.cuts))

    def _slopes(self, known: Domain, rule: Array, stored: Array) -> Array:
        """Slopes (b, 1, all kinks) as the rules say."""
        found, b = [np.zeros((len(rule), 0))], len(rule)
        for y, part in zip(self.net.kinks, self.bounds.parts, strict=True):
            z, left = self.net.operand(y), self.net.left(y)
            l, u = known.lower[z], known.upper[z]
            table = [adaptive(l, u, left), chords(l, u, left), np.full_like(l, left), l * 0 + 1]
            table = [np.broadcast_to(a, (b, a.shape[1])) for a in table]
            found.append(np.stack([*table, stored[:, part]])[rule, np.arange(b)])
        return np.concatenate(found, 1)[:, None]

    def _pushes(self, leaves: list[Leaf], multipliers: Sequence[Array]) -> dict:
        """What multipliers add up to, for the lower and the upper ends of hidden values."""
        found = {}
        for i, (leaf, given) in enumerate(zip(leaves, multipliers, strict=True)):
            for (kink, entry, _, side), m in zip(leaf.cuts, given.tolist(), strict=True):
                z = self.net.operand(self.net.kinks[kink])
                shape = len(leaves), self.net.sizes[z]
                pair = found.setdefault(z, (np.zeros(shape), np.zeros(shape)))
                pair[1 - side][i, entry] += m
        return found
