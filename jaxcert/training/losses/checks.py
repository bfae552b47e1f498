"""What losses check of their arguments before they compute.

Shapes, types and known values raise; traced values cannot be looked at.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.model import is_traced

Array: TypeAlias = jax.Array


def checked(logits: Any, labels: Any) -> tuple[Array, Array]:
    """The logits as a JAX array, and where each row's label is, bool (b, k)."""
    if not is_array_of(jnp.floating, logits):
        raise TypeError(f"logits must be a floating point array (b, k), got {described(logits)}")
    shape = jnp.shape(logits)
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(
            f"logits must have shape (b, k) with k >= 2 classes, got {shape}; for one example "
            "write logits[None] and labels[None]"
        )
    if not is_array_of(jnp.integer, labels):
        raise TypeError(
            f"labels must be an integer array (b,), got {described(labels)}; for one-hot labels "
            "write labels.argmax(-1)"
        )
    if jnp.shape(labels) != shape[:1]:
        raise ValueError(
            f"labels must have shape {shape[:1]} for logits {shape}, got {jnp.shape(labels)}; for "
            "one-hot labels write labels.argmax(-1)"
        )
    if not is_traced(labels):
        known = np.asarray(labels)
        if np.any((known < 0) | (known >= shape[1])):
            raise ValueError(
                f"labels must lie in 0, ..., {shape[1] - 1} for logits {shape}, got "
                f"{known.min()} to {known.max()}"
            )
    return jnp.asarray(logits), one_hot(jnp.asarray(labels), shape[1])


def one_hot(classes: Array, k: int) -> Array:
    """Where each row's class is, bool (b, k); nowhere for what is no class."""
    return classes.astype(jnp.int32)[:, None] == jnp.arange(k, dtype=jnp.int32)[None]


def scalar(
    value: Any, name: str, like: Array, *, most: float = np.inf, above: bool = False
) -> Array:
    """A number in [0, most], or in (0, most] with `above`, in the float type of an array."""
    if jnp.shape(value) != ():
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}")
    if not is_traced(value) and not (
        0 <= value <= most and value < np.inf and (value or not above)
    ):
        wanted = "above 0" if above else "0 or more" if most == np.inf else f"in [0, {most:g}]"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return jnp.asarray(value, like.dtype)


def per_example(value: Any, name: str, logits: Array, *, least: float = -np.inf) -> Array:
    """A number, or one per example as a column (b, 1)."""
    shape = jnp.shape(value)
    if shape not in ((), logits.shape[:1]):
        raise ValueError(
            f"{name} must be a scalar or one per example {logits.shape[:1]}, got shape {shape}"
        )
    if not is_traced(value) and not np.all((np.asarray(value) >= least) & np.isfinite(value)):
        wanted = "finite" if least == -np.inf else f"finite and at least {least:g}"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    value = jnp.asarray(value, logits.dtype)
    return value[:, None] if shape else value


def require_pair_constants(constants: Any, logits: Array) -> None:
    """Lipschitz constants of pairs of classes: a scalar, (k, k) or (b, 1, k)."""
    (b, k), shape = logits.shape, jnp.shape(constants)
    if shape not in ((), (k, k), (b, 1, k)):
        hint = "; write constants[:, None, :]" if shape == (b, k) else ""
        raise ValueError(
            f"pair_constants must be a scalar, (k, k) = {(k, k)} or (b, 1, k) = {(b, 1, k)} for "
            f"logits {logits.shape}, got shape {shape}{hint}"
        )
    if not is_traced(constants):
        known = np.asarray(constants)
        if not np.all((known >= 0) & np.isfinite(known)):
            raise ValueError("pair_constants must be finite and 0 or more")


def require_frequencies(frequencies: Any, k: int) -> None:
    """Shares of the k classes in the data."""
    if jnp.shape(frequencies) != (k,):
        raise ValueError(
            f"class_frequencies must have shape {(k,)}, one per class, got {jnp.shape(frequencies)}"
        )
    if not is_traced(frequencies):
        known = np.asarray(frequencies)
        if not np.all((known > 0) & (known < 1)):
            raise ValueError(
                f"class_frequencies must lie strictly between 0 and 1, got {known}; leave "
                "them out to use those of the batch"
            )


def is_array_of(kind: Any, value: Any) -> bool:
    """Whether a value is an array of a kind of numbers, such as `jnp.floating`."""
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, kind)


def described(value: Any) -> str:
    """A value's type and shape, for messages."""
    return f"{value.dtype} {value.shape}" if hasattr(value, "dtype") else type(value).__name__


def require_distributions(values: Any, name: str, logits: Array) -> Array:
    """Probabilities of the classes, one row per example, as constants in the logits' type."""
    if not is_array_of(jnp.floating, values) or jnp.shape(values) != logits.shape:
        raise ValueError(
            f"{name} must be floating point probabilities {logits.shape}, got {described(values)}; "
            "for labels write jax.nn.one_hot(labels, k)"
        )
    if not is_traced(values):
        known = np.asarray(values, np.float64)
        if not np.all(known >= 0) or not np.allclose(known.sum(axis=1), 1, atol=1e-3):
            raise ValueError(f"{name} must be 0 or more, and sum to 1 in each row")
    return jax.lax.stop_gradient(jnp.asarray(values, logits.dtype))
