"""A model for the attacks' loops, with the convolutions that XLA is fast at there.

Outside of loops XLA:CPU brings convolutions into the one layout that its library knows, examples
first and channels last, for the kernel inputs before outputs. Inside of loops it does not (JAX
0.10.1 and 0.12), and takes 7 to 15 times as long; so it is done here, for the derivative as well.
What is computed is the same up to rounding: for gradients, not for proofs or replays.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxcert.bounds.convolution import has_fast_transpose, transposed
from jaxcert.graph import Equation, Var, read, trace
from jaxcert.model import Model
from jaxcert.sets import Array


def quick(f: Model, x: Array) -> Array:
    """f(x), for batches of inputs; to be differentiated in reverse mode."""
    graph = trace(f, jax.ShapeDtypeStruct(x.shape, x.dtype))
    env: dict[Var, Any] = {graph.inputs[0]: x}
    for eqn in graph.equations:
        values = [read(env, atom) for atom in eqn.inputs]
        if has_fast_transpose(eqn) and not _depends(eqn.inputs[1]):
            results = [_convolved(eqn, *values)]
        else:
            results = eqn.bind(*values)
        env.update(zip(eqn.outputs, results, strict=True))
    return read(env, graph.outputs[0])


def _depends(kernel: Any) -> bool:
    return isinstance(kernel, Var) and kernel.bounded


def _convolved(eqn: Equation, x: Array, kernel: Array) -> Array:
    before = [low for low, _ in eqn.params["padding"]]

    def pulled_back(kernel: Array, rows: Array) -> Array:
        return transposed(eqn, kernel, rows[None], x.shape, before)[0]

    forward = functools.partial(_channels_last, eqn)
    return jax.custom_derivatives.linear_call(forward, pulled_back, kernel, x)


def _channels_last(eqn: Equation, kernel: Array, x: Array) -> Array:
    """The convolution between a change of layout and the change back."""
    p = eqn.params
    of_x, of_kernel, of_out = p["dimension_numbers"]
    axes = "".join(chr(ord("a") + i) for i in range(x.ndim - 2))

    def last(spec: Any) -> list[int]:
        return [spec[0], *spec[2:], spec[1]]

    out = lax.conv_general_dilated(
        x.transpose(last(of_x)), kernel.transpose([*of_kernel[2:], of_kernel[1], of_kernel[0]]),
        p["window_strides"], p["padding"], precision=p["precision"],
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    )  # fmt: skip
    return jnp.moveaxis(out, range(out.ndim), last(of_out))
