"""Metrics: what a data set's certificates add up to.

All functions take a `Certificate` or `Results` with one row per image, and the true labels. An
image is correct if its prediction is its label; an abstention never is. Radii are compared in
float64, without a tolerance: certified radii are rounded down already.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from jaxcert.certificate import ABSTAIN, Certificate
from jaxcert.evaluate.results import Results

Certificates: TypeAlias = Certificate | Results


def certified_accuracy(certificates: Certificates, labels: Any, radii: Any) -> np.ndarray:
    """The fraction of images that are correct with a certified radius of at least r, for each r.

    At r = 0 that is the fraction of correct predictions, whether or not anything was proved about
    their neighbourhood: a deterministic certifier's radius of 0 counts. It falls with r.

    Args:
      certificates: m certificates.
      labels: int (m,).
      radii: r >= 0 in the norm of the certificates, any shape.

    Returns:
      float64, of the shape of `radii`.

    Raises:
      ValueError: no images, wrong lengths, negative labels, NaN or negative radii.
    """
    return _counts(certificates, labels, radii) / len(certificates.prediction)


def accuracy_interval(
    certificates: Certificates, labels: Any, radii: Any, *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Clopper-Pearson interval of the certified accuracy, for images drawn independently.

    With probability at least `level` over the draw of the m images, for each r by itself, it holds
    the probability that a new image is correct with a certified radius of at least r.

    Args:
      certificates, labels, radii: as for `certified_accuracy`.
      level: coverage, in (0, 1).

    Returns:
      (lower, upper), each of the shape of `radii`.
    """
    return clopper_pearson(
        _counts(certificates, labels, radii), len(certificates.prediction), level=level
    )


def clopper_pearson(k: Any, m: int, *, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The (lower, upper) ends of the exact interval for k successes in m draws, elementwise."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}; 0.95 is usual")
    from scipy.special import betaincinv

    # P(Binomial(m, p) >= k) = I_p(k, m - k + 1), and the lower end is the p at which that is
    # (1 - level) / 2; the upper end mirrors it. k = 0 and k = m have an open side.
    k, tail = np.asarray(k), (1 - level) / 2
    lower = np.where(k == 0, 0.0, betaincinv(np.maximum(k, 1), m - k + 1, tail))
    upper = np.where(k == m, 1.0, betaincinv(k + 1, np.maximum(m - k, 1), 1 - tail))
    return lower, upper


# High-probability certified accuracy (Cohen, Rosenfeld & Kolter 2019, appendix).
#
# Let E_i = 1 if the certificate of image i is wrong about the smoothed classifier. Over the noise,
# P(E_i = 1) <= alpha, and the E_i are independent if the noise of different images is. An image
# counted as certified at r but not truly robust there has E_i = 1, so for all r at once
#
#     true accuracy(r) >= certified accuracy(r) - (1/m) sum_i E_i .
#
# The sum grows, in distribution, with each P(E_i = 1), so take all equal to alpha: a binomial sum.
# Its exact quantile is `binomial_failures`. Bernstein's inequality for |E_i - alpha| <= 1 with
# variance v = m alpha (1 - alpha) is
#
#     P(sum_i (E_i - alpha) > sqrt(2 v L) + L / 3) <= exp(-L),    L = ln(1 / rho),
#
# and dividing by m gives `bernstein_failures`. Published plotting code leaves out the 2 under the
# root; that is no bound: at m = 10,000 and alpha = rho = 0.001 it fails with probability 0.0016.


def bernstein_failures(m: int, alpha: float, rho: float) -> float:
    """A fraction of m independent certificates exceeded by wrong ones with probability <= rho.

    alpha + sqrt(2 alpha (1 - alpha) ln(1/rho) / m) + ln(1/rho) / (3m), by Bernstein's inequality.
    """
    log = math.log(1 / rho)
    return alpha + math.sqrt(2 * alpha * (1 - alpha) * log / m) + log / (3 * m)


def binomial_failures(m: int, alpha: float, rho: float) -> float:
    """As `bernstein_failures`, by the exact binomial quantile, and so never larger."""
    from scipy.stats import binom

    return float(binom.isf(rho, m, alpha)) / m


def high_probability_accuracy(
    certificates: Certificates,
    labels: Any,
    radii: Any,
    *,
    rho: float = 0.001,
    alpha: float | None = None,
    failures: Callable[[int, float, float], float] = bernstein_failures,
) -> np.ndarray:
    """What the true certified accuracy on these images exceeds with probability 1 - rho, at all r.

    True means: of the smoothed classifier itself, although each certificate may be wrong with
    probability alpha. The probability is over the noise, which must be independent between images:
    with shared noise this is not a bound. Proofs (alpha = 0) never fail, so nothing is taken off.

    Args:
      certificates, labels, radii: as for `certified_accuracy`.
      rho: failure probability of the statement.
      alpha: failure probability of each certificate; default: 1 minus the smallest confidence.
      failures: `bernstein_failures`, as in the literature, or the sharper `binomial_failures`.

    Returns:
      float64 of the shape of `radii`, at least 0.
    """
    if not 0 < rho < 1:
        raise ValueError(f"rho must lie between 0 and 1, got {rho}; 0.001 is usual")
    if getattr(certificates, "post_hoc", False):
        raise ValueError(
            "these certificates are post hoc: their confidence bounds nothing, so neither does this"
        )
    accuracy = certified_accuracy(certificates, labels, radii)
    alpha = _failure_probability(certificates) if alpha is None else alpha
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must lie in [0, 1), got {alpha}")
    if alpha == 0:
        return accuracy
    return np.maximum(accuracy - failures(len(certificates.prediction), alpha, rho), 0.0)


def average_certified_radius(certificates: Certificates, labels: Any) -> float:
    """mean(correct * radius), in the unit of the radii (Zhai et al., MACER, ICLR 2020).

    It is the area under the curve of the certified accuracy.
    """
    return float(np.mean(np.where(_correct(certificates, labels), _radius(certificates), 0.0)))


def clean_accuracy(certificates: Certificates, labels: Any) -> float:
    """mean(correct): the accuracy of the certified classifier, abstentions counted as wrong."""
    return float(np.mean(_correct(certificates, labels)))


def abstention_rate(certificates: Certificates) -> float:
    """The fraction of images for which nothing was predicted."""
    return float(np.mean(_prediction(certificates) == ABSTAIN))


def _counts(certificates: Certificates, labels: Any, radii: Any) -> np.ndarray:
    """How many images are certified correct at each r, int of the shape of `radii`."""
    radii = np.asarray(radii, np.float64)
    if not np.all(radii >= 0):
        raise ValueError(f"radii must be >= 0 and not NaN, got {radii.min()}")
    certified = np.sort(_radius(certificates)[_correct(certificates, labels)])
    return len(certified) - np.searchsorted(certified, radii, side="left")


def _correct(certificates: Certificates, labels: Any) -> np.ndarray:
    prediction, labels = _prediction(certificates), np.asarray(labels)
    if labels.shape != prediction.shape or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be integers of shape {prediction.shape}, one per certificate; "
            f"got {labels.dtype}{labels.shape}"
        )
    if labels.min() < 0:
        raise ValueError(f"labels must be >= 0, got {labels.min()}; {ABSTAIN} is an abstention")
    return prediction == labels


def _prediction(certificates: Certificates) -> np.ndarray:
    prediction = np.asarray(certificates.prediction)
    if prediction.ndim != 1 or prediction.size == 0:
        raise ValueError(
            f"metrics need one certificate per image, (m,) with m >= 1; got {prediction.shape}"
        )
    return prediction


def _radius(certificates: Certificates) -> np.ndarray:
    radius = np.asarray(certificates.radius, np.float64)
    if radius.shape != np.shape(certificates.prediction):
        raise ValueError(
            f"radius {radius.shape} and prediction {np.shape(certificates.prediction)} must have "
            "one entry per image"
        )
    if not np.all(np.isfinite(radius) & (radius >= 0)):
        raise ValueError(
            "certified radii must be finite and >= 0; make certificates with "
            "jaxcert.certificate.issue, which turns other radii into 0"
        )
    return radius


def _failure_probability(certificates: Certificates) -> float:
    return 1.0 - float(np.min(np.asarray(certificates.confidence, np.float64)))
