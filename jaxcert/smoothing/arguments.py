"""What the certifiers check of their arguments before they sample."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.model import is_traced
from jaxcert.smoothing.noise import Noise
from jaxcert.smoothing.plan import SmoothingPlan

Array: TypeAlias = jax.Array


def checked(
    key: Array, x: Any, plan: Any, index: Any, kind: type = SmoothingPlan
) -> tuple[Array, Array]:
    """x and the image numbers as arrays; whatever is wrong with the arguments raises here."""
    if not isinstance(plan, kind):
        raise TypeError(
            f"plan must be a {kind.__name__}, got {type(plan).__name__}; "
            f"type {kind.__name__}(noise=Gaussian(0.25){', ...' * (kind is not SmoothingPlan)})"
        )
    require_key(key)
    x = require_images(x)
    index = _checked_index(index, x.shape[0])
    _require_usable(x, index, plan)
    return x, index


def require_key(key: Any) -> None:
    """Raise unless it is one typed key."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed or jnp.ndim(key):
        raise TypeError(
            "key must be one typed key and comes first: certify(jax.random.key(0), ...)"
        )


def require_images(x: Any) -> Array:
    """Images (b, *input) as a JAX array, or an error that says what they should be."""
    if isinstance(x, list | tuple):
        raise TypeError(f"x must be an array, got a {type(x).__name__}; type jnp.asarray(x)")
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"x must be a floating point array, got {getattr(x, 'dtype', type(x).__name__)}; scale "
            "it the way the model expects, e.g. x.astype(jnp.float32) / 255"
        )
    if x.ndim < 2:
        raise ValueError(
            f"x must have a batch axis first, (b, *input); got shape {x.shape}: "
            "write x[None] for one image"
        )
    if not len(x):
        raise ValueError(f"x holds no images: shape {x.shape}")
    return jnp.asarray(x)


def _checked_index(index: Any, b: int) -> Array:
    if index is None:
        return jnp.arange(b, dtype=jnp.uint32)
    if not is_traced(index):
        index = np.asarray(index)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"index must hold integers, got {index.dtype}; type jnp.arange({b})")
    if index.shape != (b,):
        raise ValueError(f"index must have one number per image, ({b},), got shape {index.shape}")
    if not is_traced(index) and index.size and not 0 <= index.min() <= index.max() < 2**32:
        raise ValueError("index must lie in [0, 2^32): pass the places of the images in their set")
    return index.astype(jnp.uint32) if is_traced(index) else jnp.asarray(index.astype(np.uint32))


def _require_usable(x: Any, index: Array, plan: Any) -> None:
    """Raise where known images are off the grid or out of the range that the noise is for."""
    if is_traced(x, index):
        return
    require_all(plan.noise.usable(x), x, plan.noise, plan.noise.inputs)
    group = getattr(plan, "group", 1)
    if group > 1:
        whole = np.pad(np.asarray(index), (0, -len(x) % group), "edge").reshape(-1, group) // group
        if not np.all(whole == whole[:, :1]):
            raise ValueError(
                f"group={group} shares noise among images whose index // {group} is the same, "
                f"which must come together, in runs of {group}; pass index=jnp.arange(b), or type "
                "group=1"
            )


def require_votes(votes: Array, noise: Noise, x: Array) -> None:
    """Raise where it is known that no draw of any image has given a vote; votes (b, ...)."""
    if is_traced(votes, x) or np.any(votes) or not np.any(noise.usable(x)):
        return
    raise ValueError(
        "the model's logits are not all finite, on any draw of any image of the batch, so there is "
        "nothing to count; look at f(x), and use jax.nn.log_softmax instead of jnp.log(softmax)"
    )


def require_all(usable: Array, x: Array, what: Any, inputs: str) -> None:
    """Raise where known, finite images x (b, *input) are none that a scheme is defined for."""
    if is_traced(usable, x):
        return
    known = np.asarray(x)
    finite = np.isfinite(known).all(axis=tuple(range(1, known.ndim)))
    bad = np.flatnonzero(~np.asarray(usable) & finite)
    if bad.size:
        values = known[bad[0]]
        raise ValueError(
            f"image {bad[0]} of the batch, with values from {values.min()} to {values.max()}, is "
            f"none that {what} is defined for, which takes {inputs}"
        )
