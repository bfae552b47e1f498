"""Rows are independent, and that is checked: following the batch axis through a graph.

A certificate is about one example. A model that mixes examples (batch normalisation in training
mode is the usual culprit) has no bound per example, so each equation must carry the batch axis from
its bounded operands to its outputs; one that reduces, contracts, slices or shuffles it is an error.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp

from jaxcert.blocks import REFERENCES
from jaxcert.errors import DataDependent, MixedRows
from jaxcert.graph import Atom, Equation, Graph, Var, unsupported


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the examples lie: along `axis`, as the middle factor of outer x batch x inner.

    outer = 1 and inner = 1 is a plain batch axis; other factors appear while a model has its batch
    axis merged with another one (tokens, heads, windows).
    """

    axis: int
    outer: int = 1


Follow: TypeAlias = Callable[[Equation, Sequence[Rows | None], int], Rows | Sequence[Rows]]
"""(equation, rows of each operand or None, batch size) -> rows of the output(s)."""

FOLLOW: dict[str, Follow] = {}


def check(graph: Graph, batch: int) -> dict[Var, Rows]:
    """The place of the batch axis in every bounded value; `MixedRows` where there is none.

    The graph has one bounded input and one output, both with the batch axis first.
    """
    rows = {graph.inputs[0]: Rows(0)}
    _walk(graph, rows, batch)
    out = graph.outputs[0]
    if (
        isinstance(out, Var)
        and out.bounded
        and (rows[out] != Rows(0) or not out.shape or out.shape[0] != batch)
    ):
        raise MixedRows(
            f"the model's output has shape {out.shape} with the examples not along axis 0; "
            "return logits (b, k)"
        )
    return rows


def _walk(graph: Graph, rows: dict[Var, Rows], batch: int) -> None:
    """Enter the place of every bounded value, from those of the graph's inputs."""
    for eqn in graph.equations:
        if not eqn.bounded:
            continue
        places = [rows.get(a) if isinstance(a, Var) else None for a in eqn.inputs]
        if eqn.name in REFERENCES and eqn.inner is not None:
            inside = {v: p for v, p in zip(eqn.inner.inputs, places, strict=True) if p is not None}
            _walk(eqn.inner, inside, batch)
            rows[eqn.outputs[0]] = inside[eqn.inner.outputs[0]]  # type: ignore
            continue
        if eqn.name not in FOLLOW:
            raise unsupported(
                eqn, "jaxcert", f"register one: jaxcert.bounds.register('{eqn.name}', rule)"
            )
        followed = FOLLOW[eqn.name](eqn, places, batch)
        if any(_is_integer(out) for out in eqn.outputs):
            raise DataDependent(
                f"'{eqn.name}' makes integers that depend on the input ({eqn.where()}), which "
                "cannot be bounded; use floating point numbers, e.g. jnp.where(x > 0, 1.0, 2.0)"
            )
        each = [followed] * len(eqn.outputs) if isinstance(followed, Rows) else followed
        rows.update(zip(eqn.outputs, each, strict=True))


def _is_integer(out: Var) -> bool:
    return jnp.issubdtype(out.dtype, jnp.integer)


def mixed(eqn: Equation, what: str) -> MixedRows:
    """The error for an equation that lets examples influence each other."""
    return MixedRows(
        f"'{eqn.name}' {what} the batch axis ({eqn.where()}), so an example's output depends on "
        "the other examples and has no bound of its own. Batch normalisation in training mode is "
        "the usual cause: build it with use_running_average=True (NNX: model.eval()). A loop over "
        "the examples is jax.vmap of the model of one example"
    )


def _bounded(places: Sequence[Rows | None]) -> Rows:
    return next(place for place in places if place is not None)


def _shape(atom: Atom) -> tuple[int, ...]:
    return tuple(atom.shape)


# --- One function per way of moving axes; each returns where the batch axis went ----------------


def same_axes(eqn: Equation, places: Sequence[Rows | None], batch: int) -> Rows:
    """Elementwise on operands of one shape (or scalars)."""
    present = {place for place in places if place is not None}
    if len(present) != 1:
        raise mixed(eqn, "combines operands with different places of")
    return present.pop()


def _first_operand(eqn, places, batch):
    """Only the first operand may be bounded: the others are indices or sizes."""
    if any(place is not None for place in places[1:]) or places[0] is None:
        raise DataDependent(
            f"'{eqn.name}' takes indices, sizes or a kernel that depend on the bounded input "
            f"({eqn.where()}); only constant ones can be bounded"
        )
    return places[0]


def _along_other_axes(axes_of: Callable[[dict[str, Any]], Sequence[int]]) -> Follow:
    """Works along some axes and keeps all of them, e.g. cumsum, sort, reverse."""

    def follow(eqn, places, batch):
        place = same_axes(eqn, places, batch)
        if place.axis in axes_of(eqn.params):
            raise mixed(eqn, "works along")
        return place

    return follow


def _removes(axes_of: Callable[[dict[str, Any]], Sequence[int]]) -> Follow:
    """Removes axes, e.g. a reduction or squeeze."""

    def follow(eqn, places, batch):
        place, axes = same_axes(eqn, places, batch), axes_of(eqn.params)
        if place.axis in axes:
            raise mixed(eqn, "reduces")
        return dataclasses.replace(place, axis=place.axis - sum(a < place.axis for a in axes))

    return follow


def _broadcast(eqn, places, batch):
    place = _first_operand(eqn, places, batch)
    axis = int(eqn.params["broadcast_dimensions"][place.axis])
    if eqn.params["shape"][axis] != _shape(eqn.inputs[0])[place.axis]:
        raise mixed(eqn, "repeats")
    return dataclasses.replace(place, axis=axis)


def _transpose(eqn, places, batch):
    place = _bounded(places)
    axis = eqn.params["permutation"].index(place.axis)
    return dataclasses.replace(place, axis=axis)


def _reshape(eqn, places, batch):
    """In row-major order the examples are the middle factor of (before, batch, after); they stay
    together if some output axis contains that factor whole."""
    place = _first_operand(eqn, places, batch)
    before = math.prod(_shape(eqn.inputs[0])[: place.axis]) * place.outer
    prefix = 1
    for axis, size in enumerate(eqn.outputs[0].shape):
        fits = size > 0 and before % prefix == 0 and (prefix * size) % (before * batch) == 0
        if fits:
            return Rows(axis, before // prefix)
        prefix *= size
    raise mixed(eqn, "breaks up")


def _keeps_whole(eqn, place, size, batch):
    if size != _shape(eqn.inputs[0])[place.axis]:
        raise mixed(eqn, "takes a part of")
    return place


def _tile(eqn, places, batch):
    place = same_axes(eqn, places, batch)
    if eqn.params["reps"][place.axis] != 1:
        raise mixed(eqn, "repeats")
    return place


def _slice(eqn, places, batch):
    place = _bounded(places)
    start, stop = eqn.params["start_indices"][place.axis], eqn.params["limit_indices"][place.axis]
    strides = eqn.params["strides"]
    step = 1 if strides is None else strides[place.axis]
    return _keeps_whole(eqn, place, (stop - start) if step == 1 else -1, batch)


def _dynamic_slice(eqn, places, batch):
    place = _first_operand(eqn, places, batch)
    return _keeps_whole(eqn, place, eqn.params["slice_sizes"][place.axis], batch)


def _pad(eqn, places, batch):
    place = _first_operand(eqn, places, batch)
    if tuple(eqn.params["padding_config"][place.axis]) != (0, 0, 0):
        raise mixed(eqn, "pads")
    return place


def _concatenate(eqn, places, batch):
    place = same_axes(eqn, places, batch)
    if eqn.params["dimension"] == place.axis:
        raise mixed(eqn, "concatenates along")
    return place


def _stack(eqn, places, batch):
    place = same_axes(eqn, places, batch)
    return dataclasses.replace(place, axis=place.axis + (eqn.params["axis"] <= place.axis))


def _gather(eqn, places, batch):
    place = _first_operand(eqn, places, batch)
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    out_rank, index_rank = len(eqn.outputs[0].shape), len(_shape(eqn.inputs[1]))
    if place.axis in dims.operand_batching_dims:
        paired = dims.start_indices_batching_dims[dims.operand_batching_dims.index(place.axis)]
        # The output's batch dimensions are the indices' dimensions but the last, in order.
        free = [axis for axis in range(out_rank) if axis not in dims.offset_dims]
        assert len(free) == index_rank - 1
        return dataclasses.replace(place, axis=free[paired])
    if place.axis in dims.collapsed_slice_dims:
        raise mixed(eqn, "picks entries of")
    _keeps_whole(eqn, place, sizes[place.axis], batch)
    gone = {*dims.collapsed_slice_dims, *dims.operand_batching_dims}
    offsets = [axis for axis in range(len(sizes)) if axis not in gone]
    return dataclasses.replace(place, axis=dims.offset_dims[offsets.index(place.axis)])


def _dot_general(eqn, places, batch):
    (contract, pairs) = eqn.params["dimension_numbers"]
    found = []
    for side, place in enumerate(places):
        if place is None:
            continue
        if place.axis in contract[side]:
            raise mixed(eqn, "contracts")
        paired = place.axis in pairs[side]
        if all(p is not None for p in places) and not paired:
            raise mixed(eqn, "multiplies every example with every other along")
        found.append(dataclasses.replace(place, axis=_dot_axis(eqn, side, place.axis)))
    if len(set(found)) != 1:
        raise mixed(eqn, "pairs different examples along")
    return found[0]


def _dot_axis(eqn, side, axis):
    """The output axis of an operand's axis: batch axes first, then lhs free, then rhs free."""
    contract, pairs = eqn.params["dimension_numbers"]
    if axis in pairs[side]:
        return list(pairs[side]).index(axis)
    free = [
        [a for a in range(len(_shape(atom))) if a not in contract[s] and a not in pairs[s]]
        for s, atom in enumerate(eqn.inputs)
    ]
    return len(pairs[0]) + (len(free[0]) if side else 0) + free[side].index(axis)


def _conv(eqn, places, batch):
    place = _first_operand(eqn, places, batch)
    dims = eqn.params["dimension_numbers"]
    if place.axis != dims.lhs_spec[0] or eqn.params["batch_group_count"] != 1:
        raise mixed(eqn, "convolves over")
    return dataclasses.replace(place, axis=dims.out_spec[0])


def _window(eqn, places, batch):
    place, params = same_axes(eqn, places, batch), eqn.params
    trivial = (
        params["window_dimensions"][place.axis] == 1
        and params["window_strides"][place.axis] == 1
        and tuple(params["padding"][place.axis]) == (0, 0)
        and params["base_dilation"][place.axis] == 1
    )
    if not trivial:
        raise mixed(eqn, "pools over")
    return place


_ELEMENTWISE = """
    add sub mul div max min neg abs sign square sqrt rsqrt cbrt exp exp2 expm1 log log1p tanh
    logistic erf erfc erf_inv sin cos sinh cosh asinh atan integer_pow pow clamp select_n floor ceil
    round is_finite relu leaky_relu elu softplus silu gelu_tanh gelu_erf mish hard_swish soft_sign
    lt le gt ge eq ne not and or convert_element_type reduce_precision stop_gradient
    copy
"""
FOLLOW.update(dict.fromkeys(_ELEMENTWISE.split(), same_axes))
FOLLOW.update(
    dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"),
        _removes(lambda params: params["axes"]),
    )
)
FOLLOW.update(
    dict.fromkeys(
        ("cumsum", "cummax", "cummin", "cumlogsumexp", "cumprod"),
        _along_other_axes(lambda params: (params["axis"],)),
    )
)
FOLLOW.update(
    dict.fromkeys(
        ("reduce_window_sum", "reduce_window_max", "reduce_window_min"),
        _window,
    )
)
FOLLOW.update(
    softmax=_along_other_axes(lambda params: params["axes"]),
    log_softmax=_along_other_axes(lambda params: params["axes"]),
    variance=_removes(lambda params: params["axes"]),
    squeeze=_removes(lambda params: params["dimensions"]),
    unstack=_removes(lambda params: (params["axis"],)),
    sort=_along_other_axes(lambda params: (params["dimension"],)),
    rev=_along_other_axes(lambda params: params["dimensions"]),
    split=_along_other_axes(lambda params: (params["axis"],)),
    broadcast_in_dim=_broadcast,
    transpose=_transpose,
    reshape=_reshape,
    tile=_tile,
    slice=_slice,
    dynamic_slice=_dynamic_slice,
    pad=_pad,
    concatenate=_concatenate,
    stack=_stack,
    gather=_gather,
    dot_general=_dot_general,
    conv_general_dilated=_conv,
)
