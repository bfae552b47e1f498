"""Patch attacks: votes of a model that sees a small window of the image at a time, counted exactly.

A patch touches few windows, and those that it does not touch vote as before. Nothing is sampled:
every window votes, and the certificate is a proof (Levine and Feizi, NeurIPS 2020; with vision
transformers, Salman, Jain, Wong and Madry, CVPR 2022).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.certificate import ABSTAIN, Certificate, issue, predicted_class
from jaxcert.model import Model, Structure, output_shape, split
from jaxcert.smoothing.sampling import require_apart, rows_apart

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class Patch:
    """The threat: all channels of the pixels of a rectangle anywhere in the image, at will.

    As the norm of a certificate: |x' - x| is the least number of such rectangles that cover all
    pixels where x' and x differ, so that radius 1 means any one patch.

    Attributes:
      height, width: of the rectangle, in pixels.
    """

    height: int
    width: int

    def __post_init__(self):
        _require_positive("a patch", self.height, self.width)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Which windows of an image the model sees, one at a time; they wrap around its edges.

    Attributes:
      height, width: of a window, in pixels; None for the whole axis.
      stride: between the first pixels of neighbouring windows.
    """

    height: int | None
    width: int | None
    stride: int = 1

    def __post_init__(self):
        _require_positive("a window", *(s for s in (self.height, self.width) if s is not None))
        _require_positive("a stride", self.stride)


def columns(width: int, stride: int = 1) -> Windows:
    """Vertical bands, the column smoothing of Levine and Feizi."""
    return Windows(None, width, stride)


def rows(height: int, stride: int = 1) -> Windows:
    """Horizontal bands."""
    return Windows(height, None, stride)


def blocks(size: int, stride: int = 1) -> Windows:
    """Squares."""
    return Windows(size, size, stride)


# --- How the model sees a window, and how it votes ------------------------------------------------


def with_complement(image: Array, mask: Array) -> Array:
    """(h, w, 2 c): x and 1 - x, both 0 where ablated (Levine and Feizi), for pixels in [0, 1]."""
    return jnp.concatenate([image, (1 - image) * mask], axis=-1)


def with_mask(image: Array, mask: Array) -> Array:
    """(h, w, c + 1): x, 0 where ablated, and the mask (Salman et al.), by which a transformer may
    drop its fully ablated tokens."""
    return jnp.concatenate([image, mask], axis=-1)


def zeroed(image: Array, mask: Array) -> Array:
    """(h, w, c): x, 0 where ablated."""
    del mask
    return image


def one_vote(logits: Array) -> Array:
    """The class predicted; no class where the logits are not all finite."""
    return predicted_class(logits)[:, None] == jnp.arange(logits.shape[1])


@dataclasses.dataclass(frozen=True)
class VoteAbove:
    """Every class whose softmax probability is at least a threshold, which may be none or several.

    The votes of Levine and Feizi.
    """

    threshold: float

    def __call__(self, logits: Array) -> Array:
        """The votes, bool (b, k), of logits (b, k)."""
        finite = jnp.all(jnp.isfinite(logits), axis=1, keepdims=True)
        return (jax.nn.softmax(logits) >= self.threshold) & finite


def certify(
    f: Model,
    x: Any,
    patch: Patch,
    windows: Windows,
    *,
    encode: Callable[[Array, Array], Array] = with_complement,
    vote: Callable[[Array], Array] = one_vote,
    chunk: int = 256,
) -> Certificate:
    """The class that most windows vote for, and whether it stays so under every patch.

    The certified function is the vote: each window of the image goes through f alone, and the class
    of the most votes is predicted, of equals the first. Exact: radius 1 if and only if no patch
    wins even if all windows it touches vote as the attacker likes. That is at least what the
    counts alone certify, n_A >= n_B + 2 D + 1[B < A] with D windows touched at most.

    Args:
      f: the model, (chunk, h, w, c') -> (chunk, k) logits, on encoded windows; in eval mode.
      x: floats (b, h, w, c).
      patch: the threat.
      windows: `columns(4)`, `rows(4)`, `blocks(12)`, all of which are enumerated; for transformers
        as of Salman et al. wide columns with a stride and `encode=with_mask`.
      encode: of an image (h, w, c), 0 where ablated, and a mask (h, w, 1), 1 where kept; static.
      vote: of logits (chunk, k), bool (chunk, k); static.
      chunk: windows of one forward pass. Memory is that of one forward pass, and a few ints per
        window (and place of a patch in one row) and class.

    Returns:
      A `Certificate` with norm `patch`, radius 1 or 0, confidence 1; `ABSTAIN` where no window
      votes.

    Raises:
      TypeError, ValueError: for arguments of another kind; a patch or window larger than the image.
      MixedRows, StatefulModel: where windows would not vote alone.

    Example:
      >>> x = jnp.ones((1, 8, 8, 1))
      >>> bright = lambda z: jnp.stack([z[..., 1].sum((1, 2)), z[..., 0].sum((1, 2))], axis=1)
      >>> [int(certify(bright, x, Patch(3, m), columns(2)).radius[0]) for m in (2, 3)]
      [1, 0]
    """
    _check(x, patch, windows, chunk)
    x = jnp.asarray(x)
    in_rows, in_columns = _masks(windows, x.shape[1:3])
    window = _seen(jnp.zeros_like(x[0]), in_rows[:1], in_columns[:1], encode)
    arrays, structure = split(f, window)
    batch = jax.ShapeDtypeStruct((chunk, *window.shape[1:]), window.dtype)
    output_shape(structure, arrays, batch)
    require_apart(structure, arrays, window, chunk)
    prediction, safe = _certify(
        arrays,
        x,
        structure=structure,
        patch=patch,
        windows=windows,
        functions=(encode, vote),
        chunk=chunk,
    )
    return issue(prediction, safe.astype(x.dtype), norm=patch)


@functools.partial(jax.jit, static_argnames=("structure", "patch", "windows", "functions", "chunk"))
def _certify(
    arrays: list,
    x: Array,
    *,
    structure: Structure,
    patch: Patch,
    windows: Windows,
    functions: tuple[Callable, Callable],
    chunk: int,
) -> tuple[Array, Array]:
    """The classes (b,), and whether they are safe from any patch."""
    encode, vote = functions
    in_rows, in_columns = _masks(windows, x.shape[1:3])
    total = len(in_rows) * len(in_columns)
    # The last chunk is filled up with windows that are not counted.
    numbers = np.arange(-(-total // chunk) * chunk).reshape(-1, chunk) % total

    def one(image):
        def votes(number):
            row, column = number // len(in_columns), number % len(in_columns)
            seen = _seen(image, jnp.asarray(in_rows)[row], jnp.asarray(in_columns)[column], encode)
            return vote(structure.build(arrays)(seen))

        table = jax.lax.map(votes, jnp.asarray(numbers, jnp.int32))
        if table.ndim != 3 or table.shape[2] < 2:
            raise ValueError(
                "vote must tell at least 2 classes apart, bool (chunk, k), got rows of shape "
                f"{table.shape[2:]}; with one class, no vote at all would be the only other outcome"
            )
        table = table.reshape(numbers.size, -1)[:total].astype(jnp.int32)
        table = table.reshape(len(in_rows), len(in_columns), -1)
        return decide(table, _touched(in_rows, patch.height), _touched(in_columns, patch.width))

    prediction, safe = jax.lax.map(one, x)
    alone = rows_apart(structure, arrays, _seen(x[0], in_rows[:1], in_columns[:1], encode), chunk)
    return jnp.where(alone, prediction, ABSTAIN), safe & alone


def _seen(image: Array, kept_rows: Any, kept_columns: Any, encode: Callable) -> Array:
    """The encoded windows (c, h, w, c') of an image, given the pixels of each along both axes.

    Whatever `encode` does, it never sees the pixels outside.
    """

    def window(kept_row: Array, kept_column: Array) -> Array:
        mask = (kept_row[:, None] & kept_column[None])[..., None]
        return encode(jnp.where(mask, image, 0), mask.astype(image.dtype))

    return jax.vmap(window)(jnp.asarray(kept_rows), jnp.asarray(kept_columns))


def _masks(windows: Windows, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The pixels that each window holds along both axes, bool (windows, pixels)."""

    def along(size: int, length: int | None) -> np.ndarray:
        if length is None:
            return np.ones((1, size), bool)
        starts = np.arange(0, size, windows.stride)[:, None]
        return (np.arange(size) - starts) % size < length

    return along(shape[0], windows.height), along(shape[1], windows.width)


# A patch at a .. a + m - 1 touches the windows that hold one of these pixels: m + s - 1 of those of
# width s and stride 1. For a larger stride that does not divide the image, more windows than
# ceil((m + s - 1) / stride) can be touched, as the last one and the first are closer together, so
# they are counted.
def _touched(masks: np.ndarray, length: int) -> np.ndarray:
    """Which windows a patch touches along an axis, by its place: bool (places, windows)."""
    places = masks.shape[1] - length + 1
    return np.stack([masks[:, a : a + length].any(axis=1) for a in range(places)])


# Let n_c be the votes for class c and t_c those of the D windows that a patch touches. The others
# stay, so afterwards A has at least n_A - t_A votes and B at most n_B - t_B + D, and an attacker
# who controls the touched windows attains both at once. A keeps the lead if
#
#   n_A - t_A >= n_B - t_B + D + 1[B < A]    for all B != A.
#
# As t_A - t_B <= D, this follows from n_A >= n_B + 2 D + 1[B < A].
def decide(votes: Array, touched_rows: np.ndarray, touched_columns: np.ndarray) -> tuple:
    """The class of the most votes (`ABSTAIN` for none), and whether no patch changes it.

    Args:
      votes: int32 (window rows, window columns, k), 0 or 1.
      touched_rows: bool (places, window rows), the windows touched by a patch at each place.
      touched_columns: bool (places, window columns).

    Returns:
      int32 () and bool ().
    """
    total = jnp.sum(votes, axis=(0, 1))
    top = jnp.argmax(total)
    classes = jnp.arange(len(total))
    in_columns = jnp.asarray(touched_columns.T, jnp.int32)
    width = jnp.asarray(touched_columns.sum(1), jnp.int32)

    def safe_in(row_of_windows: Array) -> Array:
        """Whether all places of a patch are harmless whose rows touch these windows."""
        in_rows = jnp.tensordot(row_of_windows, votes, axes=1)  # (window columns, k)
        stay = total - jnp.tensordot(in_columns, in_rows, axes=(0, 0))  # (places, k)
        most = stay + (jnp.sum(row_of_windows) * width)[:, None] + (classes < top)
        rivals = jnp.max(jnp.where(classes == top, -1, most), axis=1)
        return jnp.all(stay[:, top] >= rivals)

    safe = jnp.all(jax.lax.map(safe_in, jnp.asarray(touched_rows, jnp.int32)))
    some = total[top] > 0
    return jnp.where(some, top, ABSTAIN).astype(jnp.int32), safe & some


def _check(x: Any, patch: Patch, windows: Windows, chunk: int) -> None:
    if not isinstance(patch, Patch) or not isinstance(windows, Windows):
        raise TypeError(
            "type certify(f, x, Patch(5, 5), columns(4)), got "
            f"{type(patch).__name__} and {type(windows).__name__}"
        )
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim != 4:
        raise ValueError(
            f"x must hold floating point images (b, h, w, c), got "
            f"{getattr(x, 'dtype', type(x).__name__)} {jnp.shape(x)}"
        )
    _require_positive("chunk", chunk)
    for name, of_patch, of_window, size in (
        ("height", patch.height, windows.height, x.shape[1]),
        ("width", patch.width, windows.width, x.shape[2]),
    ):
        if of_patch > size or (of_window or 0) > size:
            raise ValueError(f"a patch or window is larger than the images, whose {name} is {size}")


def _require_positive(what: str, *sizes: Any) -> None:
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{what} takes positive ints, got {sizes}")
