"""Smoothing on record: votes kept, resumed, merged, bounded anew; and the field's own format."""

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxcert import evaluate, smoothing
from jaxcert.errors import RecordMismatch
from jaxcert.evaluate import records
from jaxcert.evaluate.smoothed import described
from jaxcert.smoothing import Gaussian, GridGaussian, SequentialPlan, SmoothingPlan

M = 12
X = np.linspace(-1, 1, M, dtype=np.float32)[:, None]
LABELS = (X[:, 0] < 0).astype(int)
PLAN = SmoothingPlan(noise=Gaussian(0.5), n0=20, n=400, chunk=60, alpha=0.01)


def sign(z):
    return jnp.concatenate([z, -z], axis=1)


def run(path=None, **changes):
    options = {"net": "sign", "path": path, "batch": 5, "also": (0.001,), **changes}
    return evaluate.run_smoothing(3, sign, X, LABELS, options.pop("plan", PLAN), **options)


def lines(path):
    """Records but for the seconds, which no two runs share."""
    return [{**record, "seconds": 0} for record in records.read(path).records]


def test_records_hold_the_votes_and_the_header_the_plan(tmp_path):
    path = tmp_path / "run.jsonl"
    results = run(path)
    certificate = smoothing.certify(jax.random.key(3), sign, X, PLAN)
    assert np.array_equal(results.prediction, certificate.prediction)
    assert np.array_equal(results.radius, np.asarray(certificate.radius, float))
    votes = smoothing.count(jax.random.key(3), sign, X, PLAN)
    found = records.read(path)
    assert [r["estimation"] for r in found.records] == np.asarray(votes.estimation).tolist()
    assert [r["selection"] for r in found.records] == np.asarray(votes.selection).tolist()
    header = found.config
    assert header["noise"] == "Gaussian(sigma=0.5, norm=2.0)"
    assert (header["seed"], header["n"], header["alpha"], header["n0"]) == (3, 400, 0.01, 20)
    assert found.versions["jax"] == jax.__version__


def test_a_run_resumes_with_the_same_records_and_refuses_another_plan(tmp_path):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    run(whole)
    evaluate.run_smoothing(3, sign, X[:5], LABELS[:5], PLAN, net="sign", path=parts, also=(0.001,))
    run(parts)
    assert lines(parts) == lines(whole)
    before = parts.read_bytes()
    for changes in (
        {"plan": dataclasses.replace(PLAN, n=500)},
        {"plan": dataclasses.replace(PLAN, noise=GridGaussian(0.5))},
        {"net": "another"},
        {"also": ()},
    ):
        with pytest.raises(RecordMismatch, match="belongs to a run with another configuration"):
            run(parts, **changes)
        assert parts.read_bytes() == before
    with pytest.raises(ValueError, match="needs a name for the net"):
        run(parts, net=None)
    with pytest.raises(RecordMismatch, match="weights"):
        evaluate.run_smoothing(3, lambda z: -sign(z), X, LABELS, PLAN, net="sign", path=parts)
    with pytest.raises(ValueError, match="multiple of the plan's group"):
        run(parts, plan=dataclasses.replace(PLAN, group=2))
    with pytest.raises(TypeError, match="plan must be"):
        run(parts, plan=None)


def test_a_distribution_is_the_same_text_in_every_process():
    plan = dataclasses.replace(PLAN, noise=smoothing.Ablation(3))
    module = "jaxcert.smoothing.noise.discrete.value_and_complement"
    assert described(plan)["noise"] == f"Ablation(keep=3, encode={module}, norm=0.0)"
    for noise in (Gaussian(np.float64(0.5)), Gaussian(0.5, norm=2)):
        plan = dataclasses.replace(PLAN, noise=noise)
        assert described(plan)["noise"] == "Gaussian(sigma=0.5, norm=2.0)"


def test_sequential_runs_record_their_decisions(tmp_path):
    plan = SequentialPlan(noise=Gaussian(0.5), radii=(0.0, 0.5), n0=20, n=2000)
    path = tmp_path / "run.jsonl"
    results = run(path, plan=plan)
    found = smoothing.certify_at(jax.random.key(3), sign, X, plan)
    assert np.array_equal(results.radius, np.asarray(found.certificate.radius, float))
    assert [r["draws"] for r in lines(path)] == np.asarray(found.draws).tolist()
    assert [r["certified"] for r in lines(path)] == np.asarray(found.certified).tolist()
    assert records.read(path).config["test"] == "Hybrid(betting=0.2)"
    with pytest.raises(RecordMismatch, match="of a SequentialPlan"):
        evaluate.rebound(path, X, PLAN, index=np.arange(M))


def test_other_pixels_are_another_run(tmp_path):
    path = tmp_path / "run.jsonl"
    run(path)
    for other in (2 * X, X[::-1]):
        with pytest.raises(RecordMismatch, match="other pixels"):
            evaluate.run_smoothing(
                3, sign, other, LABELS, PLAN, net="sign", path=path, also=(0.001,)
            )
        with pytest.raises(RecordMismatch, match="other pixels"):
            evaluate.rebound(path, other, PLAN)
    assert np.array_equal(evaluate.rebound(path, X, PLAN).radius, evaluate.load(path).radius)


def test_a_log_that_ends_within_a_group_is_resumed(tmp_path):
    """The whole group is drawn for again, and what is on record stays there once."""
    plan, path = dataclasses.replace(PLAN, group=2), tmp_path / "run.jsonl"
    whole = run(path, plan=plan, batch=4)
    kept = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept[:4]) + kept[4][:20])
    resumed = run(path, plan=plan, batch=4)
    assert np.array_equal(resumed.radius, whole.radius)
    assert [r["index"] for r in lines(path)] == list(range(M))


def test_radii_that_no_float32_is_equal_to_are_certified_at_themselves():
    plan = SequentialPlan(noise=Gaussian(0.5), radii=(0.1, 0.3), n0=20, n=2000)
    results = run(plan=plan)
    certificate = smoothing.certify_at(jax.random.key(3), sign, X, plan)
    both = np.asarray(certificate.certified)[:, 0] & (results.prediction == LABELS)
    assert evaluate.certified_accuracy(results, LABELS, [0.1]) == both.mean() > 0


def test_what_a_log_cannot_name_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    noise = smoothing.Ablation(1, encode=lambda x, kept: x)
    pixels, plan = np.zeros((M, 3, 1), np.float32), SmoothingPlan(noise=noise, n=100)
    with pytest.raises(ValueError, match="define it by name"):
        evaluate.run_smoothing(3, sign, pixels, LABELS, plan, net="sign", path=path)
    with pytest.raises(ValueError, match=r"seed must lie in \[0, 2\^32\)"):
        evaluate.run_smoothing(2**32 + 3, sign, X, LABELS, PLAN)
    with pytest.raises(FileNotFoundError, match="no folder"):
        run(tmp_path / "none" / "run.jsonl")
    assert not path.exists()


def test_modules_with_keys_of_their_own_have_a_name(tmp_path):
    class Net(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(1, 2, rngs=nnx.Rngs(0))
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

        def __call__(self, z):
            return self.drop(self.layer(z))

    net = Net()
    net.eval()
    path = tmp_path / "run.jsonl"
    evaluate.run_smoothing(3, net, X, LABELS, PLAN, net="net", path=path)
    assert len(records.read(path).config["weights"]) == 16


def test_votes_are_bounded_anew_and_say_if_post_hoc(tmp_path):
    path = tmp_path / "run.jsonl"
    first = run(path)
    index = np.arange(M)
    same = evaluate.rebound(path, X, PLAN, index=index)
    assert np.array_equal(same.radius, first.radius)
    assert not same.post_hoc
    announced = evaluate.rebound(path, X, dataclasses.replace(PLAN, alpha=0.001), index=index)
    assert not announced.post_hoc
    assert (announced.radius <= first.radius).all()
    assert (announced.confidence == np.float32(0.999)).all() or np.allclose(
        announced.confidence, 0.999
    )
    later = evaluate.rebound(path, X, dataclasses.replace(PLAN, alpha=0.1), index=index)
    assert later.post_hoc
    assert evaluate.row("net", later, [0.1]).name == "net (post hoc)"
    both = evaluate.rebound(path, X, dataclasses.replace(PLAN, runner_up=True), index=index)
    assert both.post_hoc
    with pytest.raises(RecordMismatch, match="input"):
        evaluate.rebound(path, np.repeat(X, 2, 1), PLAN, index=index)
    with pytest.raises(ValueError, match="got norm="):
        evaluate.write_cohen_log(later, tmp_path / "x.tsv")
    linf = dataclasses.replace(PLAN, noise=Gaussian(0.5, norm=np.inf))
    assert evaluate.rebound(path, X[[4, 2]], linf, index=np.array([4, 2])).norm == np.inf
    with pytest.raises(RecordMismatch, match="noise"):
        evaluate.rebound(path, X, dataclasses.replace(PLAN, noise=Gaussian(0.25)), index=index)
    with pytest.raises(RecordMismatch, match="lacks 1 of the images, such as 99"):
        evaluate.rebound(path, X[:2], PLAN, index=np.array([0, 99]))


def test_shards_are_merged(tmp_path):
    whole, merged = tmp_path / "whole.jsonl", tmp_path / "merged.jsonl"
    run(whole)
    shards = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for i, path in enumerate(shards):
        rows = np.arange(M)[i::3] if i else np.arange(0, M, 2)  # two of the shards overlap
        evaluate.run_smoothing(
            3, sign, X[rows], LABELS[rows], PLAN, net="sign", path=path, index=rows, also=(0.001,)
        )
    results = evaluate.merge(shards, merged)
    assert lines(merged) == [r for r in lines(whole) if r["index"] in results.index]
    assert results.index.tolist() == sorted(
        set(range(0, M, 2)) | {*range(1, M, 3), *range(2, M, 3)}
    )
    with pytest.raises(FileExistsError, match="new path"):
        evaluate.merge(shards, merged)
    other = tmp_path / "other.jsonl"
    run(other, plan=dataclasses.replace(PLAN, n=300))
    with pytest.raises(RecordMismatch, match=r"differ in their configuration: \['n'\]"):
        evaluate.merge([whole, other], tmp_path / "x.jsonl")
    text = whole.read_text().splitlines()
    record = json.loads(text[1])
    record["estimation"][0] += 1
    forged = tmp_path / "forged.jsonl"
    forged.write_text("\n".join([text[0], json.dumps(record), *text[2:]]) + "\n")
    with pytest.raises(RecordMismatch, match="another record of image 0"):
        evaluate.merge([whole, forged], tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


def test_the_fields_format_is_written_with_floored_radii(tmp_path):
    results = run()
    radius = np.array([0.24996, 0.25, 1.23456, 0.0, 0.99999, 0.001239, *results.radius[6:]])
    results = dataclasses.replace(results, radius=radius)
    path = tmp_path / "log.tsv"
    evaluate.write_cohen_log(results, path)
    again = evaluate.read_cohen_log(path, alpha=0.01)
    assert again.radius[:6].tolist() == [0.249, 0.25, 1.23, 0.0, 0.999, 0.00123]
    assert (again.radius <= radius).all()
    assert np.array_equal(again.prediction, results.prediction)
    assert np.array_equal(again.label, results.label)
    with pytest.raises(FileExistsError):
        evaluate.write_cohen_log(results, path)


def test_a_rounded_radius_can_be_lowered_below_the_certified_one(tmp_path):
    path = tmp_path / "log.tsv"
    exact = np.array([0.24996, 1.235, 0.09996, 0.9996, 2.0])
    rows = [f"{i}\t0\t0\t{r:.3}\t1\t1.0" for i, r in enumerate(exact)]
    path.write_text("\n".join(["idx\tlabel\tpredict\tradius\tcorrect\ttime", *rows]))
    assert (evaluate.read_cohen_log(path).radius > exact).any()
    lowered = evaluate.read_cohen_log(path, lowered=True).radius
    assert (lowered <= exact).all()
    assert (lowered > exact * 0.98).all()


NAMES = """
import jax, jax.numpy as jnp, numpy as np
from flax import linen, nnx
from jaxcert.model import digest
x = jnp.zeros((1, 4))
dense = linen.Dense(3)
for scale in (1.0, 2.0):
    w = np.full((4, 3), scale, np.float32)
    layer = nnx.Linear(4, 3, kernel_init=lambda *_: jnp.asarray(w), rngs=nnx.Rngs(0))
    models = (
        nnx.Sequential(layer, nnx.gelu),
        jax.tree_util.Partial(dense.apply, {"params": {"kernel": w, "bias": w[0]}}),
        lambda z: jax.nn.relu(z @ w),
    )
    print(*(digest(f, x) for f in models))
"""


def test_a_model_has_one_name_in_every_process_and_another_with_other_weights():
    both = [
        subprocess.run(
            [sys.executable, "-c", NAMES], check=True, capture_output=True, text=True
        ).stdout
        for _ in range(2)
    ]
    assert both[0] == both[1]
    assert len(set(both[0].split())) == 6


# Kill -9, for real: a run over 200 images is killed at 20 random places.
CHILD = """
import sys
import jax.numpy as jnp, numpy as np
from jaxcert import evaluate
from jaxcert.smoothing import Gaussian, SmoothingPlan
x = np.linspace(-1, 1, 200, dtype=np.float32)[:, None]
plan = SmoothingPlan(noise=Gaussian(0.5), n0=20, n=100, chunk=60, alpha=0.01)
sign = lambda z: jnp.concatenate([z, -z], axis=1)
evaluate.run_smoothing(3, sign, x, np.zeros(200, int), plan, net="sign", path=sys.argv[1], batch=2)
"""


@pytest.mark.slow
def test_a_killed_run_ends_like_one_that_was_not(tmp_path):
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    rng = random.Random(0)
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", CHILD, str(killed)])
        size = killed.stat().st_size if killed.exists() else 0
        enough = size + rng.randint(0, 3200)
        while process.poll() is None and (not killed.exists() or killed.stat().st_size < enough):
            time.sleep(rng.uniform(0, 1e-3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    for path in (killed, whole):
        subprocess.run([sys.executable, "-c", CHILD, str(path)], check=True)
    assert lines(killed) == lines(whole)
    assert [r["index"] for r in lines(whole)] == list(range(200))
