"""Patches: the decision against every vote of the touched windows, certificates against every patch
of tiny images."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxcert.certificate import ABSTAIN
from jaxcert.smoothing.patches import (
    Patch,
    VoteAbove,
    Windows,
    _masks,
    _touched,
    blocks,
    certify,
    columns,
    decide,
    one_vote,
    rows,
    with_complement,
    with_mask,
    zeroed,
)

decided = jax.jit(lambda v, r, c: decide(v, np.array(r), np.array(c)), static_argnums=(1, 2))


def touched_by_hand(size, length, stride, patch):
    """The windows of an axis that hold a pixel of a patch, for each place of it."""
    table = []
    for place in range(size - patch + 1):
        pixels = set(range(place, place + patch))
        windows = [{(s + i) % size for i in range(length)} for s in range(0, size, stride)]
        table.append([bool(pixels & window) for window in windows])
    return np.array(table)


@given(st.integers(1, 9), st.data())
def test_touched_windows_are_counted_one_by_one(size, data):
    length, patch = (data.draw(st.integers(1, size)) for _ in range(2))
    stride = data.draw(st.integers(1, 3))
    masks, _ = _masks(Windows(length, 1, stride), (size, 1))
    touched = _touched(masks, patch)
    assert np.array_equal(touched, touched_by_hand(size, length, stride, patch))
    if stride == 1:
        assert touched.sum(1).max() <= patch + length - 1


def test_a_stride_that_does_not_divide_the_image_touches_more():
    """224 pixels, columns of 19 every 10, patches of 32: ceil((32 + 19 - 1) / 10) = 5, but 6 is
    true."""
    masks = _masks(columns(19, stride=10), (224, 224))
    assert masks[0].shape == (1, 224)
    assert _touched(masks[1], 32).sum(1).max() == 6


def vote_of(table, touched, ballot):
    """The class of the most votes after the touched windows vote anew; of equals the first."""
    changed = table.copy()
    changed[touched] = 0
    for (i, j), label in zip(np.argwhere(touched), ballot, strict=True):
        changed[i, j, label] = 1
    return int(np.argmax(changed.sum((0, 1))))


ROWS = ((True, False), (True, True))  # two places of a patch, two windows along this axis
COLUMNS = ((True, True, False, False), (False, True, True, False), (True, False, False, True))


@given(st.lists(st.integers(0, 3), min_size=8, max_size=8))
@example([1] * 8)  # four of eight windows touched: a tie, which class 0 wins
@example([0] * 8)
def test_the_decision_is_exact(labels):
    """Certified if and only if no votes of the windows touched anywhere change the class."""
    k = 3  # label 3 is no vote
    labels = np.array(labels).reshape(2, 4)
    table = (labels[..., None] == np.arange(k)).astype(np.int32)
    top, safe = decided(jnp.asarray(table), ROWS, COLUMNS)
    total = table.sum((0, 1))
    if total.max() == 0:
        assert int(top) == ABSTAIN
        assert not safe
        return
    assert int(top) == np.argmax(total)
    kept = all(
        vote_of(table, np.outer(r, c), ballot) == top
        for r in ROWS
        for c in COLUMNS
        for ballot in itertools.product(range(k), repeat=int(np.outer(r, c).sum()))
    )
    assert bool(safe) == kept
    worst = max(np.outer(r, c).sum() for r in ROWS for c in COLUMNS)
    others = [total[b] + 2 * worst + (b < top) for b in range(k) if b != top]
    if total[top] >= max(others):  # the rule of the counts alone
        assert safe


@given(st.lists(st.integers(0, 2), min_size=12, max_size=12))
def test_the_decision_follows_from_the_rule_of_the_counts(votes):
    labels = np.array([votes[i % 12] if i % 3 else 1 for i in range(40)]).reshape(1, 40)
    table = (labels[..., None] == np.arange(3)).astype(np.int32)
    touched = touched_by_hand(40, 2, 1, 3)  # D = 4
    top, safe = decided(jnp.asarray(table), ((True,),), tuple(map(tuple, touched.tolist())))
    total = table.sum((0, 1))
    if all(total[top] >= total[b] + 2 * 4 + (b < top) for b in range(3) if b != top):
        assert safe


def model_of_a_table(seed, k=3):
    """Any function of the encoded window: a random table looked up by a hash of its bits. Windows
    with a one in them are rather of class 1, so that something can be certified."""
    table = jnp.asarray(np.random.default_rng(seed).normal(size=(97, k)), jnp.float32)

    def f(z):
        flat = z.reshape(z.shape[0], -1)
        powers = jnp.asarray(np.random.default_rng(1).integers(1, 97, flat.shape[1]), jnp.float32)
        code = (flat @ powers).astype(jnp.int32) % 97
        bright = jnp.any(z[..., 0] > 0, axis=(1, 2))[:, None]
        return table[code] + jnp.asarray([0.0, 2.0, 0.0]) * bright

    return f


@pytest.mark.parametrize(
    ("windows", "patch", "encode"),
    [
        (columns(1), Patch(3, 1), with_complement),
        (blocks(1), Patch(1, 1), with_complement),
        (Windows(2, 1), Patch(2, 1), with_mask),
    ],
    ids=["columns", "blocks", "windows"],
)
def test_no_patch_on_a_tiny_image_changes_a_certified_class(windows, patch, encode):
    """All places of the patch on five images, and all contents of zeros and ones."""
    h, w = 4, 5
    ones = np.linspace(0.05, 0.9, 5)[:, None, None, None]
    x = (np.random.default_rng(5).uniform(size=(5, h, w, 1)) < ones).astype(np.float32)
    images = list(x)
    for image, a, b in itertools.product(x, range(h - patch.height + 1), range(w + 1)):
        for content in itertools.product((0.0, 1.0), repeat=patch.height * patch.width):
            if b + patch.width <= w:
                attacked = image.copy()
                spot = np.reshape(content, (patch.height, patch.width, 1))
                attacked[a : a + patch.height, b : b + patch.width] = spot
                images.append(attacked)
    images = jnp.asarray(np.stack(images))
    certificate = certify(model_of_a_table(0), images, patch, windows, encode=encode, chunk=20)
    predicted, certified = (np.asarray(v) for v in (certificate.prediction, certificate.radius))
    assert set(certified[:5].tolist()) == {0, 1}
    assert (certificate.norm, certificate.within) == (patch, None)
    assert np.all(certificate.confidence == 1)
    attacked = predicted[5:].reshape(5, -1)
    assert np.all((attacked == predicted[:5, None]) | (certified[:5, None] == 0))
    assert np.any(attacked != predicted[:5, None])


def test_the_vote_is_that_of_all_windows():
    x = np.random.default_rng(0).integers(0, 2, (3, 4, 5, 1)).astype(np.float32)
    f = model_of_a_table(3)
    # Chunks of 7 leave one row of the last to fill up.
    certificate = certify(f, jnp.asarray(x), Patch(2, 2), blocks(2), chunk=7)
    masks = np.zeros((20, 4, 5, 1), np.float32)
    for mask, (i, j) in zip(masks, np.ndindex(4, 5), strict=True):
        mask[np.ix_([i, (i + 1) % 4], [j, (j + 1) % 5])] = 1
    for image, prediction in zip(x, certificate.prediction, strict=True):
        seen = np.concatenate([image * masks, (1 - image) * masks], axis=-1)
        votes = np.bincount(np.argmax(f(jnp.asarray(seen)), axis=1), minlength=3)
        assert np.argmax(votes) == prediction


def test_bands_and_blocks():
    assert (columns(3), rows(3, 2)) == (Windows(None, 3), Windows(3, None, 2))
    assert blocks(3) == Windows(3, 3, 1)


def test_encodings():
    image, mask = np.full((2, 2, 1), 0.25), np.array([[[1.0], [0.0]]] * 2)
    seen = image * mask
    assert with_complement(seen, mask).tolist() == [[[0.25, 0.75], [0.0, 0.0]]] * 2
    assert with_mask(seen, mask).tolist() == [[[0.25, 1.0], [0.0, 0.0]]] * 2
    assert zeroed(seen, mask).tolist() == [[[0.25], [0.0]]] * 2


def test_several_votes_none_and_spoilt_ones():
    logits = jnp.log(jnp.array([[0.45, 0.45, 0.1], [0.9, 0.06, 0.04], [0.34, 0.33, 0.33]]))
    above = VoteAbove(0.4)
    assert above(logits).tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    spoilt = logits.at[0, 2].set(jnp.nan)
    assert not above(spoilt)[0].any()
    assert not one_vote(spoilt)[0].any()


def test_bad_arguments_say_what_to_type():
    x = jnp.ones((1, 4, 4, 1))
    for change, error, words in (
        ({"patch": (2, 2)}, TypeError, "Patch"),
        ({"x": jnp.ones((4, 4, 1))}, ValueError, "b, h, w, c"),
        ({"patch": Patch(5, 1)}, ValueError, "height is 4"),
        ({"windows": columns(6)}, ValueError, "width is 4"),
        ({"chunk": 0}, ValueError, "chunk"),
    ):
        good = {"f": one_vote, "x": x, "patch": Patch(1, 1), "windows": columns(2)}
        with pytest.raises(error, match=words):
            certify(**{**good, **change})
    with pytest.raises(ValueError, match="positive"):
        Patch(0, 1)


def test_one_class_is_refused():
    """All votes gone is another outcome than the class, which the counts of others do not show."""
    one = {"f": lambda z: z.sum((1, 2, 3))[:, None], "vote": lambda logits: logits > 0}
    with pytest.raises(ValueError, match="at least 2 classes"):
        certify(x=jnp.ones((1, 4, 4, 1)), patch=Patch(4, 4), windows=columns(2), **one)
