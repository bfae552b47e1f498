"""What a plan may change: shared noise, the first layer apart, two bounds, devices; and Votes."""

import dataclasses
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcert import smoothing
from jaxcert.errors import MixedRows
from jaxcert.smoothing import AffineFirst, Gaussian, GridGaussian, Laplace, SmoothingPlan
from jaxcert.tracing import may_see_place

KEY = jax.random.key(5)
WEIGHTS = np.random.default_rng(0).integers(-4, 5, (6, 3)).astype(np.float32)
X = np.random.default_rng(1).integers(0, 3, (5, 6)).astype(np.float32)
PLAN = SmoothingPlan(noise=Gaussian(0.5), n0=7, n=50, chunk=16, alpha=0.01)


def integer_net(z):
    """Exact on inputs rounded to integers, so the same in any batch shape."""
    return jnp.round(4 * z) @ WEIGHTS


def count(plan, f=integer_net, x=X, index=None):
    votes = smoothing.count(KEY, f, x, plan, index=index)
    return np.asarray(votes.selection), np.asarray(votes.estimation)


def test_a_group_shares_the_noise_of_its_first_key():
    """Image i sees the noise of key i // 2, which without groups is that of image i // 2."""
    shared = count(dataclasses.replace(PLAN, group=2))
    alone = [count(PLAN, x=X[i : i + 1], index=np.array([i // 2])) for i in range(5)]
    for part in (0, 1):
        assert np.array_equal(shared[part], np.concatenate([each[part] for each in alone]))
    later = count(dataclasses.replace(PLAN, group=2), x=X[2:4], index=np.array([2, 3]))
    assert np.array_equal(later[1], shared[1][2:4])


@pytest.mark.parametrize("noise", [GridGaussian(0.5, levels=1), Laplace(0.5)])
def test_any_noise_may_be_shared(noise):
    plan = dataclasses.replace(PLAN, noise=noise)
    shared = count(dataclasses.replace(plan, group=5))
    alone = [count(plan, x=X[i : i + 1], index=np.array([0]))[1] for i in range(5)]
    assert np.array_equal(shared[1], np.concatenate(alone))


def test_images_of_different_groups_do_not_share():
    plan = dataclasses.replace(PLAN, group=2)
    with pytest.raises(ValueError, match="must come together, in runs of 2"):
        count(plan, index=np.array([0, 1, 3, 4, 5]))
    traced = jax.jit(lambda i: smoothing.count(KEY, integer_net, X, plan, index=i))
    votes = traced(np.array([0, 1, 3, 4, 6]))
    assert np.asarray(votes.estimation).sum(1).tolist() == [50, 50, 0, 0, 50]


def test_the_first_layer_may_be_applied_apart():
    """Integer weights: no rounding, so that the votes must be those of the whole model."""
    first = jax.tree_util.Partial(lambda w, z: jnp.round(64 * z) @ w + 1, WEIGHTS)
    with pytest.raises(ValueError, match=r"must be affine.*'round'"):
        count(dataclasses.replace(PLAN, group=5), AffineFirst(first, jnp.sin))
    with pytest.raises(ValueError, match="does not double"):
        count(PLAN, AffineFirst(lambda z: z.astype(jnp.int32).astype(z.dtype), jnp.sin))
    first = jax.tree_util.Partial(lambda w, z: z @ w + 1, WEIGHTS)

    def rest(h):
        return jnp.round(h)

    plan = dataclasses.replace(PLAN, group=5, n=2000, chunk=100)
    apart = count(plan, AffineFirst(first, rest))[1]
    whole = count(plan, lambda z: rest(first(z)))[1]
    assert np.abs(apart - whole).max() <= 2  # sums in another order round differently
    assert (apart > 0).sum(1).max() > 1


def test_bound_is_certify_and_takes_another_norm_and_level_from_the_same_votes():
    votes = smoothing.count(KEY, integer_net, X, PLAN)
    certificate = smoothing.certify(KEY, integer_net, X, PLAN)
    again = smoothing.bound(votes, X, PLAN)
    for a, b in zip(jax.tree.leaves(certificate), jax.tree.leaves(again), strict=True):
        assert np.array_equal(a, b)
    linf = dataclasses.replace(PLAN, noise=Gaussian(0.5, norm=np.inf))
    found = smoothing.bound(votes, X, linf)
    assert found.norm == np.inf
    np.testing.assert_allclose(found.radius, certificate.radius / np.sqrt(6), rtol=1e-6)
    strict = smoothing.bound(votes, X, dataclasses.replace(PLAN, alpha=1e-6))
    assert (strict.radius <= certificate.radius).all()
    assert (strict.radius < certificate.radius).any()


def test_bounding_the_runner_up_certifies_without_a_majority():
    """40 % of the votes against 12 times 5 %."""
    estimation = np.array([[400] + 12 * [50]], np.int32)
    plan = SmoothingPlan(noise=Gaussian(0.5), n=1000)
    votes = smoothing.Votes(jnp.asarray(estimation), jnp.asarray(estimation), plan)
    x = np.zeros((1, 4), np.float32)
    assert smoothing.bound(votes, x, plan).prediction[0] == -1
    both = smoothing.bound(votes, x, dataclasses.replace(plan, runner_up=True))
    assert both.prediction[0] == 0
    assert 0.2 < both.radius[0] < 0.34  # that of 0.4 and 0.05 exactly


def test_the_hardware_generator_draws_other_noise_of_the_same_law():
    plan = SmoothingPlan(noise=Gaussian(0.5), n=20_000, chunk=100, hardware=True)
    x = np.array([[0.25], [0.25]], np.float32)
    selection, estimation = count(plan, lambda z: jnp.concatenate([z, -z], 1), x)
    p = 0.6914624612740131  # Phi(1/2)
    assert np.abs(estimation[:, 0] / 20_000 - p).max() < 5 * np.sqrt(p * (1 - p) / 20_000)
    assert estimation.sum(1).tolist() == [20_000, 20_000]
    assert estimation[0, 0] != estimation[1, 0]
    assert selection.sum(1).tolist() == [100, 100]


def test_a_model_in_bfloat16_is_another_function_and_certified_as_such():
    w = jnp.asarray(np.random.default_rng(2).normal(size=(6, 3)), jnp.float32)
    f = jax.tree_util.Partial(lambda w, z: z @ w, w)
    half = smoothing.in_bfloat16(f)
    x = jnp.asarray(X)
    expected = np.asarray(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), np.float32)
    assert np.array_equal(half(x), expected)
    assert not np.array_equal(half(x), f(x))
    plan = dataclasses.replace(PLAN, n=1000)
    assert np.abs(count(plan, half)[1] - count(plan, f)[1]).max() < 30
    with pytest.raises(ValueError, match="no weights that can be seen"):
        smoothing.in_bfloat16(lambda z: z @ w)


def test_votes_are_bounded_only_under_the_plan_they_were_drawn_with():
    votes = smoothing.count(KEY, integer_net, X, PLAN)
    for plan in (
        dataclasses.replace(PLAN, n=40),
        dataclasses.replace(PLAN, noise=Gaussian(5.0)),
        dataclasses.replace(PLAN, noise=GridGaussian(0.5)),
    ):
        with pytest.raises(ValueError, match="these votes were drawn with"):
            smoothing.bound(votes, X, plan)
    with pytest.raises(ValueError, match="votes on 5 images, got 2"):
        smoothing.bound(votes, X[:2], PLAN)
    with pytest.raises(TypeError, match="type bound"):
        smoothing.bound(votes.estimation, X, PLAN)


def test_what_depends_on_the_row_is_not_certified():
    def first_row_differs(z):
        first = jnp.arange(len(z)) == 0
        return (
            jnp.stack([jnp.where(first, -1.0, 1.0), jnp.where(first, 1.0, -1.0)], 1) + 0 * z[:, :2]
        )

    def masked(z):
        mask = jax.random.bernoulli(jax.random.key(0), 0.5, z.shape)
        return jnp.where(mask, z, 0) @ WEIGHTS

    for f in (first_row_differs, masked):
        assert may_see_place(f, (6,), jnp.float32)
        with pytest.raises(MixedRows, match="mask or random numbers"):
            count(PLAN, f)
    assert jax.jit(lambda x: smoothing.count(KEY, masked, x, PLAN).estimation)(X).sum() == 0


@pytest.mark.parametrize("first", [0.0, np.nan, np.inf])
def test_rows_are_tried_out_whatever_the_first_image_is(first):
    """A transform cannot be followed; behind it, a mean over the batch, or over the rows before."""

    def unknown(z):
        return jnp.abs(jnp.fft.fft(z, axis=1))

    def mixing(z):
        return (z + unknown(z).mean(0)) @ WEIGHTS

    def causal(z):
        return (z + jnp.cumsum(unknown(z), axis=0)) @ WEIGHTS

    x = X.copy()
    x[0] = first
    for f in (mixing, causal):
        with pytest.raises(MixedRows, match="rows beside it"):
            smoothing.count(KEY, f, x, PLAN)


def test_models_of_encoded_images_may_be_plain_functions():
    weights = jnp.ones((8, 3))
    plan = SmoothingPlan(noise=smoothing.Ablation(2), n=100, chunk=50)
    votes = smoothing.count(
        KEY, lambda z: z.reshape(len(z), 8) @ weights, np.zeros((2, 4, 1), np.float32), plan
    )
    assert votes.estimation.sum() == 2 * plan.n


def test_another_alpha_draws_with_the_same_program():
    f, traced = jax.tree_util.Partial(lambda w, z: (seen.append(1), z @ w)[1], WEIGHTS), []
    seen = traced
    smoothing.count(KEY, f, X, PLAN)
    before = len(traced)
    votes = smoothing.count(KEY, f, X, dataclasses.replace(PLAN, alpha=0.02))
    assert len(traced) - before <= 1  # that of the fingerprint
    assert votes.plan.alpha == 0.02


@dataclasses.dataclass
class Unfrozen(smoothing.Noise):
    norm: float = 2.0

    def sample(self, key, shape, dtype):
        return jnp.zeros(shape, dtype)

    def apply(self, x, drawn):
        return x

    def radius(self, p_lower, p_upper=None, x=None):
        return p_lower


def test_noise_of_ones_own_must_be_a_static_argument_with_a_norm():
    with pytest.raises(TypeError, match="frozen dataclass"):
        SmoothingPlan(noise=Unfrozen(), n=100)


def test_numpy_numbers_are_numbers():
    plan = SmoothingPlan(noise=Gaussian(np.float32(0.5)), n=np.int64(100), alpha=np.float32(0.01))
    assert hash(plan) == hash(dataclasses.replace(plan))
    assert (type(plan.n), type(plan.alpha), type(plan.noise.sigma)) == (int, float, float)


def test_what_is_the_same_in_every_row_is_certified_without_a_test_of_it():
    """Operands as large as the batch may differ from row to row; only such models are tried out."""

    def zeros_added(z):
        return integer_net(z) + jnp.zeros((len(z), 3))

    assert may_see_place(zeros_added, (6,), jnp.float32)
    assert not may_see_place(lambda z: integer_net(z) + jnp.arange(3.0), (6,), jnp.float32)
    assert np.array_equal(count(PLAN, zeros_added)[1], count(PLAN)[1])


def test_no_images_are_named():
    with pytest.raises(ValueError, match="no images"):
        count(PLAN, x=X[:0])


MESHES = """
import jax, jax.numpy as jnp, numpy as np
from jaxcert import smoothing
from jaxcert.smoothing import Gaussian, SequentialPlan, SmoothingPlan

W = np.random.default_rng(0).integers(-4, 5, (6, 3)).astype(np.float32)
X = np.random.default_rng(1).integers(0, 3, (5, 6)).astype(np.float32)
f = lambda z: jnp.round(4 * z) @ W
key = jax.random.key(5)
plan = SmoothingPlan(noise=Gaussian(0.5), n0=7, n=50, chunk=4, alpha=0.01)
grouped = SmoothingPlan(noise=Gaussian(0.5), n0=7, n=50, chunk=4, alpha=0.01, group=2)
until = SequentialPlan(noise=Gaussian(0.5), radii=(0.1,), n0=10, n=600, peek=20, slots=2)

def mesh(*shape, axes):
    return jax.make_mesh(shape, axes, devices=jax.devices()[: int(np.prod(shape))])

def same(run, mesh):
    found, reference = jax.tree.leaves(run(mesh)), jax.tree.leaves(run(None))
    assert len(found[0].sharding.device_set) == mesh.size, found[0].sharding
    for a, b in zip(found, reference, strict=True):
        assert np.array_equal(a, b), (mesh, a, b)

assert len(jax.devices()) == 8
two, both = mesh(2, axes=("samples",)), mesh(2, 4, axes=("images", "samples"))
same(lambda mesh: smoothing.count(key, f, X, plan, mesh=mesh), two)
same(lambda mesh: smoothing.count(key, f, X, grouped, mesh=mesh), both)
same(lambda mesh: smoothing.certify_at(key, f, X, until, mesh=mesh), both)
try:
    smoothing.count(key, f, X, plan, mesh=jax.make_mesh((8,), ("data",)))
except ValueError as error:
    assert "name them 'images'" in str(error)
else:
    raise AssertionError("a mesh with other axes passed")
print("equal")
"""

PROCESSES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jaxcert import smoothing
from jaxcert.smoothing import Gaussian, SmoothingPlan
W = np.random.default_rng(0).integers(-4, 5, (6, 3)).astype(np.float32)
X = np.random.default_rng(1).integers(0, 3, (4, 6)).astype(np.float32)
f = jax.tree_util.Partial(lambda w, z: jnp.round(4 * z) @ w, W)
plan = SmoothingPlan(noise=Gaussian(0.5), n0=7, n=50, chunk=4, alpha=0.01)
assert len(jax.devices()) == 2 and len(jax.local_devices()) == 1
for axis in ("samples", "images"):
    mesh = jax.make_mesh((2,), (axis,), axis_types=(AxisType.Auto,))
    votes = smoothing.count(jax.random.key(5), f, X, plan, mesh=mesh)
    print("votes", np.asarray(votes.estimation).tolist(), np.asarray(votes.selection).tolist())
"""


def started(program, *arguments, devices=1):
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_votes_are_the_same_on_one_two_and_eight_devices():
    out, err = started(MESHES, devices=8).communicate(timeout=300)
    assert out.strip() == "equal", err[-2000:]


def test_votes_are_the_same_from_two_processes(free_port):
    both = [started(PROCESSES, f"localhost:{free_port}", str(i)) for i in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    x = np.random.default_rng(1).integers(0, 3, (4, 6)).astype(np.float32)
    plan = dataclasses.replace(PLAN, chunk=4)
    selection, estimation = count(plan, x=x)
    for out, err in said:
        expected = f"votes {estimation.tolist()} {selection.tolist()}"
        votes = [line for line in out.splitlines() if line.startswith("votes")]
        assert votes == [expected, expected], err[-2000:]


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]
