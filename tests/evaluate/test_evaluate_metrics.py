"""Metrics against hand counts, scipy.stats and simulation; the published tables from their logs."""

import dataclasses
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from jaxcert import evaluate
from jaxcert.certificate import ABSTAIN, Certificate, issue
from jaxcert.evaluate.metrics import clopper_pearson

# Five images: correct at 0.5 and 0, wrong with a large radius, an abstention, correct at 1.
LABELS = np.array([0, 1, 2, 0, 1])
CERTIFICATE = issue(
    jnp.array([0, 1, 0, ABSTAIN, 1]), jnp.array([0.5, 0.0, 9.0, 9.0, 1.0]), norm=2.0
)


def certificate(prediction, radius, confidence=1.0):
    prediction = np.asarray(prediction)
    confidence = np.full(prediction.shape, confidence)
    return Certificate(prediction, np.asarray(radius), confidence, 2.0)


@pytest.mark.parametrize(
    ("r", "value"), [(0, 0.6), (1e-9, 0.4), (0.5, 0.4), (0.5000001, 0.2), (1, 0.2), (1.5, 0.0)]
)
def test_certified_accuracy_by_hand(r, value):
    assert evaluate.certified_accuracy(CERTIFICATE, LABELS, r) == value


def test_the_other_metrics_by_hand():
    assert evaluate.clean_accuracy(CERTIFICATE, LABELS) == 0.6
    assert evaluate.average_certified_radius(CERTIFICATE, LABELS) == pytest.approx(0.3)
    assert evaluate.abstention_rate(CERTIFICATE) == 0.2


def test_radii_keep_their_shape():
    radii = np.array([[0.0, 0.5], [1.0, 2.0]])
    value = evaluate.certified_accuracy(CERTIFICATE, LABELS, radii)
    np.testing.assert_array_equal(value, [[0.6, 0.4], [0.2, 0.0]])
    assert value.dtype == np.float64
    assert np.shape(evaluate.certified_accuracy(CERTIFICATE, LABELS, [])) == (0,)


def test_radii_are_compared_in_float64():
    below, above = np.float32(0.7), np.float32(0.1)  # 0.7 rounds down to float32, 0.1 up
    one = certificate([0, 0], np.array([below, above]))
    assert evaluate.certified_accuracy(one, [0, 0], 0.7) == 0.0
    assert evaluate.certified_accuracy(one, [0, 0], float(below)) == 0.5
    assert evaluate.certified_accuracy(one, [0, 0], 0.1) == 1.0


def test_the_average_radius_is_the_area_under_the_curve():
    edges = np.linspace(0, 1.2, 12_001)
    middles = (edges[1:] + edges[:-1]) / 2
    area = np.mean(evaluate.certified_accuracy(CERTIFICATE, LABELS, middles)) * 1.2
    assert evaluate.average_certified_radius(CERTIFICATE, LABELS) == pytest.approx(area, abs=1e-4)


images = st.lists(
    st.tuples(st.integers(-1, 2), st.floats(0, 3), st.integers(0, 2)), min_size=1, max_size=30
)


@given(images, st.lists(st.floats(0, 4), min_size=1, max_size=9))
def test_accuracy_falls_with_r_and_lies_in_its_interval(rows, radii):
    prediction, radius, labels = (np.array(column) for column in zip(*rows, strict=True))
    given_ = certificate(prediction, radius)
    radii = np.sort(radii)
    value = evaluate.certified_accuracy(given_, labels, radii)
    brute = [np.mean((prediction == labels) & (radius >= r)) for r in radii]
    np.testing.assert_array_equal(value, brute)
    assert (np.diff(value) <= 0).all()
    assert (value <= evaluate.clean_accuracy(given_, labels)).all()
    lower, upper = evaluate.accuracy_interval(given_, labels, radii)
    wide_lower, wide_upper = evaluate.accuracy_interval(given_, labels, radii, level=0.999)
    assert (lower <= value).all()
    assert (value <= upper).all()
    assert (wide_lower <= lower).all()
    assert (upper <= wide_upper).all()


@pytest.mark.parametrize("m", [1, 7, 500])
@pytest.mark.parametrize("level", [0.9, 0.999])
def test_the_interval_is_scipys(m, level):
    for k in {0, 1, m // 2, m - 1, m}:
        exact = scipy.stats.binomtest(k, m).proportion_ci(level, "exact")
        lower, upper = clopper_pearson(k, m, level=level)
        np.testing.assert_allclose((lower, upper), exact, rtol=1e-7)
        assert ((lower == 0), (upper == 1)) == (k == 0, k == m)
        if k > 0:
            tail = scipy.stats.binom.sf(k - 1, m, lower)
            assert tail == pytest.approx((1 - level) / 2, rel=1e-9)
        if k < m:
            tail = scipy.stats.binom.cdf(k, m, upper)
            assert tail == pytest.approx((1 - level) / 2, rel=1e-9)


def test_the_interval_covers_as_often_as_it_says():
    m, p, k = 60, 0.3, np.arange(61)
    lower, upper = clopper_pearson(k, m, level=0.9)
    covered = scipy.stats.binom.pmf(k, m, p)[(lower <= p) & (p <= upper)].sum()
    assert 0.9 <= covered < 0.96


def test_high_probability_accuracy_is_bernsteins_formula():
    m, alpha, rho = 500, 0.001, 0.002
    given_ = certificate(np.zeros(m, int), np.arange(m), 1 - alpha)
    log = math.log(1 / rho)
    for r in (0, 100, 499):
        expected = (m - r) / m - alpha
        expected -= math.sqrt(2 * alpha * (1 - alpha) * log / m) + log / (3 * m)
        value = evaluate.high_probability_accuracy(given_, np.zeros(m, int), r, rho=rho)
        assert value == pytest.approx(max(expected, 0), rel=1e-12)
        value = evaluate.high_probability_accuracy(
            given_, np.zeros(m, int), r, rho=rho, alpha=0.5, failures=lambda m, a, rho: a / 5
        )
        assert value == pytest.approx(max((m - r) / m - 0.1, 0), rel=1e-12)


def test_proofs_lose_nothing_to_probability():
    value = evaluate.high_probability_accuracy(CERTIFICATE, LABELS, [0, 0.5])
    np.testing.assert_array_equal(value, [0.6, 0.4])


@pytest.mark.parametrize("m", [1, 20, 500, 10_000])
@pytest.mark.parametrize("alpha", [1e-4, 1e-3, 0.05])
@pytest.mark.parametrize("rho", [1e-4, 1e-3, 0.05])
def test_wrong_certificates_exceed_the_allowance_with_probability_rho_at_most(m, alpha, rho):
    for failures in (evaluate.bernstein_failures, evaluate.binomial_failures):
        allowed = failures(m, alpha, rho)
        assert scipy.stats.binom.sf(math.floor(m * allowed + 1e-9), m, alpha) <= rho
    assert evaluate.binomial_failures(m, alpha, rho) <= evaluate.bernstein_failures(m, alpha, rho)


def test_the_formula_without_the_2_is_no_bound():
    m, alpha, rho = 10_000, 0.001, 0.001
    log = math.log(1 / rho)
    allowed = alpha + math.sqrt(alpha * (1 - alpha) * log / m) + log / (3 * m)
    assert scipy.stats.binom.sf(math.floor(m * allowed), m, alpha) > 1.5 * rho


NAN_RADIUS = certificate([0, 1], [0.1, math.nan])


@pytest.mark.parametrize(
    ("given_", "labels", "radii", "message"),
    [
        (CERTIFICATE, LABELS, -0.1, r"radii must be >= 0 and not NaN, got -0\.1"),
        (CERTIFICATE, LABELS, [0.1, math.nan], "radii must be >= 0 and not NaN, got nan"),
        (CERTIFICATE, LABELS[:3], 0, r"labels must be integers of shape \(5,\).*int64\(3,\)"),
        (CERTIFICATE, LABELS[:, None], 0, r"labels must be integers of shape \(5,\)"),
        (CERTIFICATE, LABELS.astype(float), 0, "got float64"),
        (CERTIFICATE, [0, 1, 2, -1, 1], 0, "labels must be >= 0, got -1; -1 is an abstention"),
        (NAN_RADIUS, [0, 1], 0, "certified radii must be finite and >= 0"),
        (certificate([0], [-1.0]), [0], 0, "certified radii must be finite and >= 0"),
        (certificate([0], [math.inf]), [0], 0, "certified radii must be finite and >= 0"),
        (certificate([0, 1], [1.0]), [0, 1], 0, "one entry per image"),
        (certificate(np.zeros(0, int), []), np.zeros(0, int), 0, "m >= 1; got \\(0,\\)"),
    ],
)
def test_bad_input_raises(given_, labels, radii, message):
    for metric in (
        evaluate.certified_accuracy,
        evaluate.accuracy_interval,
        evaluate.high_probability_accuracy,
    ):
        with pytest.raises(ValueError, match=message):
            metric(given_, labels, radii)


@pytest.mark.parametrize("bad", [0, 1, -1, math.nan])
def test_bad_levels_raise(bad):
    with pytest.raises(ValueError, match="level must lie between 0 and 1"):
        evaluate.accuracy_interval(CERTIFICATE, LABELS, 0, level=bad)
    with pytest.raises(ValueError, match="rho must lie between 0 and 1"):
        evaluate.high_probability_accuracy(CERTIFICATE, LABELS, 0, rho=bad)


@pytest.mark.parametrize("bad", [1, -0.1, math.nan])
def test_bad_alphas_raise(bad):
    with pytest.raises(ValueError, match="alpha must lie in"):
        evaluate.high_probability_accuracy(CERTIFICATE, LABELS, 0, alpha=bad)


# The published logs of Cohen, Rosenfeld & Kolter.

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"


def test_a_cohen_log_is_read_field_by_field(tmp_path):
    path = tmp_path / "log.tsv"
    path.write_text(HEADER + "0\t3\t3\t0.378\t1\t15.4\n20\t7\t-1\t0.0\t0\t1:02:31.25\n")
    results = evaluate.read_cohen_log(path, alpha=0.01)
    np.testing.assert_array_equal(results.index, [0, 20])
    np.testing.assert_array_equal(results.label, [3, 7])
    np.testing.assert_array_equal(results.prediction, [3, ABSTAIN])
    np.testing.assert_array_equal(results.radius, [0.378, 0.0])
    np.testing.assert_array_equal(results.confidence, [0.99, 0.99])
    np.testing.assert_array_equal(results.seconds, [15.4, 3751.25])
    assert results.norm == 2.0
    kinds = {
        f.name: getattr(results, f.name).dtype.str
        for f in dataclasses.fields(results)
        if isinstance(getattr(results, f.name), np.ndarray)
    }
    assert kinds == {
        **dict.fromkeys(["index", "label", "prediction"], "<i8"),
        **dict.fromkeys(["radius", "confidence", "seconds"], "<f8"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"lacks the columns \['idx'"),
        ("idx\tlabel\tpredict\tcorrect\ttime\n", r"lacks the columns \['radius'\]"),
        (HEADER, "holds no image"),
        (HEADER + "0\t3\t3\t0.378\t1\n", "line 2"),
        (HEADER + "0\t3\t3\t0.378\t1\t1\n1\t3\tcat\t0.378\t1\t1\n", "line 3.*cat"),
        (HEADER + "0\t3\t3\t0.378\t0\t1\n", "line 2.*do not fit together"),
        (HEADER + "0\t3\t3\tnan\t1\t1\n", "line 2.*do not fit together"),
    ],
)
def test_a_file_of_another_format_is_refused(tmp_path, text, message):
    path = tmp_path / "log.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        evaluate.read_cohen_log(path)


def published(text):
    """{sigma: accuracies} and the radii of a published markdown or LaTeX table."""
    first, *lines = text.replace("\\textbf", "").splitlines()
    radii = [float(number) for number in re.findall(r"r = ([\d.]+)", first)]
    rows = {}
    for line in lines:
        sigma, *values = re.findall(r"\d+\.\d+", line) or [None]
        if sigma is not None:
            rows[sigma] = [float(value) for value in values]
    return radii, rows


@pytest.mark.parametrize(
    ("data_set", "net", "sigmas"),
    [
        ("cifar10", "resnet110", ["0.12", "0.25", "0.50", "1.00"]),
        ("imagenet", "resnet50", ["0.25", "0.50", "1.00"]),
    ],
)
@pytest.mark.parametrize("form", ["markdown", "latex"])
def test_the_published_tables_follow_from_the_published_logs(data, data_set, net, sigmas, form):
    logs = data / "cohen_logs"
    text = (logs / "analysis" / form / f"vary_noise_{data_set}").read_text()
    radii, rows = published(text)
    assert len(radii) == 6
    assert list(rows) == sigmas
    for sigma, values in rows.items():
        path = logs / "certify" / data_set / net / f"noise_{sigma}" / "test" / f"sigma_{sigma}"
        results = evaluate.read_cohen_log(path)
        accuracy = evaluate.certified_accuracy(results, results.label, radii)
        assert [f"{value:.2f}" for value in accuracy] == [f"{value:.2f}" for value in values]


def test_all_published_logs_read_and_give_the_known_averages(data):
    logs = sorted((data / "cohen_logs" / "certify").glob("*/*/*/*/sigma_*"))
    assert len(logs) == 13
    sizes = [len(evaluate.read_cohen_log(path).index) for path in logs]
    assert min(sizes) == 427
    path = data / "cohen_logs/certify/cifar10/resnet110/noise_0.25/test/sigma_0.25"
    results = evaluate.read_cohen_log(path)
    assert round(evaluate.clean_accuracy(results, results.label), 3) == 0.748
    assert round(evaluate.abstention_rate(results), 3) == 0.086
    assert round(evaluate.average_certified_radius(results, results.label), 3) == 0.429
