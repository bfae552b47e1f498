"""run: batches, padding, logs to resume from, and the same results whichever way they came."""

import dataclasses
import functools
import io
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcert import evaluate
from jaxcert.certificate import ABSTAIN, Certificate, issue
from jaxcert.errors import RecordMismatch
from jaxcert.evaluate import records
from jaxcert.sets import Box

M = 23
CONFIG = {"net": "toy", "alpha": 0.001}


@jax.jit
def toy(x, index):
    """Class 0, 1 or 2 from x, a radius from the index; every fifth image abstains."""
    prediction = jnp.where(index % 5 == 4, ABSTAIN, x[:, 0].astype(jnp.int32) % 3)
    return issue(prediction, index / 7.0 + x[:, 1], norm=2.0, confidence=0.999)


class Counting:
    """A certifier that remembers its calls and can fail after some."""

    def __init__(self, certifier=toy, fails_after=None):
        self.certifier, self.fails_after, self.calls = certifier, fails_after, []

    def __call__(self, x, index):
        if len(self.calls) == self.fails_after:
            raise KeyboardInterrupt
        self.calls.append((x.shape, np.asarray(index).tolist()))
        return self.certifier(x, index)


@pytest.fixture
def x():
    return np.stack([np.arange(M), np.linspace(0, 1, M)], 1).astype(np.float32)


@pytest.fixture
def labels():
    return np.arange(M) % 2


def assert_equal_results(a, b, but=()):
    for field in dataclasses.fields(evaluate.Results):
        if field.name in but:
            continue
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, field.name
            np.testing.assert_array_equal(left, right, err_msg=field.name)
        else:
            assert left == right, field.name


def test_results_are_the_certificates_row_by_row(x, labels):
    results = evaluate.run(toy, x, labels, batch=M)
    direct = toy(x, jnp.arange(M))
    np.testing.assert_array_equal(results.index, np.arange(M))
    np.testing.assert_array_equal(results.label, labels)
    np.testing.assert_array_equal(results.prediction, direct.prediction)
    np.testing.assert_array_equal(results.radius, np.asarray(direct.radius, np.float64))
    np.testing.assert_array_equal(results.confidence, np.asarray(direct.confidence, np.float64))
    assert results.radius.dtype == np.float64
    assert results.norm == 2.0
    assert results.within is None
    assert (results.seconds > 0).all()


@pytest.mark.parametrize("batch", [1, 5, 22, 23, 100])
def test_any_batch_size_gives_the_same_and_compiles_once(x, labels, batch):
    traces = []
    certifier = Counting(jax.jit(lambda x, index: (traces.append(x.shape), toy(x, index))[1]))
    results = evaluate.run(certifier, x, labels, batch=batch)
    assert_equal_results(results, evaluate.run(toy, x, labels), but=["seconds"])
    assert {shape for shape, _ in certifier.calls} == {(min(batch, M), 2)}
    assert len(traces) == 1
    seen = [i for _, index in certifier.calls for i in index]
    assert sorted(set(seen)) == list(range(M))
    assert len(seen) == -(-M // min(batch, M)) * min(batch, M)


def test_index_reaches_the_certifier_and_the_results(x, labels):
    index = np.arange(M)[::-1] * 20
    results = evaluate.run(functools.partial(toy), jnp.asarray(x), labels, index=index, batch=4)
    np.testing.assert_array_equal(results.index, index)
    certified = results.prediction != ABSTAIN
    expected = np.where(certified, index / 7.0 + x[:, 1], 0)
    np.testing.assert_allclose(results.radius, expected, rtol=1e-6)


def test_a_file_gives_back_what_run_returned(x, labels, tmp_path):
    path = tmp_path / "run.jsonl"
    results = evaluate.run(toy, x, labels, batch=4, path=path, config=CONFIG)
    assert_equal_results(evaluate.load(path), results)
    assert records.read(path).config == CONFIG
    again = Counting()
    assert_equal_results(evaluate.run(again, x, labels, path=path, config=CONFIG), results)
    assert again.calls == []


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_an_interrupted_run_goes_on_where_it_stopped(x, labels, tmp_path, batches):
    path = tmp_path / "run.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(Counting(fails_after=batches), x, labels, batch=4, path=path, config=CONFIG)
    assert len(records.read(path).records) == 4 * batches
    second = Counting()
    results = evaluate.run(second, x, labels, batch=4, path=path, config=CONFIG)
    assert_equal_results(results, evaluate.run(toy, x, labels), but=["seconds"])
    assert_equal_results(evaluate.load(path), results)
    assert min(i for _, index in second.calls for i in index) == 4 * batches


def test_a_torn_record_is_certified_again(x, labels, tmp_path):
    path = tmp_path / "run.jsonl"
    results = evaluate.run(toy, x, labels, path=path, config=CONFIG)
    path.write_bytes(path.read_bytes()[:-20])
    second = Counting()
    again = evaluate.run(second, x, labels, batch=4, path=path, config=CONFIG)
    assert second.calls == [((4, 2), [M - 1] * 4)]
    assert_equal_results(again, results, but=["seconds"])


def test_a_run_can_be_extended_and_a_part_of_it_asked_for(x, labels, tmp_path):
    path = tmp_path / "run.jsonl"
    evaluate.run(toy, x[:9], labels[:9], path=path, config=CONFIG)
    more = Counting()
    results = evaluate.run(more, x, labels, batch=7, path=path, config=CONFIG)
    assert [index for _, index in more.calls] == [list(range(9, 16)), list(range(16, 23))]
    part = evaluate.run(
        Counting(fails_after=0),
        x[5:2:-1],
        labels[5:2:-1],
        index=[5, 4, 3],
        path=path,
        config=CONFIG,
    )
    np.testing.assert_array_equal(part.radius, results.radius[5:2:-1])


def test_another_configuration_or_other_labels_are_refused(x, labels, tmp_path):
    path = tmp_path / "run.jsonl"
    evaluate.run(toy, x, labels, path=path, config=CONFIG)
    before = path.read_bytes()
    with pytest.raises(RecordMismatch, match=r"alpha: 0\.001 in the file, 0\.01 now"):
        evaluate.run(toy, x, labels, path=path, config=CONFIG | {"alpha": 0.01})
    with pytest.raises(RecordMismatch, match="image 0 has label 0 in the file and 1 now"):
        evaluate.run(toy, x, 1 - labels, path=path, config=CONFIG)
    with pytest.raises(RecordMismatch, match=r"proves the norm inf, earlier images have 2\.0"):
        evaluate.run(
            lambda x, index: dataclasses.replace(toy(x, index), norm=np.inf),
            np.concatenate([x, x]),
            np.concatenate([labels, labels]),
            path=path,
            config=CONFIG,
        )
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="pass config="):
        evaluate.run(toy, x, labels, path=tmp_path / "other.jsonl")
    assert not (tmp_path / "other.jsonl").exists()


def test_a_log_of_something_else_is_refused(x, labels, tmp_path):
    path = tmp_path / "search.jsonl"
    with records.Log(path, CONFIG) as log:
        log.append({"index": 0, "verdict": "UNKNOWN"})
    with pytest.raises(RecordMismatch, match="run: line 2 lacks"):
        evaluate.load(path)
    with pytest.raises(RecordMismatch, match="run: line 2 lacks"):
        evaluate.run(toy, x, labels, path=path, config=CONFIG)
    records.Log(tmp_path / "empty.jsonl", CONFIG).close()
    with pytest.raises(ValueError, match="holds no record yet"):
        evaluate.load(tmp_path / "empty.jsonl")


IMAGE_BOX = Box(np.zeros((1, 2), np.float32), np.array([[1.0, 2.0]], np.float32))


@pytest.mark.parametrize(
    ("within", "lower", "upper"),
    [
        (Box(0.0, 1.0), 0.0, 1.0),
        (Box(jnp.zeros((8, 2)), jnp.ones((8, 2))), 0.0, 1.0),
        (IMAGE_BOX, 0.0, np.broadcast_to([1.0, 2.0], (8, 2))),
        (
            Box(np.zeros((8, 2)), np.arange(16.0).reshape(8, 2)),
            0.0,
            np.arange(16.0).reshape(8, 2),
        ),
    ],
)
def test_the_box_a_certificate_holds_in_is_kept(x, labels, tmp_path, within, lower, upper):
    def certifier(x, index):
        return dataclasses.replace(toy(x, index), norm=np.inf, within=within)

    path = tmp_path / "run.jsonl"
    results = evaluate.run(certifier, x[:8], labels[:8], batch=8, path=path, config={})
    for found in (results, evaluate.load(path)):
        assert found.norm == np.inf
        assert isinstance(found.within, Box)
        np.testing.assert_array_equal(found.within.lower, lower)
        np.testing.assert_array_equal(found.within.upper, upper)


def returning(certificate):
    return lambda x, index: certificate


@pytest.mark.parametrize(
    ("certifier", "error", "message"),
    [
        (returning(None), TypeError, "must return a Certificate, got NoneType"),
        (
            returning(Certificate(np.zeros(3, int), np.zeros(M), np.ones(M), 2.0)),
            ValueError,
            r"prediction must have shape \(23,\), one per image; got \(3,\)",
        ),
        (
            returning(Certificate(np.zeros(M), np.zeros(M), np.ones(M), 2.0)),
            TypeError,
            "prediction must be integers, got float64",
        ),
        (
            returning(Certificate(np.zeros(M, int), np.full(M, np.nan), np.ones(M), 2.0)),
            ValueError,
            "NaN, infinite or negative",
        ),
        (
            returning(Certificate(np.zeros(M, int), np.full(M, -1.0), np.ones(M), 2.0)),
            ValueError,
            "NaN, infinite or negative",
        ),
        (
            returning(Certificate(np.zeros(M, int), np.zeros(M), np.ones(M), 2.0, within="grid")),
            TypeError,
            "within must be a Box, a Grid or None, got str",
        ),
    ],
)
def test_bad_certificates_are_refused_and_not_recorded(
    x, labels, tmp_path, certifier, error, message
):
    path = tmp_path / "run.jsonl"
    with pytest.raises(error, match=message):
        evaluate.run(certifier, x, labels, path=path, config={})
    assert records.read(path).records == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros(3, int)}, r"labels must be integers of shape \(23,\)"),
        ({"labels": np.zeros(M)}, "labels must be integers .* got float64"),
        ({"labels": np.full(M, -1)}, "labels must be >= 0"),
        ({"index": np.zeros(M, int)}, "distinct"),
        ({"index": np.arange(M) - 1}, "distinct"),
        ({"index": np.arange(M) + 2**31}, "distinct"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"x": np.zeros((0, 2)), "labels": np.zeros(0, int)}, "no images"),
    ],
)
def test_bad_arguments_are_refused_before_the_certifier_is_called(x, labels, change, message):
    arguments = {"x": x, "labels": labels} | change
    with pytest.raises(ValueError, match=message):
        evaluate.run(Counting(fails_after=0), **arguments)


def test_the_bar_shows_on_demand_and_is_silent_otherwise(x, labels, capsys, monkeypatch):
    evaluate.run(toy, x, labels, batch=10)
    evaluate.run(toy, x, labels, batch=10, progress=False)
    assert capsys.readouterr() == ("", "")
    evaluate.run(toy, x, labels, batch=10, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "23/23" in err

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    evaluate.run(toy, x, labels, batch=10)
    assert "23/23" in sys.stderr.getvalue()


def test_importing_evaluate_is_light():
    heavy = ["scipy.stats", "matplotlib", "flax", "rich"]
    code = f"import sys, jaxcert.evaluate; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
