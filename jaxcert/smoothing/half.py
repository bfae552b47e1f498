"""Models that compute in bfloat16."""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.model import Model, Structure, split
from jaxcert.pytrees import pytree

Array: TypeAlias = jax.Array


@pytree
@dataclasses.dataclass(frozen=True)
class _Bfloat16:
    """A model's arrays, in bfloat16 where they are floats, and its structure."""

    arrays: list
    structure: Structure = dataclasses.field(metadata={"static": True})

    def __call__(self, z: Array) -> Array:
        return self.structure.build(self.arrays)(z.astype(jnp.bfloat16)).astype(jnp.float32)


def in_bfloat16(f: Model) -> Model:
    """The model with weights and inputs in bfloat16: another function, to certify and to deploy.

    Smoothing may certify any fixed function, so that its certificates hold as they are, but of the
    function returned here, which is then the one to deploy; its logits are float32. What a model
    asks for by itself (a `dtype` of a layer, a cast) it keeps.

    Args:
      f: a model that is a pytree of its weights: an NNX module, `functools.partial(apply, params)`.

    Raises:
      ValueError: for a model that hides its weights in a closure.

    Example:
      >>> f = in_bfloat16(jax.tree_util.Partial(lambda w, z: z @ w, jnp.ones((2, 3))))
      >>> print(f(jnp.ones((1, 2))).dtype, f.arrays[0].dtype)
      float32 bfloat16
    """
    arrays, structure = split(f)
    if not any(_is_float(a) for a in arrays):
        raise ValueError(
            "the model has no weights that can be seen; pass it as a pytree, such as an NNX module "
            "or functools.partial(apply, params)"
        )
    return _Bfloat16([a.astype(jnp.bfloat16) if _is_float(a) else a for a in arrays], structure)


def _is_float(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)
