"""Counting the votes of a model under noise: one jitted loop, known memory, reproducible draws.

Promises, whatever the chunk size, the batch and the order of its images:

- copy number s of the image numbered i is `noise.perturb(fold_in(fold_in(key, i), s), x)`, with
  i // group in the place of i where a plan shares noise over groups of images;
- estimation takes the numbers 0, 1, ..., n - 1, and selection counts down from 2^32 - 1, so that
  the two never share a draw and a longer run starts with the draws of a shorter one;
- the model is only ever run on batches of exactly `chunk` copies of one image, because the float
  logits of a row depend on the shape of its batch: the compiled model is the certified one. A
  partly used last batch is filled up with draws that are not counted.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.certificate import ABSTAIN, predicted_class
from jaxcert.errors import MixedRows, UnsupportedEquation
from jaxcert.model import Model, Structure, is_traced, output_shape, run, split
from jaxcert.smoothing.affine import AffineFirst
from jaxcert.smoothing.noise import Noise
from jaxcert.smoothing.plan import SmoothingPlan
from jaxcert.tracing import may_see_place

Array: TypeAlias = jax.Array

SMALL = 16


def noisy_copies(key: Array, x: Array, numbers: Array, noise: Noise) -> Array:
    """Noisy copy number s of x (*input), for every s of `numbers` (c,), as (c, ...).

    `key` is the image's own: `fold_in(key, i)`.
    """

    def draw(number: Array) -> Array:
        return noise.perturb(jax.random.fold_in(key, number), x)

    return _one_by_one(draw, numbers, x)


def _one_by_one(draw: Callable[[Array], Array], numbers: Array, x: Array) -> Array:
    # A few numbers per draw would be computed together with those of other draws, by other
    # instructions for other chunks; one draw at a time they are not.
    return jax.lax.map(draw, numbers) if x.size < SMALL else jax.vmap(draw)(numbers)


def count_votes(
    key: Array,
    f: Model,
    x: Array,
    index: Array,
    plan: SmoothingPlan,
    *,
    n0: int,
    share: tuple[Any, int] = (0, 1),
) -> tuple[Array, Array]:
    """How often f predicts each class under noise.

    A sample whose logits are not all finite votes for no class. At most `chunk` noisy copies exist
    at a time, whatever b is (twice as many with plan.group > 1): the memory is
    chunk (d + the activations of one forward pass per row) floats, plus 2 k ints per image.

    Args:
      key: a scalar `jax.random.key`.
      f: the model, (c, *input) -> (c, k).
      x: (b, *input).
      index: ints (b,), the numbers of the images.
      plan: its noise, n, chunk and group count here. b must be a multiple of the group.
      n0: draws for selection, besides the plan's n for estimation.
      share: (i, m): count the i-th of every m chunks only.

    Returns:
      int32 (b, k) votes in the n draws, and (b, k) in the n0 draws.
    """
    key = hardware_key(key) if plan.hardware else threefry_key(key)
    k = number_of_classes(f, copies(plan.noise, x, plan.rows))
    first, step = share
    chunks = -(-(plan.n + n0) // (plan.chunk * step))

    def count_group(images: tuple[Array, Array]) -> Array:
        pixels, numbers = images
        group_key = jax.random.fold_in(key, numbers[0] // jnp.uint32(plan.group))

        def count_chunk(c: Array, counts: Array) -> Array:
            draw, stage = _schedule(first + step * c, plan.n, n0, plan.chunk)
            classes = _classes(f, group_key, pixels, draw, plan.noise)
            # Abstentions and draws beyond n + n0 fall out of the table.
            classes = jnp.where(classes == ABSTAIN, k, classes)
            image = jnp.arange(plan.group)[:, None]
            return counts.at[image, stage[None], classes].add(1, mode="drop")

        start = jnp.zeros((plan.group, 2, k), jnp.int32)
        return jax.lax.fori_loop(0, chunks, count_chunk, start)

    groups = (part.reshape(-1, plan.group, *part.shape[1:]) for part in (x, index))
    counts = jax.lax.map(count_group, tuple(groups)).reshape(len(x), 2, k)
    return counts[:, 0], counts[:, 1]


def _classes(f: Model, key: Array, x: Array, numbers: Array, noise: Noise) -> Array:
    """What f predicts for the noisy copies `numbers` (c,) of each of x (g, *input), as (g, c)."""
    if len(x) == 1:
        return predicted_class(f(noisy_copies(key, x[0], numbers, noise)))[None]

    def draw(number: Array) -> Array:
        return noise.sample(jax.random.fold_in(key, number), x.shape[1:], x.dtype)

    drawn = _one_by_one(draw, numbers, x[0])
    if isinstance(f, AffineFirst):
        moved = f.linear(drawn)
        return jax.lax.map(lambda each: predicted_class(f.rest(f.first(each[None]) + moved)), x)

    def classes(each: Array) -> Array:
        return predicted_class(f(jax.vmap(lambda one: noise.apply(each, one))(drawn)))

    return jax.lax.map(classes, x)


def copies(noise: Noise, x: Any, rows: int) -> jax.ShapeDtypeStruct:
    """A batch (rows, *copy) of what the model receives of x (b, *input), by shape and type."""
    image = jax.ShapeDtypeStruct(x.shape[1:], jax.dtypes.canonicalize_dtype(x.dtype))
    copy = jax.eval_shape(noise.perturb, jax.eval_shape(jax.random.key, 0), image)
    return jax.ShapeDtypeStruct((rows, *copy.shape), copy.dtype)


def prepared(f: Model, x: Array, plan: Any) -> tuple[list[Any], Structure, tuple[int, ...]]:
    """The model in two parts, as `jaxcert.model.split`, and the shape of its output for one row.

    Args:
      f: the model, (plan.rows, *copy) -> (plan.rows, *out) floats.
      x: (b, *input).
      plan: with a noise and rows.

    Raises:
      TypeError, ValueError: it returns something else.
      MixedRows, StatefulModel: the rows of a batch do not leave each other alone, or each call is
        another function. Of traced models and images only what their equations prove raises.
    """
    batch = copies(plan.noise, x, plan.rows)
    arrays, structure = split(f, batch)
    out = run.eval_shape(structure, arrays, batch)
    if not isinstance(out, jax.ShapeDtypeStruct) or not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(
            f"the model must return one floating point array (b, ...), got {out}; concatenate "
            "several outputs"
        )
    if out.shape[:1] != (plan.rows,):
        raise ValueError(
            f"the model must map a batch {batch.shape} to a batch ({plan.rows}, ...), got "
            f"{out.shape}"
        )
    require_apart(structure, arrays, x, plan.rows, plan.noise)
    return arrays, structure, out.shape[1:]


def number_of_classes(f: Model, batch: jax.ShapeDtypeStruct) -> int:
    """k, from the shapes alone, for such batches."""
    arrays, structure = split(f, batch)
    k = output_shape(structure, arrays, batch).shape[1]
    if k < 2:
        raise ValueError(
            f"the model must tell at least 2 classes apart, got logits of shape (b, {k}); "
            "for a single logit z return jnp.concatenate([-z, z], axis=1)"
        )
    return k


def usable(structure: Structure, arrays: Sequence[Any], x: Array, noise: Noise, rows: int) -> Array:
    """bool (b,): whether draws mean anything: the noise is for such images, and rows are apart."""
    finite = jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
    return finite & noise.usable(x) & rows_apart(structure, arrays, x, rows, noise)


def require_apart(
    structure: Structure, arrays: Sequence[Any], x: Array, rows: int, noise: Noise | None = None
) -> None:
    """Raise unless `rows_apart`, where that is known."""
    apart = rows_apart(structure, arrays, x, rows, noise)
    if is_traced(apart) or apart:
        return
    raise MixedRows(
        "this model gives equal rows of a batch different logits, or a row's logits change with "
        "the rows beside it, so that its votes would not be independent; look for a mask or random "
        "numbers of the batch's shape, for dropout, for statistics of the batch: call eval(), or "
        "let each row have its own"
    )


# Jitted for the cache of its traces: it is asked before a run, and within it for traced callers.
@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def rows_apart(
    structure: Structure, arrays: Sequence[Any], x: Array, rows: int, noise: Noise | None = None
) -> Array | bool:
    """Whether the rows of a batch leave each other alone, without which votes are not independent.

    Proved from the model's equations where they can be followed; mixing raises. A model that holds
    numbers of its own for each row (a mask of the batch's shape) is put to the test: equal rows
    must have equal logits, but for rounding. So is one that cannot be followed, whose first and
    last rows' logits must also stay the same to the bit when all others are replaced.

    Args:
      structure, arrays: the model.
      x: (b, *input), such as the model receives, or its noisy copies where there is noise.
      rows: of a batch.

    Raises:
      MixedRows, StatefulModel: see `jaxcert.errors`.
    """
    one = jnp.where(jnp.isfinite(x[0]), x[0], 0)
    one = one if noise is None else noise.perturb(jax.random.key(0), one)
    try:
        followed = True
        if not may_see_place(structure.build(arrays), one.shape, one.dtype):
            return True
    except UnsupportedEquation:
        followed = False
    alike = jnp.broadcast_to(one, (rows, *one.shape))
    logits = structure.build(arrays)(alike)
    finite = jnp.isfinite(logits[0])
    size = jnp.max(jnp.abs(logits[0]), initial=0.0, where=finite)
    near = finite & (jnp.abs(logits - logits[0]) <= 2.0**-6 * size)
    equal = jnp.all(near | _same(logits, logits[0]))
    if followed:
        return equal
    for row in (0, rows - 1):
        others = (-1.5 * alike + 0.3).astype(alike.dtype).at[row].set(one)
        equal &= jnp.all(_same(structure.build(arrays)(others)[row], logits[row]))
    return equal


def _same(a: Array, b: Array) -> Array:
    return (a == b) | (jnp.isnan(a) & jnp.isnan(b))


def _schedule(c: Array, n: int, n0: int, chunk: int) -> tuple[Array, Array]:
    """The draw numbers of chunk c and their stages: 0 estimation, 1 selection, 2 not counted."""
    row = jnp.asarray(c, jnp.uint32) * jnp.uint32(chunk) + jnp.arange(chunk, dtype=jnp.uint32)
    stage = (row >= n).astype(jnp.int32) + (row >= n + n0).astype(jnp.int32)
    # ~j is 2^32 - 1 - j.
    draw = jnp.where(row < n, row, ~(row - jnp.uint32(n)))
    return draw, stage


def threefry_key(key: Any) -> Array:
    """The key itself, or for another generator a threefry key drawn from it.

    Other generators give other bits when a batch of keys is drawn from at once, which would break
    the promise that noise does not depend on the chunk.
    """
    if jax.random.key_impl(key) == "threefry2x32":
        return key
    seed = jax.random.bits(key, (2,), jnp.uint32)
    return jax.random.wrap_key_data(seed, impl="threefry2x32")


def hardware_key(key: Any) -> Array:
    """A key of the device's own generator, drawn from the key."""
    seed = jax.random.bits(threefry_key(key), (4,), jnp.uint32)
    return jax.random.wrap_key_data(seed, impl="rbg")
