"""Receptive fields: which part of each variable one entry of a feature map depends on.

Entry p of a map depends, at every ancestor, on the window [p stride + start, p stride + start +
size) along each spatial axis: integers known when tracing. `geometry` computes them for all
ancestors of a map; where a window grows to the whole map, or meets an equation that cannot be
windowed, it becomes the whole map. Examples are treated alike: the batch is one more axis of
positions, whose window has size 1.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from jaxcert.bounds.backward import RESHAPES, Net, ancestors
from jaxcert.bounds.planes import Planes
from jaxcert.bounds.relaxations import LINES
from jaxcert.graph import Equation, Var


@dataclasses.dataclass(frozen=True)
class Span:
    """At position p of the grid, the entries p stride + start + [0, size) along one axis.

    Attributes:
      axis: which axis of the grid p counts along; None where the span stands still.
    """

    start: int
    size: int
    stride: int = 0
    axis: int | None = None


Window: TypeAlias = tuple[Span, ...]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The windows of all ancestors of a map.

    Attributes:
      grid: how many positions there are along each axis of the grid.
      axes: the axes of the map itself that the grid's axes are.
      windows: of each ancestor, the union of what its readers need.
      edges: of each ancestor and operand, what this reader needs.
    """

    grid: tuple[int, ...]
    axes: tuple[int, ...]
    windows: Mapping[Var, Window]
    edges: Mapping[tuple[Var, int], Window]

    def overhangs(self, v: Var) -> bool:
        """Whether v's window reaches over the edge of v anywhere on the grid."""
        return any(
            s.axis is not None
            and (s.start < 0 or (self.grid[s.axis] - 1) * s.stride + s.start + s.size > m)
            for s, m in zip(self.windows[v], v.shape, strict=True)
        )


def sizes(window: Window) -> tuple[int, ...]:
    """The shape of a window."""
    return tuple(s.size for s in window)


def geometry(net: Net, planes: Mapping[Var, Planes], start: Var) -> Geometry | None:
    """The windows behind each entry of `start`, or None where they are no use."""
    spatial = [axis for axis in _spatial_axes(net, start) if start.shape[axis] > 1]
    if not spatial:
        return None
    frame = _Frame(net, len(spatial))
    batch_axis = frame.batch_axis(start)
    if batch_axis is None and net.batch > 1:
        return None
    axes = (*spatial, *([] if batch_axis is None else [batch_axis]))
    window = tuple(
        Span(0, 1, 1, axes.index(i)) if i in axes else Span(0, m) for i, m in enumerate(start.shape)
    )
    windows, edges = {start: window}, {}
    for v in ancestors(net, planes, start):
        if v is not start:
            windows[v] = _unless_too_large(frame, v, windows[v])
        needed = _operand_windows(frame, v, planes[v], windows[v])
        if needed is None and v is start:
            return None
        if needed is None:
            whole = frame.whole(v)
            needed = None if whole is None else _operand_windows(frame, v, planes[v], whole)
            if whole is None or needed is None:
                return None
            windows[v] = whole
        for i, (x, part) in enumerate(zip(planes[v].operands, needed, strict=True)):
            edges[v, i] = part
            both = _union(windows[x], part) if x in windows else part
            both = both or frame.whole(x)
            if both is None:
                return None
            windows[x] = both
    if net.input in windows:
        windows[net.input] = _unless_too_large(frame, net.input, windows[net.input])
    grid = tuple(start.shape[axis] for axis in axes)
    return Geometry(grid, axes, windows, edges)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Where examples lie, and what a whole map is."""

    net: Net
    batch: int  # the grid's axis that counts examples

    def batch_axis(self, v: Var) -> int | None:
        """v's axis of examples; None for a batch of one, or where they are merged."""
        if self.net.batch == 1 or self.net.thin_shape(v) is None:
            return None
        return self.net.rows[v].axis

    def whole(self, v: Var) -> Window | None:
        """All of v for one example."""
        if self.net.thin_shape(v) is None:
            return None
        own = self.batch_axis(v)
        return tuple(
            Span(0, 1, 1, self.batch) if i == own else Span(0, m) for i, m in enumerate(v.shape)
        )

    def moves(self, window: Window) -> bool:
        """Whether a window moves with the position, and not only with the example."""
        return any(s.axis is not None and s.axis != self.batch for s in window)


def _unless_too_large(frame: _Frame, v: Var, window: Window) -> Window:
    one = math.prod(v.shape) // frame.net.batch
    whole = frame.whole(v)
    return whole if whole is not None and math.prod(sizes(window)) >= one else window


def _union(a: Window, b: Window) -> Window | None:
    if any((x.stride, x.axis) != (y.stride, y.axis) for x, y in zip(a, b, strict=True)):
        return None
    pairs = list(zip(a, b, strict=True))
    starts = [min(x.start, y.start) for x, y in pairs]
    ends = [max(x.start + x.size, y.start + y.size) for x, y in pairs]
    return tuple(
        Span(low, high - low, x.stride, x.axis)
        for low, high, x in zip(starts, ends, a, strict=True)
    )


# --- Windows through one equation -----------------------------------------------------------------

_ELEMENTWISE = frozenset(LINES) | frozenset(
    "add sub neg mul div convert_element_type reduce_precision stop_gradient copy".split()
)
_ALONG = {  # equations that mix whole axes, and which
    "reduce_max": lambda p: p["axes"],
    "reduce_sum": lambda p: p["axes"],
    "concatenate": lambda p: (p["dimension"],),
}


def _operand_windows(frame: _Frame, v: Var, plane: Planes, window: Window) -> list[Window] | None:
    """What each operand must show for v to show `window`; None without a rule."""
    eqn, operands = frame.net.makers[v], plane.operands
    if not operands:
        return []
    if not (plane.affine or plane.elementwise):  # a product of two: its weights are of no shape
        return None
    name, p, shapes = eqn.name, eqn.params, [x.shape for x in operands]
    if name in _ELEMENTWISE and all(shape == v.shape for shape in shapes):
        return [window] * len(operands)
    if name == "transpose":
        place = list(p["permutation"])
        return [tuple(window[place.index(i)] for i in range(len(place)))]
    if name in RESHAPES:
        return _through_reshape(frame, v, operands[0], window)
    if name in _ALONG:
        return _along(eqn, operands, window)
    slid = _slid(eqn, operands, window)
    if slid is not None:
        return slid
    still = not frame.moves(window)
    if name == "dot_general" and still and len(operands) == 1 and not p["dimension_numbers"][1][0]:
        whole = frame.whole(operands[0])
        return None if whole is None else [whole]
    return None


def _through_reshape(frame: _Frame, v: Var, x: Var, window: Window) -> list[Window] | None:
    """Axes of size 1 come and go; everything else needs the whole map."""
    kept = [s for s, m in zip(window, v.shape, strict=True) if m != 1]
    if [m for m in x.shape if m != 1] == [m for m in v.shape if m != 1]:
        spans = iter(kept)
        return [tuple(Span(0, 1) if m == 1 else next(spans) for m in x.shape)]
    whole = None if frame.moves(window) else frame.whole(x)
    return None if whole is None else [whole]


def _along(eqn: Equation, operands: Sequence[Var], window: Window) -> list[Window] | None:
    axes = tuple(_ALONG[eqn.name](eqn.params))
    if eqn.name == "concatenate":
        if window[axes[0]].axis is not None or len(operands) != len(eqn.inputs):
            return None
        return [
            tuple(Span(0, x.shape[i]) if i in axes else s for i, s in enumerate(window))
            for x in operands
        ]
    spans = iter(window)
    (x,) = operands
    return [tuple(Span(0, m) if i in axes else next(spans) for i, m in enumerate(x.shape))]


def _slid(eqn: Equation, operands: Sequence[Var], window: Window) -> list[Window] | None:
    """Equations whose result at p reads a neighbourhood of p."""
    name, p, (x, *others) = eqn.name, eqn.params, operands
    if others or eqn.inputs[0] is not x:
        return None
    if name == "conv_general_dilated":
        return _through_convolution(eqn, x, window)
    if name == "reduce_window_sum":
        taps, dilation = p["window_dimensions"], p["window_dilation"]
        strides, padding = p["window_strides"], p["padding"]
        if any(d != 1 for d in p["base_dilation"]):
            return None
        reads = [_Reads(*each) for each in zip(taps, strides, (a for a, _ in padding), dilation,
                                               strict=True)]  # fmt: skip
    elif name == "pad" and all(inner == 0 for _, _, inner in p["padding_config"]):
        reads = [_Reads(1, 1, low, 1) for low, _, _ in p["padding_config"]]
    elif name == "slice":
        strides = p["strides"] or (1,) * len(window)
        starts = p["start_indices"]
        reads = [_Reads(1, s, -i, 1) for i, s in zip(starts, strides, strict=True)]
    else:
        return None
    spans = [_grown(s, m, r) for s, m, r in zip(window, x.shape, reads, strict=True)]
    return None if any(s is None for s in spans) else [tuple(spans)]  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class _Reads:
    """Entry i of a result reads entries i stride - before + dilation [0, taps) of the operand."""

    taps: int
    stride: int
    before: int
    dilation: int


def _through_convolution(eqn: Equation, x: Var, window: Window) -> list[Window] | None:
    p, spec, kernel = eqn.params, eqn.params["dimension_numbers"], eqn.inputs[1].shape
    if p["batch_group_count"] != 1:
        return None
    spans: list[Span | None] = [None] * len(window)
    spans[spec.lhs_spec[0]] = window[spec.out_spec[0]]
    spans[spec.lhs_spec[1]] = Span(0, x.shape[spec.lhs_spec[1]])
    for k, (i, o) in enumerate(zip(spec.lhs_spec[2:], spec.out_spec[2:], strict=True)):
        if window[o].axis is None:
            spans[i] = Span(0, x.shape[i]) if window[o].size == eqn.outputs[0].shape[o] else None
        elif p["lhs_dilation"][k] == 1:
            reads = _Reads(
                kernel[spec.rhs_spec[2 + k]], p["window_strides"][k], p["padding"][k][0],
                p["rhs_dilation"][k],
            )  # fmt: skip
            spans[i] = _grown(window[o], x.shape[i], reads)
    # Along a still axis the real padding applies, along a moving one none: all or nothing.
    still = {window[o].axis is None for o in spec.out_spec[2:]}
    if any(s is None for s in spans) or len(still) != 1:
        return None
    return [tuple(spans)]  # type: ignore[arg-type]


def _grown(span: Span, m: int, reads: _Reads) -> Span | None:
    if span.axis is None or (span.stride == span.size == 1 and reads == _Reads(1, 1, 0, 1)):
        still = reads == _Reads(1, 1, 0, 1) and (span.axis is not None or span.size == m)
        return span if still else None
    return Span(
        span.start * reads.stride - reads.before,
        (span.size - 1) * reads.stride + (reads.taps - 1) * reads.dilation + 1,
        span.stride * reads.stride,
        span.axis,
    )


def _spatial_axes(net: Net, v: Var) -> tuple[int, ...]:
    """The spatial axes of a map that comes from a convolution or pool, if by elementwise steps."""
    while v in net.makers:
        eqn = net.makers[v]
        if eqn.name == "conv_general_dilated":
            return tuple(eqn.params["dimension_numbers"].out_spec[2:])
        if eqn.name == "reduce_window_sum":
            return tuple(i for i, k in enumerate(eqn.params["window_dimensions"]) if k > 1)
        same = [a for a in eqn.inputs if isinstance(a, Var) and a.bounded and a.shape == v.shape]
        if eqn.name not in _ELEMENTWISE or not same:
            return ()
        v = same[-1]
    return ()
