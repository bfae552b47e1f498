"""Smoothing over a data set, with the votes on record: resumed, merged, and bounded anew."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxcert import smoothing
from jaxcert.certificate import Certificate
from jaxcert.errors import RecordMismatch
from jaxcert.evaluate import records
from jaxcert.evaluate.results import Results, from_records, require_fields, to_records
from jaxcert.evaluate.run import Certifier, require_same_images, run
from jaxcert.model import Model, digest
from jaxcert.smoothing import SequentialPlan, SmoothingPlan, Votes
from jaxcert.smoothing.arguments import require_images
from jaxcert.smoothing.plan import as_error
from jaxcert.smoothing.sampling import copies

METHOD = "randomized smoothing"


def run_smoothing(
    seed: int,
    f: Model,
    x: Any,
    labels: Any,
    plan: SmoothingPlan | SequentialPlan,
    *,
    net: str | None = None,
    path: str | os.PathLike[str] | None = None,
    also: Sequence[float] = (),
    index: Any = None,
    batch: int | None = None,
    mesh: Mesh | None = None,
    progress: bool | None = None,
) -> Results:
    """`run` with the smoothed model, every record holding the votes its certificate rests on.

    The log's header holds all that the votes depend on: the seed, the noise, the numbers of draws,
    alpha, the net's name and a digest of its weights, the images' shape. A killed run continues
    where it was; what it had finished stays, and an image it was at begins anew with the same
    draws, so that the end is the same (with the hardware generator, with other draws). Nothing is
    concluded from the draws of an image that is not finished, and a finished log is never continued
    with a larger n: stopping as soon as a bound passes would raise alpha tenfold.

    Args:
      seed: of the key; the draws of image i depend on it and on index[i].
      f: the model, (b, *input) -> (b, k).
      x, labels, index, progress: as for `run`.
      batch: images that are on record together. Default: for a `SmoothingPlan`, which draws for one
        image after the other, a handful; for a `SequentialPlan`, whose images share batches, 100.
      plan: a `SmoothingPlan`, for radii; or a `SequentialPlan`, for "certified at these radii?"
        with as few draws as it takes.
      net: a name for the model and its weights; required with `path`.
      path: the log.
      also: further values of alpha at which `rebound` may be called, fixed before the draws.
      mesh: devices of this process, as for `smoothing.certify`. Processes of a cluster take images
        and a log each, and `merge` puts the logs together (`examples/smoothing_cluster.py`).

    Returns:
      `Results`.

    Raises:
      As `run` and `smoothing.certify`.
    """
    if path is not None and net is None:
        raise ValueError('a log needs a name for the net: pass net="lenet, epoch 90"')
    if (
        path is not None
        and mesh is not None
        and len({d.process_index for d in mesh.devices.flat}) > 1
    ):
        raise ValueError(
            "a log belongs to one process: give each its own images, path and a mesh of its "
            "jax.local_devices(), and put the logs together with evaluate.merge"
        )
    if not isinstance(plan, SmoothingPlan | SequentialPlan):
        raise TypeError(f"plan must be a SmoothingPlan or a SequentialPlan, got {plan!r}")
    also = [as_error(alpha, "also=(1e-3,), each of which") for alpha in np.ravel(also).tolist()]
    batch = _batch(plan, mesh) if batch is None else batch
    if isinstance(plan, SmoothingPlan) and batch % plan.group:
        raise ValueError(f"batch={batch} must be a multiple of the plan's group={plan.group}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2^32), got {seed}; others give keys of these")
    key = jax.random.key(seed)
    first = require_images(x[:1])
    config = None
    if path is not None:
        config = {
            "method": METHOD,
            "net": net,
            "seed": seed,
            "generator": str(jax.random.key_impl(key)),
            "also": also,
            "weights": digest(f, copies(plan.noise, first, plan.rows)),
            **_inputs(x),
            **described(plan),
        }
    certifier = _certifier(key, f, plan, mesh)
    return run(
        certifier,
        x,
        labels,
        index=index,
        batch=batch,
        path=path,
        config=config,
        progress=progress,
        together=plan.group if isinstance(plan, SmoothingPlan) else 1,
    )


def _batch(plan: SmoothingPlan | SequentialPlan, mesh: Mesh | None) -> int:
    """How many images are certified between two writes to the log."""
    if isinstance(plan, SequentialPlan):
        return 100
    return 4 * plan.group * (1 if mesh is None else mesh.shape.get("images", 1))


def _certifier(
    key: jax.Array, f: Model, plan: SmoothingPlan | SequentialPlan, mesh: Mesh | None
) -> Certifier:
    """The certificates of a batch, and the votes that they rest on."""

    def until_decided(images: Any, numbers: Any) -> tuple[Certificate, Mapping[str, Any]]:
        assert isinstance(plan, SequentialPlan)
        found = smoothing.certify_at(key, f, jnp.asarray(images), plan, index=numbers, mesh=mesh)
        names = ("certified", "draws", "class_votes")
        return found.certificate, {name: getattr(found, name) for name in names}

    def all_draws(images: Any, numbers: Any) -> tuple[Certificate, Mapping[str, Any]]:
        assert isinstance(plan, SmoothingPlan)
        images = jnp.asarray(images)
        votes = smoothing.count(key, f, images, plan, index=numbers, mesh=mesh)
        details = {"selection": votes.selection, "estimation": votes.estimation}
        return smoothing.bound(votes, images, plan), details

    return until_decided if isinstance(plan, SequentialPlan) else all_draws


def _inputs(x: Any) -> dict[str, Any]:
    return {"input": list(np.shape(x)[1:]), "dtype": str(x.dtype)}


def described(plan: SmoothingPlan | SequentialPlan) -> dict[str, Any]:
    """A plan in JSON types: its kind, and each field; distributions and tests as text."""
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    plain = {
        name: value if isinstance(value, int | float) else list(value)
        for name, value in fields.items()
        if isinstance(value, int | float | tuple)
    }
    named = {name: _text(value) for name, value in fields.items() if name not in plain}
    return {"plan": type(plan).__name__, **plain, **named}


def _text(value: Any, name: str = "") -> str:
    """A distribution or a test, the same in every process and for numbers of every type."""
    if callable(value):
        text = f"{value.__module__}.{value.__qualname__}"
        if "<" in text:
            raise ValueError(
                f"a record cannot tell {text} from another function; define it by name at the top "
                "of a module"
            )
        return text
    if isinstance(value, float) or name == "norm":
        return repr(float(value)) if isinstance(value, int | float) else repr(value)
    if not dataclasses.is_dataclass(value) or isinstance(value, smoothing.Ellipsoid):
        return repr(value)
    parts = (f"{f.name}={_text(getattr(value, f.name), f.name)}" for f in dataclasses.fields(value))
    return f"{type(value).__name__}({', '.join(parts)})"


def rebound(
    path: str | os.PathLike[str], x: Any, plan: SmoothingPlan, *, index: Any = None
) -> Results:
    """The certificates that the votes in a log prove under another alpha, or in another norm.

    No draw is made. alpha bounds the probability of an error only if it was fixed before the draws
    were made: results at an alpha that is not in the log's header (its own, or one of `also`) say
    that they are `post_hoc`, and describe the votes without the guarantee.

    Args:
      path: a log of `run_smoothing` with a `SmoothingPlan`.
      x: the images (m, *input) of the log.
      plan: as in the log, but for alpha, runner_up and the norm of the noise.
      index: int (m,), the numbers of the images; default arange(m).

    Raises:
      RecordMismatch: the log is of another kind, lacks an image, or was drawn under another plan or
        for other images.
    """
    recorded = records.read(path)
    require_fields(recorded.records, path)
    config = recorded.config
    if not isinstance(plan, SmoothingPlan):
        raise TypeError(f"plan must be a SmoothingPlan, got {type(plan).__name__}")
    if config.get("plan") == SequentialPlan.__name__:
        raise RecordMismatch(
            f"{path} is of a SequentialPlan: its draws stopped where alpha said so, and prove "
            "nothing at another one"
        )
    free = ("alpha", "runner_up")
    wanted = {name: value for name, value in described(plan).items() if name not in free}
    wanted |= _inputs(x)
    if config.get("noise") in [_text(noise) for noise in _in_any_norm(plan.noise)]:
        wanted["noise"] = config["noise"]
    differing = [name for name in wanted if config.get(name) != wanted[name]]
    if config.get("method") != METHOD or differing:
        raise RecordMismatch(
            f"{path} was drawn under another plan: {', '.join(differing) or 'another method'}; "
            "only alpha, runner_up and the norm of the noise may differ"
        )
    found = {record["index"]: record for record in recorded.records}
    index = np.arange(len(x)) if index is None else np.asarray(index)
    missing = [i for i in index.tolist() if i not in found]
    if missing:
        raise RecordMismatch(f"{path} lacks {len(missing)} of the images, such as {missing[0]}")
    kept = [found[i] for i in index.tolist()]
    rows = {i: row for row, i in enumerate(index.tolist())}
    require_same_images({i: found[i] for i in rows}, x, rows, path)
    selection, estimation = (
        jnp.array([r[name] for r in kept], jnp.int32) for name in ("selection", "estimation")
    )
    votes = Votes(selection, estimation, plan)
    certificate = smoothing.bound(votes, jnp.asarray(x), plan)
    # Of two ways to bound the same votes, the better one has the errors of both.
    announced = [config["alpha"], *config["also"]] if plan.runner_up == config["runner_up"] else []
    labels = np.array([record["label"] for record in kept])
    results = from_records(to_records(certificate, index, labels, 0.0))
    return dataclasses.replace(
        results,
        seconds=np.array([record["seconds"] for record in kept]),
        post_hoc=plan.alpha not in announced,
    )


def _in_any_norm(noise: Any) -> list[Any]:
    """A distribution with each of the norms that it proves radii in."""
    known = [noise]
    if any(f.name == "norm" and f.init for f in dataclasses.fields(noise)):
        for norm in (1.0, 2.0, float("inf")):
            with contextlib.suppress(ValueError):
                known.append(dataclasses.replace(noise, norm=norm))
    return known


def merge(paths: Sequence[str | os.PathLike[str]], into: str | os.PathLike[str]) -> Results:
    """One log of those that shards of a data set wrote, each by its own process.

    All must have one configuration, and an image in several of them the same record, but for the
    seconds; `into` must not exist yet.

    Raises:
      RecordMismatch: two logs differ in their configuration, or on an image.
      FileExistsError: `into` exists.
    """
    if os.path.exists(into):
        raise FileExistsError(f"{into} exists; merge into a new path")
    logs = {str(path): records.read(path) for path in paths}
    if not logs:
        raise ValueError("merge needs one log at least")
    first = next(iter(logs))
    found: dict[int, dict[str, Any]] = {}
    for path, log in logs.items():
        require_fields(log.records, path)
        if log.config != logs[first].config:
            names = [n for n in log.config if log.config[n] != logs[first].config.get(n)]
            raise RecordMismatch(f"{path} and {first} differ in their configuration: {names}")
        for record in log.records:
            known = found.setdefault(record["index"], record)
            if {**known, "seconds": 0} != {**record, "seconds": 0}:
                raise RecordMismatch(
                    f"{path} has another record of image {record['index']} than an earlier log"
                )
    ordered = [found[i] for i in sorted(found)]
    with records.Log(into, logs[first].config) as log:
        log.append(*ordered)
    return from_records(ordered)
