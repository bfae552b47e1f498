"""Work on many devices: images along one axis of a mesh, draws along another.

Every draw is numbered, so that which device makes it changes nothing.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Array: TypeAlias = jax.Array
_Tree = TypeVar("_Tree")

IMAGES, SAMPLES = "images", "samples"


def require_mesh(mesh: Any) -> None:
    """Raise unless it is None, or a mesh with axes of these names."""
    if mesh is None:
        return
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}; type "
            "jax.make_mesh((2, 4), ('images', 'samples'))"
        )
    if not set(mesh.axis_names) <= {IMAGES, SAMPLES}:
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names}; name them 'images' (to share the batch) and "
            "'samples' (to share the draws), e.g. jax.make_mesh((2, 4), ('images', 'samples'))"
        )


def over_images(local: Callable[..., _Tree], mesh: Mesh | None, block: int) -> Callable[..., _Tree]:
    """`local(arrays, key, x, index)`, each device of the axis "images" with a part of x and index.

    The results' first axis is that of x, and every device has all of them in the end. Parts are
    multiples of `block` images; the last image is repeated where they do not come out even.
    """
    if mesh is None:
        return local
    mesh = _automatic(mesh)
    part = P(IMAGES) if IMAGES in mesh.axis_names else P()

    def whole(arrays: Any, key: Array, x: Array, index: Array) -> _Tree:
        padded = repeated(x, index, block * mesh.shape.get(IMAGES, 1))
        # That results are equal on all devices is not visible to JAX through the loops.
        run = jax.shard_map(
            gathered, mesh=mesh, in_specs=(P(), P(), part, part), out_specs=P(), check_vma=False
        )
        return jax.tree.map(lambda leaf: leaf[: len(x)], run(arrays, key, *padded))

    def gathered(arrays: Any, key: Array, x: Array, index: Array) -> _Tree:
        found = local(arrays, key, x, index)
        if IMAGES not in mesh.axis_names:
            return found
        return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, IMAGES, tiled=True), found)

    return whole


def _automatic(mesh: Mesh) -> Mesh:
    """The same mesh with axes that XLA shards over by itself, whatever `make_mesh` made."""
    types = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def repeated(x: Array, index: Array, block: int) -> tuple[Array, Array]:
    """Images and their numbers, the last one repeated until they fill blocks."""
    missing = -len(x) % block
    filled = [jnp.concatenate([part, part[-1:].repeat(missing, 0)]) for part in (x, index)]
    return filled[0], filled[1]


def share(mesh: Mesh | None) -> tuple[Any, int]:
    """(i, m): this device takes the i-th of every m chunks of draws. Within `over_images`."""
    if mesh is None or SAMPLES not in mesh.axis_names:
        return 0, 1
    return jax.lax.axis_index(SAMPLES), mesh.shape[SAMPLES]


def summed(votes: _Tree, mesh: Mesh | None) -> _Tree:
    """Votes of all shares, 2 k integers per image: they and results are all that devices send."""
    if mesh is None or SAMPLES not in mesh.axis_names:
        return votes
    return jax.lax.psum(votes, SAMPLES)


def everywhere(tree: _Tree, mesh: Mesh | None) -> _Tree:
    """Results that every device, and so every process, holds as a whole."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(_automatic(mesh), P()))
