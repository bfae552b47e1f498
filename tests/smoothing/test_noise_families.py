"""Every radius against a numerical Neyman-Pearson solution, every sampler against its law."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxcert.sets import Box
from jaxcert.smoothing import (
    Ablation,
    AnisotropicGaussian,
    BitFlip,
    Ellipsoid,
    ExpInf,
    Gaussian,
    Laplace,
    PowInf,
    Splitting,
    Uniform,
    UniformBall,
)

KEY = jax.random.key(0)
D = 2
PAIRS = np.array([[0.6, 0.4], [0.97, 0.03], [0.55, 0.2], [0.3, 0.1]])


def worst(here, there, p_lower, p_upper):
    """The least P'(A) and the greatest P'(B) over sets with P(A) = p_lower, P(B) = p_upper.

    From cell masses at x and at x', by the lemma of Neyman and Pearson.
    """
    order = np.argsort(there / np.maximum(here, 1e-300) + (here == 0) * 1e300)
    p, q = np.cumsum(here[order]), np.cumsum(there[order])
    low = np.interp(p_lower, np.append(0, p), np.append(0, q))
    p, q = np.cumsum(here[order][::-1]), np.cumsum(there[order][::-1])
    return low, np.interp(p_upper, np.append(0, p), np.append(0, q))


def cells(density, reach, m=301):
    """Masses of a density of (x, y) on a grid, and at a shifted centre."""
    axis = np.linspace(-reach, reach, m)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)

    def masses(shift):
        return density(grid - shift).ravel()

    here = masses(np.zeros(2))
    return lambda shift: (here / here.sum(), masses(shift) / here.sum())


def inf(z):
    return np.abs(z).max(-1)


# name: (noise, density in two dimensions, reach, directions of norm 1, how tight at the worst)
AXIS, DIAGONAL = np.array([1.0, 0.0]), np.array([0.5, 0.5])
ROUND = [np.array([math.cos(t), math.sin(t)]) for t in (0.0, 0.4, 0.8)]
CORNER = [AXIS, np.array([1.0, 1.0]), np.array([1.0, -0.3])]
FAMILIES = {
    "gaussian": (Gaussian(0.5), lambda z: np.exp(-(z**2).sum(-1) / 0.5), 4, ROUND, 1.01),
    "gaussian, inf": (
        Gaussian(0.5, norm=math.inf),
        lambda z: np.exp(-(z**2).sum(-1) / 0.5),
        4,
        CORNER,
        1.01,
    ),
    "gaussian, 1": (
        Gaussian(0.5, norm=1.0),
        lambda z: np.exp(-(z**2).sum(-1) / 0.5),
        4,
        [AXIS, DIAGONAL],
        1.01,
    ),
    "anisotropic": (
        AnisotropicGaussian(Ellipsoid(np.array([0.3, 1.0]))),
        lambda z: np.exp(-((z / [0.3, 1.0]) ** 2).sum(-1) / 2),
        6,
        [np.array([0.3, 0.0]), np.array([0.0, 1.0]), np.array([0.18, 0.8])],
        1.02,
    ),
    "uniform": (Uniform(1.0), lambda z: 1.0 * (inf(z) <= 1), 2.5, [AXIS, DIAGONAL], 1.03),
    "uniform, inf": (
        Uniform(1.0, norm=math.inf),
        lambda z: 1.0 * (inf(z) <= 1),
        2.5,
        CORNER,
        1.03,
    ),
    "ball": (UniformBall(1.0), lambda z: 1.0 * ((z**2).sum(-1) <= 1), 2.5, ROUND, 1.03),
    "laplace": (
        Laplace(0.3),
        lambda z: np.exp(-np.abs(z).sum(-1) / 0.3),
        5,
        [AXIS, DIAGONAL],
        None,
    ),
    "exp": (ExpInf(0.3), lambda z: np.exp(-inf(z) / 0.3), 5, [AXIS, DIAGONAL], None),
    "exp, inf": (
        ExpInf(0.3, norm=math.inf),
        lambda z: np.exp(-inf(z) / 0.3),
        5,
        CORNER,
        None,
    ),
    "exp, power and pole": (
        ExpInf(0.7, power=2.0, pole=0.5),
        lambda z: inf(z) ** -0.5 * np.exp(-((inf(z) / 0.7) ** 2)),
        3,
        [AXIS, DIAGONAL],
        None,
    ),
    "pow": (PowInf(1.0, power=9.0), lambda z: (1 + inf(z)) ** -9.0, 12, [AXIS, DIAGONAL], None),
}


def radius(noise, pairs=PAIRS, d=D):
    return np.asarray(noise.radius(pairs[:, 0], pairs[:, 1], np.zeros((len(pairs), d), "f")))


@pytest.mark.parametrize("name", FAMILIES)
def test_no_pair_of_sets_breaks_the_radius_and_some_pair_comes_close(name):
    noise, density, reach, directions, tight = FAMILIES[name]
    m = 400 if "pole" in name else 301  # an even number of points leaves the pole out
    shifted, radii = cells(density, reach, m), radius(noise)
    broken = np.zeros(len(PAIRS), bool)
    for direction in directions:
        for i, (p, q) in enumerate(PAIRS):
            least, most = worst(*shifted(direction * radii[i]), p, q)
            assert least >= most - 2.5e-2
            least, most = worst(*shifted(direction * radii[i] * (tight or 1.0)), p, q)
            broken[i] |= least <= most + 2.5e-2
    assert radii.all()
    assert tight is None or broken.all()


def test_one_and_two_class_radii_agree_where_they_say_the_same():
    p = np.array([0.51, 0.7, 0.999])
    for noise, *_ in FAMILIES.values():
        one = np.asarray(noise.radius(p, None, np.zeros((3, D), "f")))
        assert np.array_equal(one, radius(noise, np.stack([p, 1 - p], 1)))
        assert (np.diff(one) > 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_proved_of_what_does_not_lead(name):
    noise = FAMILIES[name][0]
    pairs = np.array([[0.5, 0.5], [0.3, 0.4], [np.nan, 0.1], [0.9, np.nan], [1.0, 0.0], [0.0, 0.0]])
    assert np.array_equal(radius(noise, pairs), np.zeros(len(pairs)))


def test_radii_are_of_the_numbers_that_are_drawn():
    """Widths and shapes are rounded to float32 by the samplers, and the radii count that."""
    p, x = np.array([0.9]), np.zeros((1, 3072), "f")
    width = float(np.float32(1.4)) / 2
    assert width < 0.7
    assert float(Splitting(0.7).radius(p)[0]) <= width * 0.8
    for pole in np.linspace(3070.9, 3070.999, 7):
        shape = float(np.float32(3072 - pole))
        exact = 3072 / 3071 / (math.gamma(shape - 1) / math.gamma(shape))
        found = float(ExpInf(1.0, pole=pole).radius(p, None, x)[0])
        assert found <= exact * 0.8 * (1 + 1e-12)
        assert found >= exact * 0.8 * (1 - 1e-5)
    for noise in (Ablation(5), BitFlip(0.1, 0.1), Gaussian(1.0)):
        assert np.asarray(noise.radius(np.array([1.0, 2.0]), None, x[:, :, None].repeat(2, 0)))[
            [0, 1]
        ].tolist() == [0, 0]


def test_a_lead_of_nearly_all_votes_is_not_rounded_up():
    """1 - (pA - pB) cancels there, by 1e-8 of the radius at this pair."""
    p_lower, p_upper = 1 - 1e-10, 1e-12
    with mpmath.workdps(40):
        rest = 1 - mpmath.mpf(p_lower) + mpmath.mpf(p_upper)
        halves = mpmath.log(mpmath.mpf(p_lower) / mpmath.mpf(p_upper)) / 2
        exact = max(-mpmath.log(rest), halves)
    radius = Laplace(1.0).radius(np.array([p_lower]), np.array([p_upper]))
    assert float(np.asarray(radius)[0]) < exact


@pytest.mark.parametrize("noise", [ExpInf(0.01, 2.0), PowInf(1.0, 40.0)])
def test_draws_are_the_same_in_float64_mode(noise):
    drawn = np.asarray(noise.sample(KEY, (5, 3), jnp.float32))
    with jax.enable_x64(True):
        again = np.asarray(noise.sample(KEY, (5, 3), jnp.float32))
    assert np.argmax(np.abs(drawn)) == np.argmax(np.abs(again))
    np.testing.assert_allclose(drawn, again, rtol=1e-5)


def test_known_radii():
    """Formulas as printed in the papers, in plain floating point."""
    p, d = np.array([0.6, 0.9, 0.999]), 50
    x = np.zeros((3, d), "f")
    known = {
        Gaussian(0.25): 0.25 * stats.norm.ppf(p),
        Gaussian(0.25, norm=math.inf): 0.25 * stats.norm.ppf(p) / math.sqrt(d),
        Uniform(0.5): 2 * 0.5 * (p - 0.5),
        Uniform(0.5, norm=math.inf): 2 * 0.5 * (1 - (1.5 - p) ** (1 / d)),
        Laplace(0.5): -0.5 * np.log(2 * (1 - p)),
        ExpInf(0.5, norm=math.inf): 0.5 * np.log(1 / (2 * (1 - p))),
        ExpInf(0.5): 2 * 0.5 * d * (p - 0.5),
        PowInf(0.5, power=70.0): 2 * 0.5 * d / (70 - d) * (p - 0.5),
        UniformBall(3.0): 3.0 * (2 - 4 * stats.beta.ppf(0.75 - p / 2, (d + 1) / 2, (d + 1) / 2)),
    }
    for noise, expected in known.items():
        found = np.asarray(noise.radius(p, None, x))
        assert (found <= expected * (1 + 1e-15)).all()
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_box_improves_the_radius_and_holds_for_all_moves_in_it():
    """At the claimed L1 distance the shared volume is enough, whatever the move within [0, 1]^d."""
    rng = np.random.default_rng(0)
    x = np.clip(rng.uniform(-0.3, 1.3, (40, 4)), 0, 1).astype(np.float32)
    p = rng.uniform(0.55, 0.999, 40)
    noise = Uniform(2.0, unit_box=True)
    found = np.asarray(noise.radius(p, None, x))
    plain = np.asarray(Uniform(2.0).radius(p))
    assert (found >= plain * (1 - 1e-9)).all()
    assert (found > 1.05 * plain).any()
    m = np.maximum(x, 1 - x).astype(float)
    for i in range(40):
        least = 1.0
        for order in itertools.permutations(range(4)):  # vertices of the polytope of moves
            left, share = found[i], 1.0
            for j in order:
                step = min(left, m[i, j])
                share, left = share * max(0, 1 - step / 4.0), left - step
            least = min(least, share)
        whole = found[i] >= m[i].sum() * (1 - 1e-6)
        assert least >= 1.5 - p[i] - 1e-9
        assert whole or least <= 1.5 - p[i] + 1e-6
    assert noise.within == Box(0.0, 1.0)
    outside = np.asarray(noise.radius(np.array([0.9]), None, np.full((1, 4), 1.5, "f")))
    assert outside == 0


def test_threats_are_told_apart_by_their_axes():
    one, other = Ellipsoid(np.ones(3)), Ellipsoid(np.array([1, 1, 2]))
    assert one == Ellipsoid(np.ones(3))
    assert hash(one) == hash(Ellipsoid(np.ones(3)))
    assert one != other
    assert repr(one) != repr(other)


@functools.cache
def drawn(noise, d=6, n=4000):
    keys = jax.random.split(jax.random.key(1), n)
    return np.asarray(jax.jit(jax.vmap(lambda k: noise.sample(k, (d,), jnp.float32)))(keys), float)


def fits(values, law):
    return stats.kstest(values, law).pvalue > 1e-3


def test_draws_follow_their_laws():
    z = drawn(Uniform(0.5))
    assert fits(z.ravel(), stats.uniform(-0.5, 1).cdf)
    z = drawn(Laplace(0.5))
    assert fits(z.ravel(), stats.laplace(0, 0.5).cdf)
    z = drawn(AnisotropicGaussian(Ellipsoid(np.arange(1.0, 7))))
    assert fits((z / np.arange(1, 7)).ravel(), "norm")
    z = drawn(UniformBall(2.0))
    length = np.sqrt((z**2).sum(1))
    assert fits((length / 2) ** 6, "uniform")
    assert fits((z[:, 0] / length) ** 2, stats.beta(0.5, 2.5).cdf)
    assert abs(z.mean(0)).max() < 0.05


@pytest.mark.parametrize(
    ("noise", "law"),
    [
        (ExpInf(0.5), stats.gamma(6, scale=0.5)),
        pytest.param(
            ExpInf(0.5, power=2.0, pole=1.0),
            stats.gengamma(2.5, 2, scale=0.5),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            PowInf(0.5, power=9.0), stats.betaprime(6, 3, scale=0.5), marks=pytest.mark.slow
        ),
    ],
)
def test_lengths_and_directions_of_noise_on_cubes(noise, law):
    z = drawn(noise)
    length = inf(z)
    assert fits(length, law.cdf)
    beside = z[np.arange(len(z)), (np.abs(z).argmax(1) + 1) % 6]
    assert fits(beside / length, stats.uniform(-1, 2).cdf)
    faces = np.bincount(np.abs(z).argmax(1) * 2 + (z.max(1) == length), minlength=12)
    assert stats.chisquare(faces).pvalue > 1e-3


def test_splitting_is_a_threshold_and_its_side():
    noise, x = Splitting(1.5), jnp.array([0.0, 0.25, 1.0, 0.7], jnp.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)
    thresholds = jax.jit(jax.vmap(lambda k: noise.sample(k, (4,), jnp.float32)))(keys)
    seen = np.asarray(jax.vmap(lambda s: noise.apply(x, s))(thresholds))
    s = np.asarray(thresholds)
    assert fits(s.ravel().astype(float), stats.uniform(0, 3).cdf)
    np.testing.assert_allclose(seen, (np.minimum(s, 1) + (np.asarray(x) > s)) / 2, rtol=1e-6)
    p = np.array([0.6, 0.99])
    np.testing.assert_allclose(noise.radius(p), 2 * 1.5 * (p - 0.5), rtol=1e-12)
    assert noise.usable(jnp.array([[0.0, 1.0], [0.5, 1.1], [jnp.nan, 0.0]])).tolist() == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(("places", "keep"), [(6, 2), (7, 1), (8, 5)])
def test_ablation_radius_is_that_of_counting_subsets(places, keep):
    p = np.linspace(0.5, 0.9999, 60)
    q = np.where(np.arange(60) % 2, 1 - p, (1 - p) / 3)
    x = np.zeros((60, places, 3), "f")
    found = np.asarray(Ablation(keep).radius(p, q, x))
    for i in range(60):
        best = 0
        for rho in range(1, places + 1):
            seen = np.mean(
                [min(s) < rho for s in itertools.combinations(range(places), keep)]
            )  # the first rho pixels are changed
            best = rho if p[i] - seen > q[i] + seen + 1e-9 else best
        assert found[i] == best


def test_ablation_shows_a_random_subset_and_nothing_else():
    noise, x = Ablation(2), jnp.arange(1.0, 11.0).reshape(5, 2) / 16
    keys = jax.random.split(jax.random.key(0), 5000)
    kept = np.asarray(jax.jit(jax.vmap(lambda k: noise.sample(k, (5, 2), jnp.float32)))(keys))
    assert kept.shape == (5000, 5, 1)
    assert (kept.sum((1, 2)) == 2).all()
    subsets = np.unique(kept[:, :, 0] @ (1 << np.arange(5)), return_counts=True)[1]
    assert len(subsets) == 10
    assert stats.chisquare(subsets).pvalue > 1e-3
    shown = np.asarray(noise.apply(x, jnp.asarray(kept[0])))
    expected = np.concatenate([x, 1 - x], 1) * kept[0]
    assert np.array_equal(shown, expected)


@settings(max_examples=20)
@given(st.floats(0.01, 0.45), st.floats(0.01, 0.45), st.floats(0.5001, 0.9999))
def test_bit_flips_against_all_outputs(add, delete, p):
    """Neyman and Pearson on all 2^4 outputs, for every pair of inputs."""
    add, delete = np.float32(add).item(), np.float32(delete).item()
    one = np.array([[1 - add, add], [delete, 1 - delete]])  # P(output | input)
    outputs = list(itertools.product((0, 1), repeat=4))

    def law(x):
        return np.array([math.prod(one[a, b] for a, b in zip(x, y, strict=True)) for y in outputs])

    holds = [True] * 5
    for x, other in itertools.product(outputs, outputs):
        flips = sum(a != b for a, b in zip(x, other, strict=True))
        holds[flips] &= bool(worst(law(x), law(other), p, 0)[0] > 0.5 + 1e-9)
    best = next((r for r in range(4) if not holds[r + 1]), 4)
    found = float(BitFlip(add, delete, most=4).radius(np.array([p]))[0])
    assert found == best


def test_bit_flips_are_drawn_with_their_probabilities():
    noise, x = BitFlip(0.1, 0.6), jnp.array([0.0, 1.0])
    keys = jax.random.split(jax.random.key(2), 40_000)
    copies = np.asarray(jax.jit(jax.vmap(lambda k: noise.perturb(k, x)))(keys))
    assert set(np.unique(copies)) == {0.0, 1.0}
    np.testing.assert_allclose(copies.mean(0), [0.1, 0.4], atol=0.01)
    assert noise.usable(jnp.array([[0.0, 1.0], [0.5, 1.0]])).tolist() == [True, False]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Gaussian(0.0), "sigma must be a positive number"),
        (lambda: Gaussian(0.5, norm=3), "proves radii in the norms"),
        (lambda: Uniform(0.5, norm=math.inf, unit_box=True), "improves L1"),
        (lambda: Uniform(math.nan), "width must be"),
        (lambda: ExpInf(0.5, power=2.0, norm=math.inf), "power=1.0 and pole=0.0"),
        (lambda: ExpInf(0.5, pole=-1.0), "pole must be 0 or more"),
        (lambda: ExpInf(0.5).sample(jax.random.key(0), (1,), jnp.float32), "2 coordinates"),
        (lambda: PowInf(0.5, power=3.0).radius(0.9, None, np.zeros(4)), "above d, got d = 4"),
        (lambda: Splitting(0.3), "at least 0.5"),
        (lambda: Ablation(0), "keep must be"),
        (lambda: Ablation(9).radius(0.9, None, np.zeros((3, 3, 1))), "more than 9"),
        (lambda: BitFlip(0.5, 0.6), "below 1"),
        (lambda: BitFlip(0, 0.6), "must be a float"),
        (lambda: UniformBall(1.0).radius(0.9), "depends on the inputs"),
        (lambda: Ellipsoid(np.array([1.0, -1.0])), "positive and finite"),
        (
            lambda: AnisotropicGaussian(Ellipsoid(np.ones(3))).sample(
                jax.random.key(0), (4,), jnp.float32
            ),
            "inputs of shape",
        ),
    ],
)
def test_bad_noise_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
