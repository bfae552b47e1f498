"""ONNX operators that move entries, and those that compute shapes. See `operators.py`."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcert.io.operators import along, implements, integers, namespace

# --- Axes -----------------------------------------------------------------------------------------


# The leading 1 of a single example's shape is the batch, whatever size the file writes there.
@implements("Reshape", moves=True)
def _reshape(x, /, shape, *, allowzero=0, facts):
    (one,), target = facts.shapes, list(integers(shape))
    if not allowzero:
        target = [one[i] if size == 0 else size for i, size in enumerate(target)]
    if -1 in target:
        rest = math.prod(size for size in target if size != -1)
        target[target.index(-1)] = math.prod(one) // max(rest, 1)
    if one[:1] == (1,) and target[:1] == [1]:
        target[0] = x.shape[0]
    return x.reshape(target)


@implements("Flatten", moves=True)
def _flatten(x, /, *, axis=1):
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@implements("Squeeze", moves=True)
def _squeeze(x, /, axes=None):
    ones = [i for i, size in enumerate(x.shape) if size == 1]
    return x.squeeze(along(x, ones if axes is None else integers(axes)))


@implements("Unsqueeze", moves=True)
def _unsqueeze(x, /, axes):
    return namespace(x).expand_dims(x, integers(axes))


@implements("Transpose", moves=True)
def _transpose(x, /, *, perm=None):
    return x.transpose(perm or tuple(reversed(range(x.ndim))))


@implements("DepthToSpace", moves=True)
def _depth_to_space(x, /, *, blocksize, mode="DCR"):
    b, c, h, w = x.shape
    s = blocksize
    if mode == "DCR":
        blocks = x.reshape(b, s, s, c // s**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        blocks = x.reshape(b, c // s**2, s, s, h, w).transpose(0, 1, 4, 2, 5, 3)
    return blocks.reshape(b, c // s**2, h * s, w * s)


@implements("SpaceToDepth", moves=True)
def _space_to_depth(x, /, *, blocksize):
    b, c, h, w = x.shape
    s = blocksize
    blocks = x.reshape(b, c, h // s, s, w // s, s).transpose(0, 3, 5, 1, 2, 4)
    return blocks.reshape(b, c * s**2, h // s, w // s)


# --- Parts and copies -----------------------------------------------------------------------------


# A constant beside examples is there for each of them.
@implements("Concat", moves=True)
def _concat(*xs, axis=1, facts):
    (axis,) = along(xs[0], [axis])
    if axis != 0 and {one[0] for one in facts.shapes} == {1}:
        batch = max(x.shape[0] for x in xs)
        xs = [x if x.shape[0] == batch else jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in xs]
    return namespace(*xs).concatenate(xs, axis)


# The one entry of an axis for examples is all of it, whatever the batch.
@implements("Slice", moves=True)
def _slice(x, /, starts, ends, axes=None, steps=None, *, facts):
    starts, ends = integers(starts), integers(ends)
    axes = along(x, range(len(starts)) if axes is None else integers(axes))
    steps = (1,) * len(starts) if steps is None else integers(steps)
    for axis, *parts in zip(axes, starts, ends, steps, strict=True):
        one = facts.shapes[0][axis]
        if (axis, one) != (0, 1) or not range(*slice(*parts).indices(one)):
            x = _strided(x, axis, *slice(*parts).indices(x.shape[axis]))
    return x


def _strided(x, axis, start, end, step):
    """Entries range(start, end, step) along an axis, without an equation where that is all."""
    index = range(start, end, step)
    if index == range(x.shape[axis]):
        return x
    low, high = (min(index), max(index) + 1) if index else (0, 0)
    cut = tuple(slice(low, high, abs(step)) if i == axis else slice(None) for i in range(x.ndim))
    return namespace(x).flip(x[cut], axis) if step < 0 else x[cut]


@implements("Split", moves=True)
def _split(x, /, split=None, *, axis=0, num_outputs=None, facts):
    (axis,) = along(x, [axis])
    size, count = x.shape[axis], num_outputs or facts.outputs
    if split is None:
        each = -(-size // count)
        split = [min(each, size - i * each) for i in range(count)]
    ends = np.cumsum(integers(split))
    return tuple(
        _strided(x, axis, int(end) - n, int(end), 1) for n, end in zip(split, ends, strict=True)
    )


@implements("Gather", moves=True)
def _gather(x, /, indices, *, axis=0):
    (axis,) = along(x, [axis])
    index, size = np.asarray(indices, np.int64), x.shape[axis]
    if np.any((index < -size) | (index >= size)):
        raise ValueError(f"an index beyond the {size} entries of axis {axis}")
    return _picked(x, axis, np.where(index < 0, index + size, index))


def _picked(x, axis, index):
    """Entries `index` >= 0 along an axis, by a slice where it is one."""
    if index.ndim == 0:
        return _strided(x, axis, int(index), int(index) + 1, 1).squeeze(axis)
    if index.ndim == 1 and index.size and np.all(np.diff(index) == 1):
        return _strided(x, axis, int(index[0]), int(index[-1]) + 1, 1)
    # Of a type that does not depend on the x64 mode, so that a proof traces the same equations.
    return namespace(x).take(x, index.astype(np.int32), axis, mode="clip")


@implements("Expand", moves=True)
def _expand(x, /, shape):
    return namespace(x).broadcast_to(x, np.broadcast_shapes(x.shape, integers(shape)))


@implements("Tile", moves=True)
def _tile(x, /, repeats):
    return namespace(x).tile(x, integers(repeats))


@implements("Pad", moves=True)
def _pad(x, /, pads, constant_value=None, axes=None, *, mode="constant", value=0.0):
    axes = along(x, range(x.ndim) if axes is None else integers(axes))
    pads, widths = integers(pads), [(0, 0)] * x.ndim
    for i, axis in enumerate(axes):
        widths[axis] = (pads[i], pads[i + len(axes)])
    if not any(low or high for low, high in widths):
        return x
    if mode != "constant":
        return _repeated(x, widths, mode)
    filled = np.asarray(value if constant_value is None else constant_value).reshape(())
    return lax.pad(x, jnp.asarray(filled, x.dtype), [(*width, 0) for width in widths])


def _repeated(x, widths, mode):
    """Padded with entries of its own; negative widths take away first."""
    if mode not in ("edge", "reflect", "wrap"):
        raise ValueError(f"mode={mode} is not supported")
    for axis, (low, high) in enumerate(widths):
        kept = np.arange(max(-low, 0), x.shape[axis] - max(-high, 0))
        x = _picked(x, axis, np.pad(kept, (max(low, 0), max(high, 0)), mode))
    return x


@implements("Dropout", since=7, moves=True, ignored="seed")
def _dropout(x, /, ratio=0.5, training_mode=False):
    if training_mode:
        raise ValueError("active dropout makes each call another function; export with eval()")
    return x


@implements("Dropout", moves=True)
def _old_dropout(x, /, *, ratio=0.5, is_test=0):
    return _dropout(x, training_mode=not is_test)


# --- Nearest neighbours ---------------------------------------------------------------------------


@implements("Resize", since=11, moves=True, ignored="""
    antialias cubic_coeff_a exclude_outside extrapolation_value
""")  # fmt: skip
def _resize(
    x,
    /,
    roi=None,
    scales=None,
    sizes=None,
    *,
    axes=None,
    coordinate_transformation_mode="half_pixel",
    mode="nearest",
    nearest_mode="round_prefer_floor",
    facts,
):
    axes = along(x, range(x.ndim) if axes is None else axes)
    if not scales:
        one = facts.shapes[0]
        scales = [size / one[axis] for axis, size in zip(axes, integers(sizes), strict=True)]
    for axis, scale in zip(axes, scales, strict=True):
        x = _nearest(x, axis, scale, mode, coordinate_transformation_mode, nearest_mode)
    return x


@implements("Resize", since=10, moves=True)
def _old_resize(x, /, scales, *, mode="nearest"):
    for axis, scale in enumerate(scales):
        x = _nearest(x, axis, scale, mode, "asymmetric", "floor")
    return x


@implements("Upsample", moves=True)
def _upsample(x, /, scales, *, mode="nearest"):
    return _old_resize(x, scales=scales, mode=mode)


_POSITIONS = {
    "asymmetric": lambda i, scale: i / scale,
    "half_pixel": lambda i, scale: (i + 0.5) / scale - 0.5,
    "pytorch_half_pixel": lambda i, scale: (i + 0.5) / scale - 0.5,
}
_ROUNDINGS = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda p: np.ceil(p - 0.5),
    "round_prefer_ceil": lambda p: np.floor(p + 0.5),
}


def _nearest(x, axis, scale, mode, coordinates, nearest):
    if scale == 1:
        return x
    if mode != "nearest" or scale < 1 or not float(scale).is_integer():
        raise ValueError(f"only nearest neighbours at whole scales; got {mode} at {scale}")
    if coordinates not in _POSITIONS:
        raise ValueError(f"coordinate_transformation_mode={coordinates} is not supported")
    size = x.shape[axis]
    positions = _POSITIONS[coordinates](np.arange(size * int(scale)), scale)
    index = np.clip(_ROUNDINGS[nearest](positions), 0, size - 1).astype(np.int64)
    return _picked(x, axis, index)


# --- Shapes, known when the file is read ----------------------------------------------------------


@implements("Shape", moves=True)
def _shape(x, /, *, start=0, end=None):
    return np.asarray(x.shape[start:end], np.int64)


@implements("Size", moves=True)
def _size(x, /):
    return np.asarray(math.prod(x.shape), np.int64)


@implements("ConstantOfShape", moves=True)
def _constant_of_shape(shape, *, value=None):
    filled = np.zeros(1, np.float32) if value is None else np.asarray(value)
    return np.full(integers(shape), filled.reshape(()), filled.dtype)


@implements("Range", moves=True)
def _range(start, limit, delta, /):
    return np.arange(start, limit, delta, dtype=start.dtype)
