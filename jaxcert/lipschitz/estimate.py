"""Tight Lipschitz constants of ordinary feed-forward nets, on the whole space and on sets.

Four upper bounds on the same constant, from cheap to tight,

    product_bound   the product of the layers' norms
    liplt_bound     LipLT: norms of products of layers
    eclipse_bound   ECLipsE-Fast: ellipsoids with multipliers in closed form
    lipsdp_bound    the same with multipliers found by gradient descent, which approaches LipSDP

which are proofs; `multiplier_bound` is a fast differentiable version for training, which is none.
`local.py` has the constants on sets of inputs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcert.bounds.interpreter import RULES
from jaxcert.bounds.planes import PLANES
from jaxcert.floats import ieee_float64, rounded_up
from jaxcert.lipschitz import ellipsoids, layerwise
from jaxcert.lipschitz.chain import stored_weights
from jaxcert.lipschitz.ellipsoids import Layer, Multipliers
from jaxcert.lipschitz.feedforward import cut, matrices, plain_matrices, slopes_of
from jaxcert.lipschitz.slopes import Slopes
from jaxcert.model import Model, Structure, split, uses_float64
from jaxcert.sets import Array
from jaxcert.tracing import Traced, trace_float64, trace_rows

Estimate = Callable[[list[Layer], list[Slopes]], Array]

# --- on the whole space ---------------------------------------------------------------------------


def product_bound(f: Model, input_shape: tuple[int, ...]) -> Array:
    """Proves an upper bound on the L2 Lipschitz constant of f: the product of its layers' norms.

    `lipschitz.constant` covers more models; here whatever lies between two activations is one
    matrix, so strided and grouped convolutions are covered, and norms of convolutions are exact.

    Args:
      f: the model, (b, *input) -> (b, *out) with independent rows: affine equations of any kind and
        elementwise activations of bounded slope (`slopes.py`), one after another.
      input_shape: (*input), without the batch axis.

    Returns:
      A scalar in the default float type, rounded up, all rounding counted: |f(x') - f(x)| <=
      constant |x' - x| for all x and x'. It is inf where the weights are not finite. Works under
      jit and vmap; not differentiable, which `multiplier_bound` is. Memory: 16 bytes for each entry
      of the layers' matrices (outputs x inputs, whatever the layer), 64 MiB for finding them, and
      for the tighter bounds a few matrices (n, n) for each layer.

    Raises:
      UnsupportedEquation: an equation is neither affine nor such an activation, or joins values
        from before and behind one (residual connections: use `lipschitz.constant`).
      MixedRows: an example's output depends on other examples.
    """
    return _bound(f, input_shape, _product)


def liplt_bound(f: Model, input_shape: tuple[int, ...]) -> Array:
    """Proves an upper bound on the L2 Lipschitz constant of f: LipLT, never above the product.

    Every activation is a linear part m z and a remainder with slopes within -r and r; the norms
    of the products of layers between two remainders are added up (Fazlyab, Entesari, Roy and
    Chellappa, NeurIPS 2023). Arguments, results and errors as for `product_bound`.
    """
    return _bound(f, input_shape, _liplt)


def eclipse_bound(f: Model, input_shape: tuple[int, ...]) -> Array:
    """Proves an upper bound on the L2 Lipschitz constant of f: ECLipsE-Fast.

    One ellipsoid after another holds the differences of hidden values (`ellipsoids.py`), with one
    multiplier for each layer in closed form (Xu and Sivaranjani, NeurIPS 2024), here for
    any intervals of slopes. Arguments, results and errors as for `product_bound`; never above it.
    """
    return _bound(f, input_shape, _eclipse)


def lipsdp_bound(
    f: Model, input_shape: tuple[int, ...], *, steps: int = 200, learning_rate: float = 0.1
) -> Array:
    """Proves an upper bound on the L2 Lipschitz constant of f: LipSDP by gradient descent.

    As `eclipse_bound`, with a multiplier for each neuron, found by `steps` of Adam from those of
    ECLipsE-Fast. All iterates are feasible, the best is taken, and its bound is proved anew with
    rounding counted. The best possible multipliers give LipSDP-Neuron (Fazlyab et al., NeurIPS
    2019). Arguments, results and errors as for `product_bound`; never above it. Time: a step costs
    an eigenvalue decomposition and a few products of (n, n) matrices for each layer.
    """
    require_search(steps, learning_rate)
    return _bound(f, input_shape, functools.partial(_lipsdp, steps=steps, rate=learning_rate))


def _bound(f: Model, input_shape: tuple[int, ...], estimate: Estimate) -> Array:
    dtype = jnp.dtype(jnp.result_type(float))
    arrays, structure = split(f, jax.ShapeDtypeStruct((2, *input_shape), dtype))
    net = Net(structure, tuple(input_shape), dtype, uses_float64(), rules())
    with jax.enable_x64(True):
        layers, slopes = layers_and_slopes(net, ieee_float64(arrays))
        return rounded_up(estimate(layers, slopes), dtype)


@dataclasses.dataclass(frozen=True)
class Net:
    """What the layers of a model depend on beside its arrays.

    Attributes:
      shape: of one input.
      dtype: of inputs.
      mode: whether the caller is in JAX's x64 mode.
      rules: those of interval arithmetic; one that is registered later compiles anew.
    """

    structure: Structure
    shape: tuple[int, ...]
    dtype: Any
    mode: bool
    rules: tuple[Any, ...]

    def traced(self, arrays: list[Any]) -> Traced:
        """The graph for two examples, always the same one."""
        return trace_float64(self.structure, arrays, (2, *self.shape), self.dtype, self.mode)


def rules() -> tuple[Any, ...]:
    """All that can be registered."""
    return (*RULES.items(), *PLANES.items())


@functools.partial(jax.jit, static_argnums=0)
def layers_and_slopes(net: Net, arrays: list[Any]) -> tuple[list[Layer], list[Slopes]]:
    """The layers of a model, and the slopes (n,) between them anywhere."""
    with jax.enable_x64(True):
        chain = cut(net.traced(arrays))
        slopes = slopes_of(chain, stored_weights(chain.graph), None)
        both_rows = [(jnp.min(least, 0), jnp.max(most, 0)) for least, most in slopes]
        return [ellipsoids.layer(*pair) for pair in matrices(chain)], both_rows


@jax.jit
def _product(layers: list[Layer], slopes: list[Slopes]) -> Array:
    with jax.enable_x64(True):
        return layerwise.product_of_norms(layers, slopes)


@jax.jit
def _liplt(layers: list[Layer], slopes: list[Slopes]) -> Array:
    with jax.enable_x64(True):
        product = layerwise.product_of_norms(layers, slopes)
        return jnp.minimum(layerwise.liplt(layers, slopes), product)


def _eclipse(layers: list[Layer], slopes: list[Slopes]) -> Array:
    return _lipsdp(layers, slopes, steps=0, rate=0.0)


@functools.partial(jax.jit, static_argnames=("steps", "rate"))
def _lipsdp(layers: list[Layer], slopes: list[Slopes], *, steps: int, rate: float) -> Array:
    with jax.enable_x64(True):
        return norm_constant(layers, slopes, steps, rate)


def norm_constant(layers: list[Layer], slopes: list[Slopes], steps: int, rate: float) -> Array:
    """The least proved bound on the constant."""
    product = layerwise.product_of_norms(layers, slopes)
    if not layers:
        return product
    plain = [layer.matrix for layer in layers]
    found = ellipsoids.optimised(
        plain, slopes, ellipsoids.start(plain, slopes), ellipsoids.norm_goal, steps, rate
    )
    _, scales = ellipsoids.recursion(plain, slopes, found)
    root = ellipsoids.root_norm(ellipsoids.output_bound(layers, slopes, scales))
    bound = ellipsoids.product([root, *(layer.scale for layer in layers)])
    return jnp.fmin(bound, product)


# --- for training: not a proof --------------------------------------------------------------------


def layer_matrices(f: Model, input_shape: tuple[int, ...]) -> list[Array]:
    """The matrices (n, d) of a model's affine parts, from input to output; NOT a proof.

    In the model's own float type, and differentiable in its weights, for `multiplier_bound`.
    Arguments, memory and errors as for `product_bound`.
    """
    arrays, structure = split(f, jax.ShapeDtypeStruct((2, *input_shape), jnp.result_type(float)))
    return _plain(arrays, structure, tuple(input_shape), uses_float64())


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _plain(
    arrays: list[Any], structure: Structure, shape: tuple[int, ...], mode: bool
) -> list[Array]:
    dtype = jnp.float64 if mode else jnp.float32
    return plain_matrices(cut(trace_rows(structure.build(arrays), (2, *shape), dtype)))


def multiplier_bound(
    matrices: Sequence[Array],
    multipliers: Multipliers | None = None,
    *,
    slopes: Sequence[Slopes] | None = None,
) -> Array:
    """The Lipschitz constant that multipliers give for a chain of layers; NOT a proof.

    In exact arithmetic any multipliers give an upper bound; this one is computed in the type of the
    matrices, without counting rounding. It is differentiable in matrices and multipliers alike, so
    that it can be a term of a training loss, with the multipliers trained along. Pure: works under
    jit, vmap and grad.

    Args:
      matrices: (n_i, n_{i-1}) each, such as the transposes of Flax kernels or `layer_matrices`.
      multipliers: from `fast_multipliers` or trained; ECLipsE-Fast's by default.
      slopes: the least and the greatest slope, (n_i,) each, of what is applied behind every matrix
        but the last; relu's by default.

    Example:
      >>> matrices = [jnp.array([[1.0], [-1.0]]), jnp.array([[1.0, 1.0]])]
      >>> print(multiplier_bound(matrices).round(3))
      1.414
    """
    slopes = _relus(matrices) if slopes is None else slopes
    multipliers = fast_multipliers(matrices, slopes=slopes) if multipliers is None else multipliers
    return jnp.exp(ellipsoids.norm_goal(ellipsoids.recursion(matrices, slopes, multipliers)[0]))


def fast_multipliers(
    matrices: Sequence[Array], *, slopes: Sequence[Slopes] | None = None
) -> Multipliers:
    """The multipliers of ECLipsE-Fast, as parameters to start a search or training from.

    Arguments as for `multiplier_bound`.
    """
    slopes = _relus(matrices) if slopes is None else slopes
    return jax.lax.stop_gradient(ellipsoids.start(matrices, slopes))


def _relus(matrices: Sequence[Array]) -> list[Slopes]:
    sizes = [(matrix.shape[0], matrix.dtype) for matrix in matrices[:-1]]
    return [(jnp.zeros(n, dtype), jnp.ones(n, dtype)) for n, dtype in sizes]


def require_search(steps: int, learning_rate: float) -> None:
    """Check the arguments of a search for multipliers."""
    if steps < 0 or not learning_rate > 0:
        raise ValueError(
            f"steps must be at least 0 and learning_rate above 0, got {steps} and {learning_rate}"
        )
