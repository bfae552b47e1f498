"""Losses that make the margins of a net large next to its Lipschitz constant.

offset_cross_entropy          cross-entropy after a fixed handicap (AOL; tau-CE without handicap)
hinge_kantorovich_rubinstein  a hinge and an optimal transport term, one class against the rest
certificate_regularisation    cross-entropy minus a multiple of the certified radius
gloro, gloro_trades           an extra class that wins where the radius eps is not certified
emma                          cross-entropy of the logits at the worst of the ball, all classes
logit_annealing               offset cross-entropy that lets go of examples of large margin
emma_logits, pair_constants   parts of the above

All are pure functions of logits (b, k) and integer labels (b,) and return one loss per example
(b,), in the logits' float type; the caller takes the mean. All go through `jit`, `vmap` and `grad`,
with finite gradients wherever the logits are finite. They train, and prove nothing: certify the
trained net with `lipschitz.certify`. The formulas are those of the papers and of their authors'
code; where they differ from either, it is said.

Units. A map x -> logits of Lipschitz constant L keeps its prediction y within the L2 distance eps
if f_y - f_j > sqrt(2) L eps for all j, so sqrt(2) L eps is what a radius of eps costs in logits.
With the rows w of a last dense layer and the constant L of what comes before it, the price of class
j is K_yj eps with K_yj = L ||w_y - w_j|| (see `pair_constants`), never more.

A label outside of 0, ..., k - 1 is an error where its value is known, and a loss of NaN where it is
traced.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxcert.training.losses.checks import (
    checked,
    described,
    is_array_of,
    one_hot,
    per_example,
    require_frequencies,
    require_pair_constants,
    scalar,
)

Array: TypeAlias = jax.Array


def offset_cross_entropy(logits: Any, labels: Any, *, offset: Any, temperature: Any) -> Array:
    """Cross-entropy that the label's class must win with a handicap of `offset` logits.

    The loss is T CE((f(x) - u e_y) / T, y) with the offset u and the temperature T (Prach and
    Lampert, ECCV 2022, with the AOL layers). u = sqrt(2) L eps makes radii of eps its aim; Prach,
    Brau, Buttazzo and Lampert (CVPR 2024) take twice that, u = 2 sqrt(2) L eps, and T = 1/4. The
    smaller T, the less examples with a margin above u count, and the closer the loss is to
    max over j != y of (f_j - f_y + u)_+.

    `offset=0.0, temperature=1 / tau` is the tau-cross-entropy CE(tau f(x), y) / tau of Bethune et
    al. (NeurIPS 2022); `offset=0.0, temperature=1.0` is the plain one.

    Args:
      logits: float (b, k), k >= 2.
      labels: int (b,).
      offset: u in logits, a scalar or one per example (b,).
      temperature: T in logits, a scalar above 0.

    Returns:
      Losses (b,), at least 0.

    Raises:
      TypeError: logits that are not floating point, labels that are not integers.
      ValueError: shapes that do not fit, a label that is no class, a temperature not above 0.

    Example:
      >>> logits, labels = jnp.array([[2.0, 0.0], [0.5, 0.0]]), jnp.array([0, 0])
      >>> with jnp.printoptions(precision=4):
      ...     print(offset_cross_entropy(logits, labels, offset=0.5, temperature=0.25))
      [0.0006 0.1733]
    """
    logits, own = checked(logits, labels)
    temperature = scalar(temperature, "temperature", logits, above=True)
    handicap = jnp.where(own, per_example(offset, "offset", logits), 0)
    return temperature * jax.nn.softplus(_excess((logits - handicap) / temperature, own))


def logit_annealing(
    logits: Any, labels: Any, *, offset: Any = 2.0, temperature: Any = 0.75, beta: Any = 5.0
) -> Array:
    """Offset cross-entropy whose gradient fades where the margin is large: capacity for the others.

    The loss is -T (1 - p)^beta log p, where p = softmax((f(x) - xi e_y) / T)_y with the offset xi
    (Lai, Huang, Kung and Chen, ICML 2025). The defaults are those of the authors' code, for nets of
    Lipschitz constant about 1. Where not all of the net is built with its constant, they pass
    `emma_logits(...)` as the logits, which keeps the rest of it small.

    Args:
      logits: float (b, k), k >= 2.
      labels: int (b,).
      offset: xi in logits, a scalar or one per example (b,).
      temperature: T in logits, a scalar above 0.
      beta: a scalar, 0 or more; 0 is `offset_cross_entropy`.

    Returns:
      Losses (b,), at least 0. Raises as `offset_cross_entropy`.

    Example:
      >>> logits, labels = jnp.array([[4.0, 0.0], [2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 0, 0])
      >>> with jnp.printoptions(precision=4, suppress=True):
      ...     print(logit_annealing(logits, labels))
      [0.     0.0162 1.4654]
    """
    logits, own = checked(logits, labels)
    temperature = scalar(temperature, "temperature", logits, above=True)
    beta = scalar(beta, "beta", logits)
    handicap = jnp.where(own, per_example(offset, "offset", logits), 0)
    excess = _excess((logits - handicap) / temperature, own)
    # With s the excess, -log p = softplus(s) and log(1 - p) = log_sigmoid(s).
    return temperature * jnp.exp(beta * jax.nn.log_sigmoid(excess)) * jax.nn.softplus(excess)


def hinge_kantorovich_rubinstein(
    logits: Any, labels: Any, *, margin: Any, alpha: Any, class_frequencies: Any = None
) -> Array:
    """Separates each class from the rest as far as optimal transport can, with a margin (HKR).

    For nets of Lipschitz constant 1. With s_j = 1 for the label's class, -1 for the others, and the
    share p_j of class j in the data, the loss is alpha hinge - (1 - alpha) transport:

      hinge     = 1/k sum_j c_j (margin / 2 - s_j f_j)_+  with c_j = k - 1 for the label, else 1
      transport = 1/k (f_y / p_y - sum over j != y of f_j / (1 - p_j))

    The mean of the second over the data is the mean over the classes j of
    E[f_j | j] - E[f_j | not j], each at most the Wasserstein-1 distance of class j from the rest.
    After Serrurier et al. (CVPR 2021); the weights c_j, margin / 2, and alpha in place of
    lambda = alpha / (1 - alpha) are those of the authors' library deel-torchlip. The loss has no
    lower bound unless the net's constant is bounded.

    Args:
      logits: float (b, k), k >= 2.
      labels: int (b,).
      margin: what f_y - f_j shall be, in logits: sqrt(2) L eps for a radius of eps. A scalar.
      alpha: weight of the hinge, a scalar in [0, 1]; close to 1 is accurate, close to 0 robust.
      class_frequencies: the p_j, (k,), in (0, 1). By default those of this batch, as in
        deel-torchlip: then the losses of a batch depend on each other, and change with the size
        and the sharding of the batch.

    Returns:
      Losses (b,), of either sign.

    Raises:
      TypeError, ValueError: as `offset_cross_entropy`; an alpha or frequencies out of range.

    Example:
      >>> logits, labels = jnp.array([[1.0, -1.0], [0.5, 0.0]]), jnp.array([0, 1])
      >>> print(hinge_kantorovich_rubinstein(logits, labels, margin=1.0, alpha=0.75))
      [-0.5     0.6875]
    """
    logits, own = checked(logits, labels)
    b, k = logits.shape
    margin = scalar(margin, "margin", logits)
    alpha = scalar(alpha, "alpha", logits, most=1.0)
    if class_frequencies is None:
        inside = jnp.sum(own, axis=0, dtype=jnp.int32)  # a class may miss, or be alone
        rest = jnp.maximum(b - inside, 1).astype(logits.dtype)
        towards, away = b / jnp.maximum(inside, 1).astype(logits.dtype), b / rest
    else:
        require_frequencies(class_frequencies, k)
        share = jnp.asarray(class_frequencies, logits.dtype)
        towards, away = 1 / share, 1 / (1 - share)
    hinge = jax.nn.relu(margin / 2 - jnp.where(own, logits, -logits))
    hinge = jnp.where(own, (k - 1) * hinge, hinge)
    transport = logits * jnp.where(own, towards[None], -away[None])
    losses = jnp.mean(alpha * hinge - (1 - alpha) * transport, axis=1)
    return jnp.where(jnp.any(own, axis=1), losses, jnp.nan)


def certificate_regularisation(
    logits: Any, labels: Any, *, gamma: Any, pair_constants: Any
) -> Array:
    """Cross-entropy minus gamma times the certified radius of what is classified correctly.

    The loss is CE(f(x), y) - gamma (min over j != y of (f_y - f_j) / K_yj)_+ (Singla, Singla and
    Feizi, ICLR 2022; form and sign as in the authors' code). It has no lower bound unless the net's
    constant is bounded. Gradients go through the constants as well.

    Args:
      logits: float (b, k), k >= 2.
      labels: int (b,).
      gamma: logits per unit of radius, a scalar, 0 or more.
      pair_constants: K_yj, Lipschitz constants of f_y - f_j, 0 or more: a scalar for all pairs
        (sqrt(2) L for nets of constant L), (k, k) by label and class, or (b, 1, k) for constants of
        each example's own, with label y. A class with K_yj = 0 limits no radius; a radius that
        nothing limits counts as 0.

    Returns:
      Losses (b,), of either sign.

    Raises:
      TypeError, ValueError: as `offset_cross_entropy`; a negative gamma or constant.

    Example:
      >>> logits, labels = jnp.array([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]]), jnp.array([0, 0])
      >>> with jnp.printoptions(precision=4):
      ...     print(certificate_regularisation(logits, labels, gamma=0.1, pair_constants=2.0))
      [0.3576 1.5514]
    """
    logits, own = checked(logits, labels)
    gamma = scalar(gamma, "gamma", logits)
    constants = _rows(pair_constants, own, logits)
    margins = _label_logits(logits, own)[:, None] - logits
    limits = constants > 0
    radii = jnp.where(limits, margins / jnp.where(limits, constants, 1), jnp.inf)
    radius = jnp.min(radii, axis=1)
    radius = jnp.where(jnp.isfinite(radius), radius, 0)
    return jax.nn.softplus(_excess(logits, own)) - gamma * jax.nn.relu(radius)


def gloro(logits: Any, labels: Any, *, eps: Any, pair_constants: Any) -> Array:
    """Cross-entropy with a further class that wins wherever the radius eps is not certified.

    With the predicted class p, the loss is CE((f_1, ..., f_k, bottom), y) where
    bottom = max over j != p of f_j + eps K_pj: what the strongest rival may reach, relative to f_p,
    at a distance of eps (Leino, Wang and Fredrikson, ICML 2021). The label has the largest
    probability exactly if the prediction is right and its radius above eps. Gradients go through
    the constants, which keeps them small.

    Deviation: at a tie for the largest logit the authors' code ignores all tied classes in the
    maximum, and so certifies a point on the decision boundary; here the first of them is p, and the
    others are its rivals.

    Args:
      logits: float (b, k), k >= 2.
      labels: int (b,).
      eps: the L2 radius to train for, in the units of the input, a scalar or one per example (b,).
      pair_constants: K_pj, as in `certificate_regularisation`; a (b, 1, k) array belongs to the
        predicted class p, not to the label.

    Returns:
      Losses (b,), at least 0.

    Raises:
      TypeError, ValueError: as `offset_cross_entropy`; a negative eps or constant.

    Example:
      >>> logits, labels = jnp.array([[3.0, 0.0, 1.0], [3.0, 0.0, 1.0]]), jnp.array([0, 1])
      >>> with jnp.printoptions(precision=4):
      ...     print(gloro(logits, labels, eps=0.5, pair_constants=2.0))
      [0.4402 3.4402]
    """
    logits, own = checked(logits, labels)
    rivals = jax.nn.logsumexp(logits, axis=1, where=~own)
    rivals = jnp.logaddexp(rivals, _bottom(logits, eps, pair_constants))
    return jax.nn.softplus(rivals - _label_logits(logits, own))


def gloro_trades(logits: Any, labels: Any, *, eps: Any, pair_constants: Any, weight: Any) -> Array:
    """Cross-entropy for accuracy plus, for robustness, a penalty on `gloro`'s further class.

    The loss is CE(f(x), y) + weight KL(softmax(f) || softmax(f, bottom)), after TRADES (Zhang et
    al., ICML 2019), with bottom as in `gloro` and probability 0 for it on the left (Leino, Wang and
    Fredrikson, ICML 2021). All classes share one ratio of probabilities, so the divergence is
    softplus(bottom - logsumexp(f)).

    Args:
      logits: float (b, k), k >= 2.
      labels: int (b,).
      eps: the L2 radius to train for, as in `gloro`.
      pair_constants: K_pj, as in `gloro`.
      weight: of the second term, a scalar, 0 or more.

    Returns:
      Losses (b,), at least 0. Raises as `gloro`.

    Example:
      >>> logits, labels = jnp.array([[3.0, 0.0, 1.0]]), jnp.array([0])
      >>> with jnp.printoptions(precision=4):
      ...     print(gloro_trades(logits, labels, eps=0.5, pair_constants=2.0, weight=1.5))
      [0.5754]
    """
    logits, own = checked(logits, labels)
    weight = scalar(weight, "weight", logits)
    bottom = _bottom(logits, eps, pair_constants)
    divergence = jax.nn.softplus(bottom - jax.nn.logsumexp(logits, axis=1))
    return jax.nn.softplus(_excess(logits, own)) + weight * divergence


def emma(logits: Any, labels: Any, *, eps: Any, pair_constants: Any, least: Any = 0.01) -> Array:
    """Cross-entropy of the logits that each class may reach within eps: all rivals at once (EMMA).

    The loss is CE(`emma_logits`, y) (Hu, Zou, Wang, Leino and Fredrikson, NeurIPS 2023, efficient
    margin maximisation). `gloro` raises the strongest rival alone, and which one that is changes
    from step to step.

    Args:
      logits: float (b, k), k >= 2.
      labels: int (b,).
      eps: the L2 radius to train for, as in `gloro`.
      pair_constants: K_yj with the label y, as in `certificate_regularisation`.
      least: see `emma_logits`.

    Returns:
      Losses (b,), at least 0. Raises as `gloro`.

    Example:
      >>> logits, labels = jnp.array([[3.0, 0.0, 2.5], [0.0, 1.0, 0.0]]), jnp.array([0, 0])
      >>> with jnp.printoptions(precision=4):
      ...     print(emma(logits, labels, eps=0.5, pair_constants=2.0))
      [0.7586 1.5593]
    """
    raised = emma_logits(logits, labels, eps=eps, pair_constants=pair_constants, least=least)
    return jax.nn.softplus(_excess(*checked(raised, labels)))


def emma_logits(
    logits: Any, labels: Any, *, eps: Any, pair_constants: Any, least: Any = 0.01
) -> Array:
    """The logits f_j + eps_j K_yj that rivals may reach at a distance of eps_j <= eps, (b, k).

    eps_j = clip((f_y - f_j) / K_yj, least eps, eps): no further than class j needs to draw level
    with the label y. It is a constant for gradients, which go through f_j and K_yj (Hu et al.,
    NeurIPS 2023; the least share, 0.01, is in the authors' code). f_y itself stays.

    Args:
      logits: float (b, k), k >= 2.
      labels: int (b,).
      eps: the L2 radius to train for, as in `gloro`.
      pair_constants: K_yj with the label y, as in `certificate_regularisation`.
      least: smallest share of eps that a rival gets, a scalar in [0, 1]: what is misclassified
        still pushes the constants down.

    Returns:
      Logits (b, k), for `emma` or in place of the logits of `logit_annealing`. Raises as `gloro`.

    Example:
      >>> logits, labels = jnp.array([[3.0, 0.0, 2.5], [0.0, 1.0, 0.0]]), jnp.array([0, 0])
      >>> print(emma_logits(logits, labels, eps=0.5, pair_constants=2.0))
      [[3.   1.   3.  ]
       [0.   1.01 0.01]]
    """
    logits, own = checked(logits, labels)
    least = scalar(least, "least", logits, most=1.0)
    reach = per_example(eps, "eps", logits, least=0.0) * _rows(pair_constants, own, logits)
    margins = _label_logits(logits, own)[:, None] - logits
    share = margins / jnp.maximum(reach, jnp.finfo(logits.dtype).tiny)
    return logits + jax.lax.stop_gradient(jnp.clip(share, least, 1)) * reach


def pair_constants(kernel: Any, backbone_constant: Any) -> Array:
    """K_ij = L ||w_i - w_j|| for all classes of a last dense layer: constants of f_i - f_j, (k, k).

    For losses: in the float type of the kernel, without its rounding. Differentiable in both
    arguments, also where two columns are equal (gradient 0). Memory: k (k + 16 d) floats.

    Args:
      kernel: float (d, k), as in Flax: column j gives logit j.
      backbone_constant: L, a scalar: Lipschitz constant of the net up to this layer's input.

    Raises:
      TypeError, ValueError: a kernel that is not a floating point (d, k).

    Example:
      >>> print(pair_constants(jnp.array([[3.0, 0.0], [0.0, 4.0]]), 2.0))
      [[ 0. 10.]
       [10.  0.]]
    """
    if not is_array_of(jnp.floating, kernel):
        raise TypeError(f"kernel must be a floating point array (d, k), got {described(kernel)}")
    if jnp.ndim(kernel) != 2:
        raise ValueError(f"kernel must have shape (d, k), got {jnp.shape(kernel)}")
    kernel = jnp.asarray(kernel)
    return scalar(backbone_constant, "backbone_constant", kernel) * _distances(kernel)


@jax.custom_jvp
@jax.jit
def _distances(kernel: Array) -> Array:
    rows = kernel.T
    return jax.lax.map(lambda row: jnp.linalg.norm(rows - row[None], axis=1), rows, batch_size=16)


@_distances.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # D_ij moves by <w_i - w_j, v_i - v_j> / D_ij = (A_ii + A_jj - A_ij - A_ji) / D_ij, A = W' V:
    # by products, since a backward pass through the differences would keep k^2 d of them.
    (kernel,), (moved,) = primals, tangents
    distances = _distances(kernel)
    products = jnp.matmul(kernel.T, moved, precision=jax.lax.Precision.HIGHEST)
    own = jnp.diagonal(products)
    along = own[:, None] + own[None] - products - products.T
    apart = distances > 0
    return distances, jnp.where(apart, along / jnp.where(apart, distances, 1), 0)


# --- parts ----------------------------------------------------------------------------------------

# Cross-entropy is -log p_y = log(1 + sum over j != y of exp(f_j - f_y)) = softplus(s) with the
# excess s = logsumexp over j != y of f_j, minus f_y. So written, it and its gradient keep their
# relative precision at large margins, where log p_y rounds to 0.


def _excess(logits: Array, own: Array) -> Array:
    rivals = jax.nn.logsumexp(logits, axis=1, where=~own)
    return rivals - _label_logits(logits, own)


def _label_logits(logits: Array, own: Array) -> Array:
    """f_y, or NaN where the label is no class."""
    value = jnp.sum(jnp.where(own, logits, 0), axis=1)
    return jnp.where(jnp.any(own, axis=1), value, jnp.nan)


def _bottom(logits: Array, eps: Any, pair_constants: Any) -> Array:
    """The logit of `gloro`'s further class, (b,)."""
    predicted = one_hot(jnp.argmax(logits, axis=1), logits.shape[1])
    reach = per_example(eps, "eps", logits, least=0.0) * _rows(pair_constants, predicted, logits)
    return jnp.max(jnp.where(predicted, -jnp.inf, logits + reach), axis=1)


def _rows(constants: Any, own: Array, logits: Array) -> Array:
    """K_yj for every example's class y, (b, k), and 0 for j = y."""
    require_pair_constants(constants, logits)
    constants = jnp.asarray(constants, logits.dtype)
    if constants.ndim == 2:
        constants = constants[jnp.argmax(own, axis=1)]
    elif constants.ndim == 3:
        constants = constants[:, 0]
    return jnp.where(own, 0, constants)
