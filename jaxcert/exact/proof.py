"""Proofs in files, and a checker that trusts nothing in them.

A proof says that no input of a property file's boxes leads to its unsafe outputs. It holds trees of
splits and, for each leaf, what a linear bound needs: slopes and multipliers. `check` takes the net
and the property from the user's own ONNX and VNN-LIB files, and everything in the proof as a hint:
slopes and multipliers in their ranges give a bound that holds, whoever chose them.

A `Report` is a statement about the net over the real numbers, with the weights in its file. Trusted
are the readers in `jaxcert.io`, Python, and NumPy's float64 (with `exact`, fractions instead), and
nothing of the search: nets are those of `flat.py`, bounds those of `enclosures.py`.
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
from typing import Any, TypeAlias

import numpy as np

from jaxcert.errors import ProofRejected
from jaxcert.exact.enclosures import Bounds, Domain, adaptive, chords
from jaxcert.exact.flat import flat
from jaxcert.io import onnx, vnnlib
from jaxcert.io.unsafe import rounded_down

Array: TypeAlias = Any
File: TypeAlias = str | os.PathLike[str]

VERSION = 1
LEAF, INPUT = -2, -1  # what `layer` says of a leaf, and of a split of an input
ADAPTIVE, CHORD, STORED = range(3)  # how the slopes of a refutation are chosen
DEEPEST = 1000
LARGEST = 2**31  # bytes of a file's arrays
BATCH = 32  # leaves checked at a time


# --- The file -------------------------------------------------------------------------------------
#
# A compressed npz of these arrays, without pickles. A tree is about one case of the property and
# some of the ands of its unsafe outputs; each of its leaves refutes all of these. Nodes stand in
# preorder: a split, all of its lower child, all of its upper child. So no child can be missing,
# shared or its own ancestor, or the arrays end too early or too late.


@dataclasses.dataclass(frozen=True, eq=False)
class Proof:
    """What a file holds.

    Attributes:
      header: version of the format and hashes of the two files.
      case: of each tree, (t,).
      claims: which ands of the case's unsafe outputs it refutes, bool (t, most ands of a case).
      layer: of each node, `LEAF`, `INPUT`, or the number of the kink whose operand is split, (n,).
      place, value: which entry is split, and where, (n,); 0 for leaves.
      weights: >= 0, of the rows of the and, for each refutation, (r, most rows of an and): leaf by
        leaf, in it and by and.
      rule: of its slopes, (r,).
      slopes: those that are stored, in order, (s, entries of all kinks).
      multipliers: >= 0, one for each split of a hidden value above the leaf, from the root, for
        each refutation, (m,).
      hidden: bounds of hidden values on the whole box of a case that are found with stored slopes:
        case, kink, entry, and 0 for the lower or 1 for the upper bound, (h, 4).
      hidden_slopes: of all kinks before each of them, one after the other.
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


FORMS = {
    "case": (np.int32, 1), "claims": (np.bool_, 2), "layer": (np.int32, 1),
    "place": (np.int32, 1), "value": (np.float64, 1), "weights": (np.float64, 2),
    "rule": (np.int8, 1), "slopes": (np.float64, 2), "multipliers": (np.float64, 1),
    "hidden": (np.int32, 2), "hidden_slopes": (np.float64, 1),
}  # fmt: skip
"""The type and the rank of each array."""


def save(proof: Proof, path: File) -> None:
    """Write a file."""
    arrays: dict[str, Any] = {name: getattr(proof, name) for name in FORMS}
    arrays["header"] = np.frombuffer(json.dumps(proof.header).encode(), np.uint8)
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def load(path: File) -> Proof:
    """Read a file: arrays of these types and finite numbers, or `ProofRejected`."""
    names = sorted(f"{name}.npy" for name in ("header", *FORMS))
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
        sizes = {member.filename: member.file_size for member in members}
        if sorted(sizes) != names or len(members) > len(names) or sum(sizes.values()) > LARGEST:
            raise ValueError("it is too large or has other parts")
        with np.load(path, allow_pickle=False) as parts:
            arrays = {name: parts[name] for name in FORMS}
            header = json.loads(parts["header"].tobytes().decode())
    except Exception as error:  # whatever is wrong with it, it is no proof
        raise ProofRejected(f"the file cannot be read: {error!r}") from error
    for name, (dtype, rank) in FORMS.items():
        a = arrays[name]
        _require(a.dtype == dtype and a.ndim == rank, f"'{name}' has another type or rank")
        _require(a.dtype.kind != "f" or np.isfinite(a).all(), f"'{name}' is not finite")
    _require(isinstance(header, dict), "the header is not a dictionary")
    return Proof(header, **arrays)


def uncompressed(path: File) -> bytes:
    """What is in a file that may be compressed by gzip."""
    raw = pathlib.Path(path).read_bytes()
    return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw


def header(network: bytes, prop: bytes) -> dict[str, Any]:
    """The header of proofs about these files."""
    network_hash, property_hash = (hashlib.sha256(part).hexdigest() for part in (network, prop))
    return {"version": VERSION, "network": network_hash, "property": property_hash}


def _require(condition: Any, otherwise: str) -> None:
    if not condition:
        raise ProofRejected(otherwise)


# --- The question ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A net and what is to be proved of it.

    Attributes:
      bounds: of the net, which has one more value for each and: its rows.
      boxes: of the cases, (1, n) twice; a box of a case with cuts is larger than the case.
      cut: whether there are such cases.
      claims: the values of the ands of each case. Rows with a positive weighted sum refute one.
    """

    bounds: Bounds
    boxes: list[tuple[Array, Array]]
    claims: list[list[int]]
    cut: bool = False

    @classmethod
    def of(cls, network: bytes, prop: bytes, exact: bool = False) -> "Question":
        """The question that two files put, or `ProofRejected` if they do not fit together."""
        net = flat(onnx.read(network))
        problem = vnnlib.parse(prop.decode("utf-8-sig", errors="replace"))
        sizes, wanted = (net.sizes[0], net.sizes[net.result]), (problem.inputs, problem.outputs)
        _require(sizes == wanted, f"the net has {sizes} inputs and outputs, the property {wanted}")
        _require(not (exact and net.rounded), "the net has weights that are not rational")
        numbers = itertools.count(len(net.steps))
        claims = [[next(numbers) for _ in case.unsafe] for case in problem.cases]
        rows = [_rows(rows, sizes[1]) for case in problem.cases for rows in case.unsafe]
        boxes = [(low[None], high[None]) for low, high in (case.box() for case in problem.cases)]
        cut = any(case.cuts for case in problem.cases)
        return cls(Bounds(net.extended(rows), exact), boxes, claims, cut)


def _rows(rows: Sequence[vnnlib.Row], k: int) -> tuple[Array, Array]:
    """The rows a . y + c of an and, c rounded down."""
    matrix = np.zeros((len(rows), k))
    _require(len(rows) > 0, "the property calls all outputs unsafe")
    for place, row in enumerate(rows):
        for i, a in row.terms:
            _require(a.bit_length() < 1000 and int(float(a)) == a, f"{a} is not in float64")
            matrix[place, i] = a
    return matrix, np.array([rounded_down(row.offset) for row in rows], np.float64)


# --- The checker ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Report:
    """What a proof consists of, and the least of its bounds, which is positive."""

    trees: int
    splits: int
    leaves: int
    margin: float


@np.errstate(all="ignore")  # what is not finite proves nothing
def check(
    proof_file: File, network_file: File, property_file: File, *, exact: bool = False
) -> Report:
    """Check that a file proves that no input in a property's boxes leads to its unsafe outputs.

    Args:
      proof_file: the proof.
      network_file: ONNX; of affine operators, Relu and LeakyRelu.
      property_file: VNN-LIB.
      exact: evaluate in rationals, not in float64; for nets of up to a few thousand weights.

    Raises:
      ProofRejected: it does not; the message says why.
      UnsupportedOperator, VnnlibError, ValueError: the net or the property cannot be read.
    """
    network, prop = uncompressed(network_file), uncompressed(property_file)
    proof = load(proof_file)
    for name, value in header(network, prop).items():
        _require(proof.header.get(name) == value, f"the proof is for another {name}")
    return Check(Question.of(network, prop, exact), proof).run()


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """What is above a node of a tree: a box of inputs (1, n), whether it is less than the case's,
    and the splits of hidden values: kink, entry, value, and whether the node is above it."""

    lower: Array
    upper: Array
    own: bool = False
    cuts: tuple[tuple[int, int, float, bool], ...] = ()


class _Cursor:
    """A place in what is read from its beginning to its end."""

    def __init__(self, values: Sequence[Any]):
        self.values, self.at = values, 0

    def take(self, n: int) -> Any:
        self.at += n
        _require(self.at <= len(self.values), "the proof ends too early")
        return self.values[self.at - n : self.at]


class Check:
    """One pass over a proof, in the order of its arrays."""

    def __init__(self, question: Question, proof: Proof):
        self.question, self.proof, self.bounds = question, proof, question.bounds
        self.net, nodes, count = question.bounds.net, len(proof.layer), len(proof.rule)
        _require(len(proof.place) == len(proof.value) == nodes, "nodes are incomplete")
        _require(len(proof.case) == len(proof.claims), "trees are incomplete")
        _require(len(proof.weights) == count, "refutations are incomplete")
        _require((proof.weights >= 0).all(), "a weight is negative")
        _require((proof.multipliers >= 0).all(), "a multiplier is negative")
        _require(proof.slopes.shape[1] == self.bounds.entries, "slopes have another length")
        self._require_slopes(proof.slopes)
        self.nodes, self.refutations = _Cursor(range(nodes)), _Cursor(range(count))
        self.slopes, self.multipliers = _Cursor(proof.slopes), _Cursor(proof.multipliers)
        self.stored, self.roots = self._stored(), {}
        self.leaves, self.margin = 0, float("inf")

    def _require_slopes(self, slopes: Array) -> None:
        least = self.bounds.least[: slopes.shape[-1]]
        _require(((slopes >= least) & (slopes <= 1)).all(), "a slope is out of its range")

    def _stored(self) -> dict[tuple[int, ...], Array]:
        """The slopes for hidden values, by case, kink, entry and side."""
        found, slopes = {}, _Cursor(self.proof.hidden_slopes)
        _require(self.proof.hidden.shape[1] == 4, "hidden values have another form")
        sizes, cases = [self.net.sizes[y] for y in self.net.kinks], len(self.question.boxes)
        for case, kink, entry, side in self.proof.hidden.tolist():
            known = 0 <= case < cases and 0 <= kink < len(sizes) and 0 <= entry < sizes[kink]
            _require(known and side in (0, 1), "there is no such hidden value")
            found[case, kink, entry, side] = slopes.take(self.bounds.parts[kink].start)
            self._require_slopes(found[case, kink, entry, side])
        _require(slopes.at == len(slopes.values), "there are more hidden slopes than bounds")
        return found

    def run(self) -> Report:
        """Demand that every and of every case is refuted in all leaves of a tree."""
        proof, claims = self.proof, self.question.claims
        unproved = {claim for case in claims for claim in case}
        for case, chosen in zip(proof.case.tolist(), proof.claims, strict=True):
            known = 0 <= case < len(claims) and not chosen[len(claims[case]) :].any()
            _require(known, "there is no such case or and")
            mine = [claim for claim, use in zip(claims[case], chosen, strict=False) if use]
            for _, leaves in itertools.groupby(self._leaves(case), lambda leaf: leaf.own):
                while some := list(itertools.islice(leaves, BATCH)):
                    self._refute(mine, some, self._known(case, some))
            unproved -= set(mine)
        _require(not unproved, f"there is no tree for {len(unproved)} of the unsafe outputs")
        for cursor in (self.nodes, self.refutations, self.slopes, self.multipliers):
            _require(cursor.at == len(cursor.values), "the proof holds more than its trees use")
        return Report(len(proof.case), len(proof.layer) - self.leaves, self.leaves, self.margin)

    # --- Trees

    def _leaves(self, case: int) -> Iterator[Leaf]:
        """The leaves of the next tree."""
        stack = [Leaf(*self.question.boxes[case])]
        while stack:
            (i,), node = self.nodes.take(1), stack.pop()
            layer, place = int(self.proof.layer[i]), int(self.proof.place[i])
            if layer == LEAF:
                self.leaves += 1
                yield node
            else:
                below, above = self._halves(node, layer, place, float(self.proof.value[i]))
                stack += [above, below]
            _require(len(stack) <= DEEPEST, "a tree is too deep")

    def _halves(self, node: Leaf, layer: int, place: int, value: float) -> tuple[Leaf, Leaf]:
        """What is below a split, and what is above it; both hold the split itself."""
        _require(layer == INPUT or 0 <= layer < len(self.net.kinks), "there is no such kink")
        size = self.net.sizes[0 if layer == INPUT else self.net.kinks[layer]]
        _require(0 <= place < size, "there is no such entry")
        if layer != INPUT:
            cuts = ((*node.cuts, (layer, place, value, above)) for above in (False, True))
            below, above = (dataclasses.replace(node, cuts=each) for each in cuts)
            return below, above
        inside = node.lower[0, place] <= value <= node.upper[0, place]
        _require(inside, "an input is split outside of its range")
        here = np.arange(size) == place
        lower, upper = (np.where(here, value, end) for end in (node.lower, node.upper))
        return Leaf(node.lower, upper, True, node.cuts), Leaf(lower, node.upper, True, node.cuts)

    # --- Leaves

    def _known(self, case: int, leaves: list[Leaf]) -> Domain:
        """Boxes of all values in leaves of a case."""
        if leaves[0].own:
            lower = np.concatenate([leaf.lower for leaf in leaves])
            known = self.bounds.domain(lower, np.concatenate([leaf.upper for leaf in leaves]))
        else:
            known = self._root(case).copy()
        operand = [self.net.operand(y) for y in self.net.kinks]
        for z in set(operand):
            for ends in (known.lower, known.upper):
                ends[z] = np.array(np.broadcast_to(ends[z], (len(leaves), ends[z].shape[1])))
        for i, leaf in enumerate(leaves):
            for kink, entry, value, above in leaf.cuts:
                low, high = known.lower[operand[kink]][i], known.upper[operand[kink]][i]
                inside = low[entry] <= value <= high[entry]
                _require(inside, "a hidden value is split outside of its range")
                (low if above else high)[entry] = value
        return known

    def _root(self, case: int) -> Domain:
        """Boxes of all values on the whole box of a case, with the stored slopes."""

        def slopes(kink: int, entries: Array, known: Domain) -> Array:
            found = np.full((2, len(entries), self.bounds.entries), np.nan)
            for side, (i, entry) in itertools.product((0, 1), enumerate(entries.tolist())):
                given = self.stored.get((case, kink, entry, side), ())
                found[side, i, : len(given)] = given
            return found.reshape(-1, self.bounds.entries)

        if case not in self.roots:
            self.roots[case] = self.bounds.domain(*self.question.boxes[case], slopes)
        return self.roots[case]

    def _refute(self, claims: list[int], leaves: list[Leaf], known: Domain) -> None:
        """Demand that a weighted sum of the rows of each and is positive in each leaf."""
        taken = [[self._refutation(leaf) for _ in claims] for leaf in leaves]
        for claim, column in zip(claims, zip(*taken, strict=True), strict=True):
            index, stored, multipliers = zip(*column, strict=True)
            weights, size = self.proof.weights[list(index)], self.net.sizes[claim]
            _require(not weights[:, size:].any(), "there are more weights than rows")
            rows = self.bounds.number(weights[:, None, :size])
            slopes = self._slopes(known, self.proof.rule[list(index)], np.stack(stored))
            pushes = self._pushes(leaves, multipliers)
            least, _ = self.bounds.below(claim, rows, known, slopes, pushes)
            _require((least > 0).all(), "a leaf's bound is not positive")
            self.margin = min(self.margin, float(least.min()))

    def _refutation(self, leaf: Leaf) -> tuple[int, Array, Array]:
        """The next refutation: its number, stored slopes and multipliers."""
        (i,) = self.refutations.take(1)
        rule = self.proof.rule[i]
        _require(rule in (ADAPTIVE, CHORD, STORED), "there is no such rule")
        slopes = self.slopes.take(1)[0] if rule == STORED else self.bounds.least
        return i, slopes, self.multipliers.take(len(leaf.cuts))

    def _slopes(self, known: Domain, rule: Array, stored: Array) -> Array:
        """Slopes (b, 1, all kinks) by rules (b,)."""
        choices = [adaptive(self.bounds, known), chords(self.bounds, known)]
        return np.stack([*choices, stored])[rule, np.arange(len(rule))][:, None]

    def _pushes(self, leaves: list[Leaf], multipliers: Sequence[Array]) -> dict[int, Any]:
        """What multipliers add up to, at the lower and at the upper ends of hidden values."""
        found = {}
        for i, (leaf, given) in enumerate(zip(leaves, multipliers, strict=True)):
            for (kink, entry, _, above), m in zip(leaf.cuts, given.tolist(), strict=True):
                z = self.net.operand(self.net.kinks[kink])
                ends = found.setdefault(z, np.zeros((2, len(leaves), self.net.sizes[z])))
                ends[0 if above else 1, i, entry] += m
        return found
