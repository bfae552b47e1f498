"""Ranges of hidden values that were tightened by splitting, against enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import least_row
from nets import net, random_weights

from jaxcert import Box, LinfBall, Reason, Spec, Status
from jaxcert.errors import UnsupportedEquation
from jaxcert.exact import Budget, ranges, tightening, verify
from jaxcert.exact.branching import Options
from jaxcert.exact.model import Traceable
from jaxcert.exact.outline import outline
from jaxcert.exact.question import question
from jaxcert.model import split

ENDS = np.array([[-1.0, -0.5]]), np.array([[0.5, 1.0]])
OPTIONS = Options()


def ranges_of(f, splits):
    """Ranges of the net's hidden values on the box, before and after that many splits of each."""
    with jax.enable_x64(True):
        arrays, structure = split(f, jnp.zeros((1, 2), jnp.float32))
        model = Traceable(structure, (2,), jnp.dtype("float32"), False, ())
        box = Box(*map(jnp.asarray, ENDS))
        asked = question(box, Spec(np.eye(3)[:1], np.zeros(1)), 1, 3)
        known = jax.jit(lambda a: ranges.ranges(model, a, box, 1))(arrays)
        start = jax.jit(lambda a, k: ranges.beginning(model, OPTIONS, a, asked, k, 0))
        like = start(arrays, known)
        before, owner, gains = known, np.zeros(1, int), np.ones_like(known.lower)
        (targets,) = [t for t in tightening.targets(known, owner, gains) if len(t)]
        mine = jax.tree.map(lambda a: jnp.asarray(a)[targets.owner], asked)
        values = jax.jit(
            lambda a, s: tightening.bounds(
                model, OPTIONS, splits, a, mine, targets.place, targets.sign, s
            )
        )(arrays, tightening.beginning(known, targets, like))
        return before, tightening.entered(known, targets, values)


@pytest.mark.slow
def test_ranges_hold_and_are_tighter():
    weights = random_weights(7)
    before, after = ranges_of(net(weights), 15)
    assert before.layout.sizes == (5, 5)
    least, most = [], []
    for row in np.eye(5):
        least.append(least_row(weights[:2], *[e[0] for e in ENDS], row[None], np.zeros(1)))
        most.append(-least_row(weights[:2], *[e[0] for e in ENDS], -row[None], np.zeros(1)))
    slack = 1e-6  # of the enumeration's linear programs
    for known in (before, after):
        assert np.all(known.lower[0, 5:] <= np.array(least) + slack)
        assert np.all(known.upper[0, 5:] >= np.array(most) - slack)
    around_zero = (before.lower[0, 5:] < 0) & (before.upper[0, 5:] > 0)
    assert around_zero.sum() >= 2
    exact, was, now = (
        (high - low)[np.asarray(around_zero)].sum()
        for high, low in (
            (np.array(most), np.array(least)),
            (before.upper[0, 5:], before.lower[0, 5:]),
            (after.upper[0, 5:], after.lower[0, 5:]),
        )
    )
    assert now - exact < 0.5 * (was - exact)


@pytest.mark.slow
def test_the_first_layer_is_not_touched():
    weights = random_weights(7)
    before, after = ranges_of(net(weights), 1)
    assert np.array_equal(before.lower[:, :5], after.lower[:, :5])


def residual_values(weights, x):
    """All hidden values of a net whose branches begin and end at different depths."""
    first = x @ weights[0]
    second = jnp.maximum(first, 0) @ weights[1]
    third = jnp.maximum(second, 0) @ weights[2] + jnp.maximum(first, 0)
    fourth = jnp.maximum(third, 0) @ weights[3] + second - jnp.maximum(first, 0)
    return first, second, third, fourth


def residual(weights, x):
    return jnp.maximum(residual_values(weights, x)[-1], 0)[:, :2]


@pytest.mark.slow
def test_slopes_of_all_layers_in_one_pass():
    """Rows of several layers are pulled back together through skip connections."""
    rng = np.random.default_rng(3)
    weights = [jnp.asarray(rng.normal(size=(n, 6)).astype("f") / 2) for n in (4, 6, 6, 6)]
    f = jax.tree_util.Partial(residual, weights)
    centre = rng.normal(size=(1, 4))
    with jax.enable_x64(True):
        arrays, structure = split(f, jnp.zeros((1, 4), jnp.float32))
        model = Traceable(structure, (4,), jnp.dtype("float32"), False, ())
        box = Box(jnp.asarray(centre - 0.5), jnp.asarray(centre + 0.5))
        before = jax.jit(lambda a: ranges.ranges(model, a, box, 1))(arrays)
        once = jax.jit(lambda a, k: ranges.with_slopes(model, a, box, k, 64))
        after = once(arrays, once(arrays, before))
    assert before.layout.sizes == (6, 6, 6, 6)
    points = centre + rng.uniform(-0.5, 0.5, (20_000, 4))
    values = np.concatenate(residual_values([np.float64(w) for w in weights], points), 1)
    for known in (before, after):
        assert np.all(known.lower[0] <= values.min(0))
        assert np.all(known.upper[0] >= values.max(0))
    widths = [np.asarray(known.upper - known.lower)[0].reshape(4, 6) for known in (before, after)]
    assert np.all(widths[1] <= widths[0])
    assert np.all(widths[1].sum(1)[2:] < 0.98 * widths[0].sum(1)[2:])


def attention(x):
    """`jnp.matmul` squeezes axes of size 1, so that a batch of one has other equations."""
    tokens = jnp.maximum(x.reshape(-1, 2, 4) - 0.25, 0)
    heads = tokens.reshape(len(x), 2, 2, 2).transpose(0, 2, 1, 3)
    scores = jnp.matmul(heads, heads.transpose(0, 1, 3, 2))
    mixed = jnp.matmul(jax.nn.softmax(scores), heads)
    flat = mixed.transpose(0, 2, 1, 3).reshape(len(x), 8)
    return jnp.maximum(flat - 0.1, 0)[:, :3]


def test_a_batch_of_one_with_other_equations():
    """Hidden ranges found for a batch of one were taken for other values of larger batches."""
    arrays, structure = split(attention, jnp.zeros((1, 8)))
    model = Traceable(structure, (8,), jnp.dtype("float32"), False, ())
    with jax.enable_x64(True):
        assert model.least_batch(arrays) == 2


@pytest.mark.slow
def test_attention_is_decided():
    x = np.linspace(0, 1, 8, dtype="f")[None]
    points = x + np.random.default_rng(0).uniform(-0.05, 0.05, (10_000, 8)).astype("f")
    lowest = float(np.asarray(attention(jnp.asarray(points)))[:, 2].min())
    ball = LinfBall(jnp.asarray(x), 0.05)
    row = jnp.eye(3)[2:]
    ask = {"budget": Budget(seconds=600, domains=100), "split_inputs": False}
    violated = verify(attention, ball, Spec(row, jnp.array([-lowest])), **ask)
    assert violated.status.tolist() == [Status.FALSIFIED]
    held = verify(attention, ball, Spec(row, jnp.array([0.5 - lowest])), **ask)
    assert held.status.tolist() == [Status.VERIFIED], Reason(int(held.reason[0]))


def reordered(x):
    """The order in which `jnp.einsum` contracts depends on the batch."""
    h = x @ (jnp.arange(24.0).reshape(3, 8) / 24)
    w = 0.05 * jnp.eye(8)
    return jnp.einsum("bi,ij,jk,bk->b", h, w, w, h)[:, None] + x[:, :1]


def test_equations_of_the_same_sizes_in_another_order_are_noticed():
    """Ranges of one operand were taken for those of another of the same size."""
    arrays, structure = split(reordered, jnp.zeros((1, 3)))
    model = Traceable(structure, (3,), jnp.dtype("float32"), False, ())
    with jax.enable_x64(True):
        one, two, many = (outline(model.trace(arrays, n)[0], n) for n in (1, 2, 64))
        assert one.alike(two)
        assert not two.alike(many)
        with pytest.raises(UnsupportedEquation, match="split_inputs=True"):
            model.least_batch(arrays)


def swapped(weights, x):
    first, second = weights[::-1] if len(x) > 2 else weights
    return jnp.maximum(jnp.maximum(x @ first, 0) @ second, 0)


def test_weights_in_another_order_are_noticed():
    f = jax.tree_util.Partial(swapped, [jnp.eye(2), 2 * jnp.eye(2)])
    arrays, structure = split(f, jnp.zeros((1, 2)))
    model = Traceable(structure, (2,), jnp.dtype("float32"), False, ())
    with jax.enable_x64(True), pytest.raises(UnsupportedEquation, match="split_inputs=True"):
        model.least_batch(arrays)


def branching(x):
    return jnp.maximum(x - 0.25, 0) * (jnp.array([1.0, 2.0]) if len(x) > 2 else jnp.ones(2))


def test_other_constants_are_noticed():
    arrays, structure = split(branching, jnp.zeros((1, 2)))
    model = Traceable(structure, (2,), jnp.dtype("float32"), False, ())
    with jax.enable_x64(True):
        one, two, three = (outline(model.trace(arrays, n)[0], n) for n in (1, 2, 3))
    assert one.alike(two)
    assert not two.alike(three)


def test_a_batch_of_one_with_the_same_equations():
    arrays, structure = split(net(random_weights(0)), jnp.zeros((1, 2)))
    model = Traceable(structure, (2,), jnp.dtype("float32"), False, ())
    with jax.enable_x64(True):
        assert model.least_batch(arrays) == 1
