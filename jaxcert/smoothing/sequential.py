"""Certified at these radii? Draws until each image is decided, and no longer."""

import dataclasses
import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcert.certificate import ABSTAIN, Certificate, issue, predicted_class
from jaxcert.floats import ieee_float64
from jaxcert.model import Model, Structure
from jaxcert.pytrees import pytree
from jaxcert.smoothing.arguments import checked, require_votes
from jaxcert.smoothing.certify import confidence, rebuilt
from jaxcert.smoothing.confidence import Boundaries, Hybrid, SequentialTest
from jaxcert.smoothing.devices import everywhere, over_images, require_mesh
from jaxcert.smoothing.noise import Noise
from jaxcert.smoothing.plan import require_counts, require_errors, require_noise
from jaxcert.smoothing.sampling import (
    copies,
    hardware_key,
    noisy_copies,
    number_of_classes,
    prepared,
    threefry_key,
    usable,
)

Array: TypeAlias = jax.Array


@dataclasses.dataclass(frozen=True)
class SequentialPlan:
    """How to decide between "certified" and not at each of some radii; static.

    Attributes:
      noise: the distribution; it determines the norm of the radii.
      radii: the radii asked about, in the units of the input; 0 asks for the prediction alone.
      n0: draws that select the class to certify.
      n: at most this many draws decide; a multiple of `peek`.
      alpha: probability, per input, of a wrong certificate, whatever the number of radii.
      beta: probability, per input and radius, of giving up on what `n` draws would have certified.
        It costs power, never soundness.
      test: what is concluded from the votes so far. The default, `Hybrid()`, spends 0.2 alpha on a
        betting confidence sequence and 0.8 alpha on the Clopper-Pearson bound of all `n` draws.
      peek: draws between two looks.
      slots: images that are worked on at a time; the model runs on batches of slots x peek rows.
      hardware: as for `SmoothingPlan`.

    Raises:
      TypeError, ValueError: for numbers no plan can have.
    """

    noise: Noise
    radii: tuple[float, ...]
    n0: int = 100
    n: int = 100_000
    alpha: float = 1e-3
    beta: float = 1e-3
    test: SequentialTest = dataclasses.field(default_factory=Hybrid)
    peek: int = 100
    slots: int = 4
    hardware: bool = False

    def __post_init__(self):
        require_noise(self.noise)
        require_counts(self, "n0", "n", "peek", "slots")
        require_errors(self, "alpha", "beta")
        if not isinstance(self.test, SequentialTest):
            raise TypeError(f"test must be a SequentialTest, got {self.test!r}; type Hybrid()")
        radii = np.asarray(self.radii)
        known = radii.ndim == 1 and radii.size > 0 and radii.dtype.kind in "iuf"
        if not (known and np.all((radii >= 0) & (radii < np.inf))):
            raise ValueError(
                f"radii must be a tuple of numbers >= 0, got {self.radii!r}; e.g. (0.5,)"
            )
        object.__setattr__(self, "radii", tuple(radii.tolist()))
        if self.n % self.peek or self.n + self.n0 >= 2**31:
            raise ValueError(
                f"n must be a multiple of peek={self.peek} below 2^31, got {self.n}; take "
                f"n={max(1, self.n // self.peek) * self.peek}"
            )

    @property
    def rows(self) -> int:
        """How many rows the model sees at a time."""
        return self.slots * self.peek


@pytree
@dataclasses.dataclass(frozen=True)
class Decisions:
    """What `certify_at` found out about each image.

    Attributes:
      certificate: its radius is the largest of the plan's radii that is certified, and not less
        in the default float type; the prediction is `ABSTAIN` where none is.
      certified: bool (b, r), whether each radius is.
      draws: int32 (b,), how many draws it took, those for selection included.
      class_votes: int32 (b,), how many of the draws - n0 others were for the selected class.
    """

    certificate: Certificate
    certified: Array
    draws: Array
    class_votes: Array


def certify_at(
    key: Array,
    f: Model,
    x: Any,
    plan: SequentialPlan,
    *,
    index: Any = None,
    mesh: Mesh | None = None,
) -> Decisions:
    """Whether the smoothed model predicts one class within each of the plan's radii.

    Draws are made until all radii of an image are decided, which most are soon (Horvath et al.,
    ICLR 2022; Voracek, NeurIPS 2024); then another image takes its place in the batch, so that the
    device stays full. One path of votes and one confidence sequence serve all radii: whoever
    rejects p <= p(r) rejects it for every smaller r, so that the only false certificates are those
    of the smallest wrong radius, and alpha is spent once.

    Arguments and errors are those of `certify`, and a ValueError for a radius that `n` draws cannot
    certify at alpha even if all agree; a mesh is used along its axis "images". The draws
    are those of `certify`, too: numbers 0, 1, ... for the decision, counted down from 2^32 - 1 for
    the selection.

    Returns:
      `Decisions`, of confidence 1 - alpha per input.

    Example:
      >>> from jaxcert import smoothing
      >>> plan = smoothing.SequentialPlan(noise=smoothing.Gaussian(0.5), radii=(0.25, 0.5), n=2000)
      >>> sign = lambda x: jnp.concatenate([x, -x], axis=1)
      >>> found = certify_at(jax.random.key(0), sign, jnp.array([[0.4], [2.0], [0.0]]), plan)
      >>> print(found.certificate.radius, found.certified[1])
      [0.25 0.5  0.  ] [ True  True]
    """
    require_mesh(mesh)
    x, index = checked(key, x, plan, index, SequentialPlan)
    arrays, structure, _ = prepared(f, x, plan)
    # As radii are rounded down in certificates, floats above them are asked about.
    radii = _not_below(plan.radii, jnp.result_type(float))
    asked = _boundaries(plan, tuple(radii.tolist()), x.shape[1:]), radii
    decisions, elected_by = _decide(
        arrays, key, x, index, asked, structure=structure, plan=plan, mesh=mesh
    )
    require_votes(elected_by, plan.noise, x)
    return decisions


def _not_below(radii: tuple[float, ...], dtype: Any) -> np.ndarray:
    """The least floats of a type that are not below the radii."""
    nearest = np.asarray(radii).astype(dtype)
    above = np.nextafter(nearest, np.inf, dtype=dtype)
    return np.where(nearest.astype(np.float64) < radii, above, nearest)


@functools.lru_cache(maxsize=64)
def _boundaries(
    plan: SequentialPlan, radii: tuple[float, ...], shape: tuple[int, ...]
) -> Boundaries:
    p0 = probabilities_needed(plan.noise, radii, shape)
    boundaries = plan.test.boundaries(
        p0, n_max=plan.n, alpha=plan.alpha, peek=plan.peek, beta=plan.beta
    )
    possible = np.any(
        boundaries.certify <= plan.peek * np.arange(1, plan.n // plan.peek + 1)[:, None], 0
    )
    if not np.all(possible):
        bad = [r for r, fine in zip(plan.radii, possible, strict=True) if not fine]
        raise ValueError(
            f"n={plan.n} draws cannot certify the radii {bad} at alpha={plan.alpha}, even if all "
            "agree; leave them out, or take a larger n or wider noise"
        )
    return boundaries


def probabilities_needed(
    noise: Noise, radii: tuple[float, ...], shape: tuple[int, ...]
) -> np.ndarray:
    """For each radius the p_lower that proves it, rounded up; host side, float64 (r,).

    1, which no number of votes proves, where none below 1 does.
    """
    # Radii depend on the inputs' size, or are the smallest at 0 (`Uniform` within the unit box).
    x = np.zeros((1, *shape), np.float32)

    def proves(p: np.ndarray) -> np.ndarray:
        images = np.broadcast_to(x, (len(p), *shape))
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            found = np.asarray(noise.radius(ieee_float64(p), None, images))
        return (found[None] >= np.asarray(radii)[:, None]) & (found[None] > 0)

    # The radius grows with p. Each round looks at 65 points between the ends of the one before.
    low, high = np.full(len(radii), 0.5), np.full(len(radii), np.nextafter(1.0, 0))
    reached = proves(high[:1])[:, 0]
    for _ in range(10):
        for i in range(len(radii)):
            points = np.linspace(low[i], high[i], 65)
            enough = proves(points)[i]
            # The end itself may fail here: another batch shape may compute it to another last bit.
            first = int(np.argmax(enough)) if enough.any() else len(points) - 1
            low[i], high[i] = points[max(first - 1, 0)], points[first]
    needed = high + 1e-12 * (1 - high)  # so a little more is asked for
    return np.where(reached & np.diag(proves(needed)), needed, 1.0)


class _Slots(NamedTuple):
    """What is known of the images in work, one per slot, and where they come from.

    An empty slot holds an image number past the last.
    """

    image: Array  # (s,) which image of the batch
    block: Array  # (s,) which block of draws is next; those for selection come first
    selection: Array  # (s, k) votes
    votes: Array  # (s,) for the selected class, of the blocks after
    verdict: Array  # (s, r) 0 open, 1 certified, -1 given up
    following: Array  # () the image that is next to be taken up


class _Found(NamedTuple):
    """The same of images that are done: (b, ...), and while in work one row more, for no image."""

    top: Array
    elected_by: Array  # votes of the selection
    votes: Array
    draws: Array
    verdict: Array


@functools.partial(jax.jit, static_argnames=("structure", "plan", "mesh"))
def _decide(
    arrays: list,
    key: Array,
    x: Array,
    index: Array,
    asked: tuple[Boundaries, Any],
    *,
    structure: Structure,
    plan: SequentialPlan,
    mesh: Mesh | None,
) -> tuple[Decisions, Array]:
    """Decisions, and how many votes elected the class of each image; `asked` are the radii too."""
    boundaries, radii = asked

    def run(arrays, key, x, index):
        return _run(key, rebuilt(structure, arrays), x, index, boundaries, plan)

    found = over_images(run, mesh, 1)(arrays, key, x, index)
    good = usable(structure, arrays, x, plan.noise, plan.rows)
    certified = (found.verdict == 1) & good[:, None]
    radius = jnp.max(jnp.where(certified, radii, 0), axis=1)
    prediction = jnp.where(jnp.any(certified, axis=1), found.top, ABSTAIN)
    certificate = issue(
        prediction,
        radius,
        norm=plan.noise.norm,
        within=plan.noise.within,
        confidence=confidence(plan.alpha),
    )
    decisions = Decisions(certificate, certified, found.draws, found.votes)
    return everywhere((decisions, found.elected_by), mesh)


def _run(
    key: Array, f: Model, x: Array, index: Array, boundaries: Boundaries, plan: SequentialPlan
) -> _Found:
    """Draw block after block until no image is left."""
    key = hardware_key(key) if plan.hardware else threefry_key(key)
    k = number_of_classes(f, copies(plan.noise, x, plan.rows))
    b, r, s = len(x), len(plan.radii), plan.slots
    zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
    slots = _Slots(
        jnp.arange(s, dtype=jnp.int32),
        zeros(s), zeros((s, k)), zeros(s), zeros((s, r)), jnp.int32(s),
    )  # fmt: skip
    found = _Found(zeros(b + 1), zeros(b + 1), zeros(b + 1), zeros(b + 1), zeros((b + 1, r)))

    def work(state: tuple[_Slots, _Found]) -> tuple[_Slots, _Found]:
        slots, found = state
        classes = _classes(key, f, x, index, slots, plan)
        slots = _judged(_counted(slots, classes, plan), boundaries, plan)
        return _refilled(slots, found, plan)

    slots, found = jax.lax.while_loop(
        lambda state: jnp.any(state[0].image < b), work, (slots, found)
    )
    return _Found(*(part[:b] for part in found))


def _classes(
    key: Array, f: Model, x: Array, index: Array, slots: _Slots, plan: SequentialPlan
) -> Array:
    """The classes predicted for the next block of each slot, (s, peek)."""
    image = jnp.minimum(slots.image, len(x) - 1)
    row = jnp.arange(plan.peek, dtype=jnp.uint32)
    blocks, selecting = _stage(slots, plan)
    number = blocks.astype(jnp.uint32)[:, None] * jnp.uint32(plan.peek) + row
    number = jnp.where(selecting[:, None], ~number, number)

    def copies(each: Array, i: Array, numbers: Array) -> Array:
        return noisy_copies(jax.random.fold_in(key, i), each, numbers, plan.noise)

    # A batch of keys of the device's generator draws from the first of them: an image at a time, no
    # slot's noise is another's, or what an image in its place was shown before.
    work = x[image], index[image], number
    batch = (
        jax.lax.map(lambda slot: copies(*slot), work) if plan.hardware else jax.vmap(copies)(*work)
    )
    rows = batch.reshape(-1, *batch.shape[2:])
    return predicted_class(f(rows)).reshape(plan.slots, plan.peek)


def _selection_blocks(plan: SequentialPlan) -> int:
    return -(-plan.n0 // plan.peek)


def _stage(slots: _Slots, plan: SequentialPlan) -> tuple[Array, Array]:
    """The number of the next block within its stage, and whether that is the selection."""
    first = _selection_blocks(plan)
    selecting = slots.block < first
    return jnp.where(selecting, slots.block, slots.block - first), selecting


def _counted(slots: _Slots, classes: Array, plan: SequentialPlan) -> _Slots:
    """The votes of one more block."""
    block, selecting = _stage(slots, plan)
    k = slots.selection.shape[1]
    row = block[:, None] * plan.peek + jnp.arange(plan.peek)
    counts = selecting[:, None] & (row < plan.n0)
    ballots = jnp.where(counts, classes, ABSTAIN)[:, :, None] == jnp.arange(k)
    selection = slots.selection + jnp.sum(ballots, axis=1, dtype=jnp.int32)
    top = jnp.argmax(slots.selection, axis=1)
    agreeing = jnp.sum(classes == top[:, None], axis=1, dtype=jnp.int32)
    votes = jnp.where(selecting, 0, slots.votes + agreeing)
    return slots._replace(block=slots.block + 1, selection=selection, votes=votes)


def _judged(slots: _Slots, boundaries: Boundaries, plan: SequentialPlan) -> _Slots:
    """The radii that the votes so far decide; what is decided stays so."""
    look = slots.block - _selection_blocks(plan) - 1
    certify, give_up = (
        jnp.asarray(table)[jnp.maximum(look, 0)]
        for table in (boundaries.certify, boundaries.give_up)
    )
    votes = slots.votes[:, None]
    new = (votes >= certify).astype(jnp.int32) - (votes <= give_up).astype(jnp.int32)
    open_ = (slots.verdict == 0) & (look >= 0)[:, None]
    return slots._replace(verdict=jnp.where(open_, new, slots.verdict))


def _refilled(slots: _Slots, found: _Found, plan: SequentialPlan) -> tuple[_Slots, _Found]:
    """Images all of whose radii are decided are put down, and others take their slots."""
    b = len(found.top) - 1
    done = jnp.all(slots.verdict != 0, axis=1)
    place = jnp.where(done, jnp.minimum(slots.image, b), b)
    draws = (slots.block - _selection_blocks(plan)) * plan.peek + plan.n0
    found = _Found(
        found.top.at[place].set(jnp.argmax(slots.selection, axis=1).astype(jnp.int32)),
        found.elected_by.at[place].set(jnp.max(slots.selection, axis=1)),
        found.votes.at[place].set(slots.votes),
        found.draws.at[place].set(draws),
        found.verdict.at[place].set(slots.verdict),
    )
    new = slots.following + jnp.cumsum(done.astype(jnp.int32)) - 1
    fresh = slots._make(
        [
            new,
            *(jnp.zeros_like(part) for part in slots[1:-1]),
            slots.following + jnp.sum(done, dtype=jnp.int32),
        ],
    )

    def replaced(old: Array, made: Array) -> Array:
        return (
            made if old.ndim == 0 else jnp.where(done.reshape(-1, *[1] * (old.ndim - 1)), made, old)
        )

    return jax.tree.map(replaced, slots, fresh), found
