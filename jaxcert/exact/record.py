"""Finding proofs: `prove` searches for one, writes it down and has it checked.

The search works on the net as the checker sees it (`flat.py`), and closes a leaf when the checker's
own bound is positive there. For few inputs it splits inputs and needs nothing else. For many it
splits hidden values: slopes and multipliers come from gradient ascent on the bound of
`enclosures.py` written in JAX, in float32 and without rounding. Nothing of that is trusted.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxcert.errors import NotProved
from jaxcert.exact import proof
from jaxcert.exact.ascent import CHUNK, Ascent, Hints, Place, Rows
from jaxcert.exact.enclosures import Bounds, Domain, adaptive, chords
from jaxcert.exact.flat import Net
from jaxcert.exact.proof import ADAPTIVE, CHORD, INPUT, LEAF, STORED, File, Proof, Question, Report

Array: TypeAlias = Any

FEW_INPUTS = 16  # up to so many that vary, inputs are split
CLEAR = 1e-9  # bounds are to be above this, so that rounding on other machines changes nothing
SHARE = 1e-3  # of the largest slope, which an input counts for at least
ROOT_STEPS, LEAF_STEPS = 40, 12  # of ascent
STEPS = 64  # slopes are rounded to multiples of 1 / STEPS, which compresses better


@np.errstate(all="ignore")  # what is not finite proves nothing
def prove(
    network_file: File, property_file: File, proof_file: File, *, seconds: float = 300.0
) -> Report:
    """Find a proof that no input of a property's boxes leads to outputs that it calls unsafe, and
    write it to a file, which `proof.check` has accepted.

    Args:
      network_file: ONNX; of affine operators, Relu and LeakyRelu.
      property_file: VNN-LIB.
      proof_file: what is written; an older one is replaced.
      seconds: of search; checking takes about as long as bounding the leaves once more.

    Raises:
      NotProved: there are unsafe outputs, or time ran out; proofs are about all of a box, so also
        where it is constraints between inputs that exclude unsafe outputs.
      UnsupportedOperator, VnnlibError, ValueError: the net or the property cannot be read.
    """
    network, prop = proof.uncompressed(network_file), proof.uncompressed(property_file)
    question = Question.of(network, prop)
    clock = _Clock(time.perf_counter() + seconds)
    found = _Record(question)
    try:
        _search(question, clock, found)
    except NotProved as error:
        if not question.cut:
            raise
        raise NotProved(
            f"{error}; proofs are about whole boxes, without constraints between inputs: bound the "
            "inputs more tightly in the property, or rely on `verify`, which counts them"
        ) from error
    temporary = f"{os.fspath(proof_file)}.part"
    try:
        proof.save(found.proof(proof.header(network, prop)), temporary)
        report = proof.check(temporary, network_file, property_file)
        os.replace(temporary, proof_file)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return report


def _search(question: Question, clock: "_Clock", found: "_Record") -> None:
    for case, (lower, upper) in enumerate(question.boxes):
        if np.sum(upper > lower) <= FEW_INPUTS:
            found.add(case, question.claims[case], _by_inputs(question, case, clock))
        else:
            _by_hidden_values(question, case, clock, found)


@dataclasses.dataclass(frozen=True)
class _Clock:
    end: float

    def require(self, waiting: int) -> None:
        if time.perf_counter() > self.end:
            raise NotProved(f"time ran out with {waiting} sub-domains left")


def _require_safe(net: Net, claims: list[int], points: Array) -> None:
    """Raise where outputs are seen to be unsafe at one of some inputs (p, m)."""
    values: list[Array] = [points]
    for step in net.steps[1 : max(claims) + 1]:
        assert step is not None
        parts = [weight.apply(values[x]) for x, weight in step.parts]
        total = functools.reduce(np.add, parts) + (0 if step.offset is None else step.offset)
        values.append(total if step.left is None else np.maximum(step.left * total, total))
    for claim in claims:
        broken = np.flatnonzero((values[claim] <= 0).all(1))
        if len(broken):
            where = np.array2string(points[broken[0]], threshold=20)
            raise NotProved(f"there is no proof about all of the box: unsafe outputs at {where}")


# --- What was found -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Refutation:
    """As in `Proof`."""

    weights: Array
    rule: int
    slopes: Array | None = None
    multipliers: tuple[float, ...] = ()


@dataclasses.dataclass(eq=False)
class Node:
    """A node of a tree: a split with two children, or a leaf with refutations."""

    layer: int = LEAF
    place: int = 0
    value: float = 0.0
    children: tuple["Node", ...] = ()
    refutations: tuple[Refutation, ...] = ()

    def split(self, layer: int, place: int, value: float) -> tuple["Node", "Node"]:
        """Two new children."""
        below, above = Node(), Node()
        self.layer, self.place, self.value, self.children = layer, place, value, (below, above)
        return below, above

    def preorder(self) -> Iterator["Node"]:
        """The node, all below and all above its split."""
        stack: list[Node] = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children[::-1])


class _Record:
    """Trees, and the slopes of hidden values that they rely on."""

    def __init__(self, question: Question):
        self.question = question
        self.trees: list[tuple[int, list[int], Node]] = []
        self.hidden: list[tuple[int, int, int, int]] = []
        self.hidden_slopes: list[Array] = []

    def add(self, case: int, claims: list[int], root: Node) -> None:
        self.trees.append((case, claims, root))

    def proof(self, header: dict[str, Any]) -> Proof:
        """All of it in the form of a file."""
        claims, bounds = self.question.claims, self.question.bounds
        chosen = np.zeros((len(self.trees), max(map(len, claims))), bool)
        for t, (case, mine, _) in enumerate(self.trees):
            chosen[t, : len(claims[case])] = np.isin(claims[case], mine)
        nodes = [node for _, _, root in self.trees for node in root.preorder()]
        made = [each for node in nodes for each in node.refutations]
        weights = np.zeros((len(made), max(bounds.net.sizes[c] for case in claims for c in case)))
        for row, each in zip(weights, made, strict=True):
            row[: len(each.weights)] = each.weights
        stored = [each.slopes for each in made if each.slopes is not None]
        return Proof(
            header,
            case=np.array([case for case, _, _ in self.trees], np.int32),
            claims=chosen,
            layer=np.array([node.layer for node in nodes], np.int32),
            place=np.array([node.place for node in nodes], np.int32),
            value=np.array([node.value for node in nodes], np.float64),
            weights=weights,
            rule=np.array([each.rule for each in made], np.int8),
            slopes=np.array(stored, np.float64).reshape(-1, bounds.entries),
            multipliers=np.array([m for each in made for m in each.multipliers], np.float64),
            hidden=np.array(self.hidden, np.int32).reshape(-1, 4),
            hidden_slopes=np.concatenate([np.zeros(0), *self.hidden_slopes]),
        )


# --- Splitting inputs -----------------------------------------------------------------------------
#
# Each row of an and is tried with both rules for slopes. Where none is positive the box is halved
# along the input that moves the most promising row the most, by its coefficients with the slopes
# of the chords: they are those of the middle of the net's bounds.


def _by_inputs(question: Question, case: int, clock: _Clock) -> Node:
    """A tree whose leaves refute all ands of a case."""
    net, claims = question.bounds.net, question.claims[case]
    lower, upper = question.boxes[case]
    root = Node()
    stack = [(root, lower[0], upper[0])]
    while stack:
        clock.require(len(stack))
        some, stack = stack[-64:], stack[:-64]
        nodes, lows, highs = zip(*some, strict=True)
        low, high = np.stack(lows), np.stack(highs)
        known = question.bounds.domain(low, high)
        tried = [_tried(question.bounds, known, claim) for claim in claims]
        least = np.stack([each.least for each in tried])
        worst = np.argmin(least, 0)
        slopes = np.stack([each.slope for each in tried])[worst, np.arange(len(some))]
        _require_safe(net, claims, np.where(slopes > 0, low, high))
        for i, node in enumerate(nodes):
            if (least[:, i] > CLEAR).all():
                node.refutations = tuple(each.refutations[i] for each in tried)
                continue
            slope = abs(slopes[i]) + SHARE * abs(slopes[i]).max() + 2.0**-100
            j = int(np.argmax(slope * (high[i] - low[i])))
            middle = low[i, j] / 2 + high[i, j] / 2
            if not low[i, j] < middle < high[i, j]:
                raise NotProved("some inputs are too close to breaking the property")
            below, above = node.split(INPUT, j, float(middle))
            end, start = high[i].copy(), low[i].copy()
            end[j] = start[j] = middle
            stack += [(above, start, high[i]), (below, low[i], end)]
    return root


@dataclasses.dataclass(frozen=True, eq=False)
class _Tried:
    """The best bound of one and in each of b boxes, and the slope of its row, (b, inputs)."""

    least: Array
    refutations: list[Refutation]
    slope: Array


def _tried(bounds: Bounds, known: Domain, claim: int) -> _Tried:
    n, b = bounds.net.sizes[claim], len(known.lower[0])
    rows = np.broadcast_to(np.tile(np.eye(n), (2, 1)), (b, 2 * n, n))
    slopes = [np.repeat(f(bounds, known)[:, None], n, 1) for f in (adaptive, chords)]
    least, matrix = bounds.below(claim, rows, known, np.concatenate(slopes, 1))
    best = np.argmax(least, 1)
    made = [Refutation(np.eye(n)[k % n], CHORD if k >= n else ADAPTIVE) for k in best.tolist()]
    places = np.arange(b)
    return _Tried(least[places, best], made, matrix[places, n + best % n])


# --- Splitting hidden values ----------------------------------------------------------------------


def _by_hidden_values(question: Question, case: int, clock: _Clock, found: _Record) -> None:
    """Trees for the ands of a case: one leaf for those that need no split, and a tree for each of
    the others."""
    search = _Hidden(question, case, clock, found)
    roots = {claim: search.root(claim) for claim in question.claims[case]}
    easy = [claim for claim, root in roots.items() if root.node.refutations]
    if easy:
        made = [refutation for claim in easy for refutation in roots[claim].node.refutations]
        found.add(case, easy, Node(refutations=tuple(made)))
    for claim, root in roots.items():
        if claim not in easy:
            search.close(claim, root)
            found.add(case, [claim], root.node)


class _Hidden:
    """The search for one case."""

    def __init__(self, question: Question, case: int, clock: _Clock, found: _Record):
        self.bounds, self.case, self.clock, self.found = question.bounds, case, clock, found
        self.net, self.ascent = question.bounds.net, Ascent(question.bounds)
        self.lower, self.upper = question.boxes[case]
        self.known = question.bounds.domain(self.lower, self.upper, self._hidden_slopes)

    def _place(self, known: Domain) -> Place:
        """What is known of the operands of kinks; of those that are yet to come, nothing."""
        ends = []
        for side in (known.lower, known.upper):
            zs = [self.net.operand(y) for y in self.net.kinks]
            parts = [side[z][0] if z < len(side) else np.zeros(self.net.sizes[z]) for z in zs]
            ends.append(np.concatenate(parts).astype(np.float32))
        return Place(np.concatenate([self.lower, self.upper]).astype(np.float32), *ends)

    def _start(self, where: Place, b: int, r: int) -> Hints:
        """Adaptive slopes, no multipliers, equal weights."""
        slopes = np.where(where.upper > -where.lower, 1, self.bounds.least).astype(np.float32)
        weights = np.full((b, r), 1 / r, np.float32)
        return Hints(np.tile(slopes, (b, 1)), np.zeros((b, len(slopes)), np.float32), weights)

    def _rows(self, claim: int, b: int) -> Rows:
        """The rows of an and, as functions of the net's output."""
        step = self.net.steps[claim]
        assert step is not None
        matrix, offset = np.float32(step.parts[0][1].matrix), np.float32(step.offset)
        return Rows(np.tile(matrix, (b, 1, 1)), np.tile(offset, (b, 1)))

    def _rounded(self, slopes: Array) -> Array:
        least = self.bounds.least[: slopes.shape[1]]
        return np.clip(np.round(slopes.astype(np.float64) * STEPS) / STEPS, least, 1)

    def _hidden_slopes(self, kink: int, entries: Array, known: Domain) -> Array:
        """Slopes for bounds of hidden values: for those that adaptive ones leave undecided."""
        z, m = self.net.operand(self.net.kinks[kink]), len(entries)
        rows = Rows(
            np.zeros((2 * m, 1, self.net.sizes[z]), np.float32), np.zeros((2 * m, 1), np.float32)
        )
        rows.matrix[range(m), 0, entries], rows.matrix[range(m, 2 * m), 0, entries] = 1, -1
        where, sign = self._place(known), np.zeros((2 * m, self.bounds.entries), np.int8)
        hints = self._start(where, 2 * m, 1)
        _, least, _ = self.ascent.improved(z, rows, where, sign, hints, 0)
        hard = np.tile((least.reshape(2, m) < 0).all(0), 2)
        slopes = np.full((2 * m, self.bounds.entries), np.nan)
        if not hard.any():
            return slopes
        rows, sign, hints = jax.tree.map(lambda a: a[hard], (rows, sign, hints))
        better, _, _ = self.ascent.improved(z, rows, where, sign, hints, ROOT_STEPS)
        before = self.bounds.parts[kink].start
        slopes[hard, :before] = self._rounded(better.slopes[:, :before])
        for i in np.flatnonzero(hard).tolist():
            self.found.hidden.append((self.case, kink, int(entries[i % m]), i // m))
            self.found.hidden_slopes.append(slopes[i, :before])
        return slopes

    def root(self, claim: int) -> "_Part":
        """The whole case, refuted if it can be without a split."""
        where, sign = self._place(self.known), np.zeros((1, self.bounds.entries), np.int8)
        hints = self._start(where, 1, self.net.sizes[claim])
        given = self._rows(claim, 1), where, sign, hints
        hints, _, slopes = self.ascent.improved(self.net.result, *given, ROOT_STEPS)
        self._try(claim, slopes)
        part = _Part(Node(), (), sign[0], jax.tree.map(lambda a: a[0], hints))
        self._settle(claim, [part])
        return part

    def close(self, claim: int, root: "_Part") -> None:
        """Split until every leaf is refuted."""
        where, stack = self._place(self.known), [root]
        while stack:
            self.clock.require(len(stack))
            some, stack = stack[-CHUNK:], stack[:-CHUNK]
            signs = np.stack([part.sign for part in some])
            hints = jax.tree.map(lambda *parts: np.stack(parts), *(part.hints for part in some))
            given = self._rows(claim, len(some)), where, signs, hints
            found = self.ascent.expanded(self.net.result, *given, LEAF_STEPS)
            places, signs, (hints, _, slopes) = found
            self._try(claim, slopes.reshape(-1, slopes.shape[2]))
            children = []
            for i, (part, place) in enumerate(zip(some, places.tolist(), strict=True)):
                if place < 0:
                    raise NotProved("a sub-domain is undecided, and nothing is left to split in it")
                kink = next(k for k, p in enumerate(self.bounds.parts) if place < p.stop)
                entry = place - self.bounds.parts[kink].start
                for above, node in enumerate(part.node.split(kink, entry, 0.0)):
                    cuts = (*part.cuts, place)
                    mine = jax.tree.map(lambda a: a[above, i], hints)  # noqa: B023
                    children.append(_Part(node, cuts, signs[above, i], mine))
            stack += self._settle(claim, children)

    def _try(self, claim: int, slopes: Array) -> None:
        """Look for counterexamples where bounds with these slopes are attained."""
        _require_safe(self.net, [claim], np.where(slopes > 0, self.lower, self.upper))

    def _settle(self, claim: int, parts: list["_Part"]) -> list["_Part"]:
        """Enter refutations where the checker's bound is positive; the other sub-domains."""
        signs = np.stack([part.sign for part in parts])
        slopes = self._rounded(np.stack([part.hints.slopes for part in parts]))
        given = np.stack([part.hints.multipliers for part in parts]).astype(np.float64)
        known, pushes = self.known.copy(), {}
        for y, part in zip(self.net.kinks, self.bounds.parts, strict=True):
            z, sign = self.net.operand(y), signs[:, part]
            known.lower[z] = np.where(sign > 0, 0, known.lower[z])
            known.upper[z] = np.where(sign < 0, 0, known.upper[z])
            ends = np.stack([np.where(sign * side > 0, given[:, part], 0) for side in (1, -1)])
            pushes[z] = pushes.get(z, 0) + ends
        weights = np.stack([part.hints.weights for part in parts]).astype(np.float64)
        least, _ = self.bounds.below(claim, weights[:, None], known, slopes[:, None], pushes)
        for i in np.flatnonzero(least[:, 0] > CLEAR):
            multipliers = tuple(given[i, list(parts[i].cuts)].tolist())
            made = Refutation(weights[i], STORED, slopes[i], multipliers)
            parts[i].node.refutations = (made,)
        return [part for part in parts if not part.node.refutations]


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """A sub-domain: its leaf, the entries (among those of all kinks) that were split above it, and
    one row of each of the arrays that `Ascent` has."""

    node: Node
    cuts: tuple[int, ...]
    sign: Array
    hints: Hints
