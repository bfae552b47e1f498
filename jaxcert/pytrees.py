"""Dataclasses as pytrees whose treedefs tell their classes apart.

The treedefs of `jax.tree_util.register_dataclass` compare equal for any two classes with equally
many fields (JAX 0.10 to 0.12), and `jit` looks compiled programs up by them: in some processes,
where the hashes of two classes fell together, it ran the program of a Linf ball for an L1 ball.
Those of `register_pytree_with_keys` compare the classes.
"""

import dataclasses
from typing import Any, TypeVar

import jax

_Class = TypeVar("_Class", bound=type)


def pytree(cls: _Class) -> _Class:
    """Make a dataclass a pytree of all its fields but those with `metadata={"static": True}`."""
    fields = dataclasses.fields(cls)
    data, static = (
        [f.name for f in fields if bool(f.metadata.get("static")) == wanted]
        for wanted in (False, True)
    )

    def flatten(each: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(each, n) for n in data), tuple(getattr(each, n) for n in static)

    def flatten_with_keys(each: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children, aside = flatten(each)
        keys = map(jax.tree_util.GetAttrKey, data)
        return tuple(zip(keys, children, strict=True)), aside

    def unflatten(aside: tuple[Any, ...], children: Any) -> Any:
        return cls(
            **dict(zip(data, children, strict=True)), **dict(zip(static, aside, strict=True))
        )

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
