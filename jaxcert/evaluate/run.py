"""Run: a certifier over a whole data set, in batches, with a log to resume from."""

import contextlib
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.certificate import Certificate
from jaxcert.errors import RecordMismatch
from jaxcert.evaluate.records import Log
from jaxcert.evaluate.results import (
    FIELDS,
    Record,
    Results,
    from_records,
    require_fields,
    to_records,
)

Certifier: TypeAlias = Callable[[Any, Any], Certificate | tuple[Certificate, Mapping[str, Any]]]


def run(
    certifier: Certifier,
    x: Any,
    labels: Any,
    *,
    index: Any = None,
    batch: int = 100,
    path: str | os.PathLike[str] | None = None,
    config: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    together: int = 1,
) -> Results:
    """The certificates of all images. Host side: a loop with a clock, a log and a progress bar.

    Every call of the certifier sees `min(batch, m)` images, the last one padded with copies of its
    last image, so that one executable serves all. With a `path` each image's record is on disk
    before the next batch begins; images already recorded there are not certified again, and must
    have the pixels that they had (a digest of these is in the record).

    Args:
      certifier: `lambda x, index: lipschitz.certify(f, x)`, of (b, *input) and int (b,); or one
        that returns a certificate and what else to record, `{name: array (b, ...)}`.
      x: images (m, *input), a numpy or JAX array; batches are passed on as they come.
      labels: int (m,), the true classes.
      index: int (m,), distinct: the place of each image in its data set; default arange(m).
      batch: images per call.
      path: the log (`evaluate.records`), which `evaluate.load` reads back.
      config: required with `path`: all that makes the certificates what they are (net, method,
        sigma, n, alpha, seed). Resuming with another one raises.
      progress: a bar on stderr; default: only if that is a terminal.
      together: the certifier wants images of one index // together in one call. Of such a group
        those that are on record already are certified again, and that is not recorded.

    Returns:
      `Results` in the order of `x`, those recorded earlier included.

    Raises:
      RecordMismatch: the log has another configuration or norm, or was written for other images
        or labels.
      BlockingIOError: another run is writing to the log.
      ValueError, TypeError: lengths or types do not fit, or the certificate has a bad radius.
    """
    labels = np.asarray(labels)
    index = np.arange(len(x)) if index is None else np.asarray(index)
    _require_fitting(x, labels, index, batch)
    if path is not None and config is None:
        raise ValueError(
            "a log needs the configuration that tells this run from others: pass "
            'config={"net": ..., "method": ...} along with path'
        )
    with contextlib.ExitStack() as stack:
        log = None if path is None else stack.enter_context(Log(path, config or {}))
        found = {} if log is None else _recorded(log, x, index, labels)
        unfinished = {i // together for i in index.tolist() if i not in found}
        todo = np.array(
            [r for r, i in enumerate(index.tolist()) if i // together in unfinished], int
        )
        advance = stack.enter_context(_bar(len(index), len(found), progress))
        size = min(batch, len(index))
        for start in range(0, len(todo), size):
            rows = todo[start : start + size]
            new = _certified(certifier, x, labels, index, rows, size)
            _require_same_norm([*itertools.islice(found.values(), 1), *new])
            new = [record for record in new if record["index"] not in found]
            if log is not None:
                log.append(*new)
            found.update((record["index"], record) for record in new)
            advance(len(new))
    return from_records([found[i] for i in index.tolist()])


def _certified(
    certifier: Certifier, x: Any, labels: np.ndarray, index: np.ndarray, rows: np.ndarray, size: int
) -> list[Record]:
    """The records of these rows, from one call on exactly `size` images."""
    padded = np.pad(rows, (0, size - len(rows)), "edge")
    images = x[padded]
    began = time.perf_counter()
    found = jax.block_until_ready(certifier(images, jnp.asarray(index[padded])))
    seconds = time.perf_counter() - began
    certificate, details = found if isinstance(found, tuple) else (found, {})
    _require_certificates(certificate, size)
    _require_details(details, size)
    details = {**details, "image": digests(images)}
    return to_records(certificate, index[rows], labels[rows], seconds, details)


def digests(images: Any) -> list[str]:
    """A name for each image's values."""
    return [
        hashlib.blake2b(image.tobytes(), digest_size=6).hexdigest() for image in np.asarray(images)
    ]


def _recorded(log: Log, x: Any, index: np.ndarray, labels: np.ndarray) -> dict[int, Record]:
    """What the log already holds on the images of this run."""
    require_fields(log.recovered, log.path)
    rows = {i: row for row, i in enumerate(index.tolist())}
    found = {record["index"]: record for record in log.recovered if record["index"] in rows}
    for i, record in found.items():
        label = labels[rows[i]]
        if record["label"] != label:
            raise RecordMismatch(
                f"{log.path}: image {i} has label {record['label']} in the file and {label} "
                "now, so these are other data or another order; pass `index`, or another path"
            )
    require_same_images(found, x, rows, log.path)
    return found


def require_same_images(
    found: Mapping[int, Record], x: Any, rows: Mapping[int, int], path: Any
) -> None:
    """Raise unless records, by index, are of the images x[rows[index]]."""
    known = [i for i, record in found.items() if "image" in record]
    for start in range(0, len(known), 256):
        part = known[start : start + 256]
        for i, name in zip(part, digests(x[np.array([rows[i] for i in part])]), strict=True):
            if found[i]["image"] != name:
                raise RecordMismatch(
                    f"{path}: image {i} has other pixels now than when it was certified, so these "
                    "are other data, another order or another preprocessing; pass `index`, or "
                    "another path"
                )


def _require_fitting(x: Any, labels: np.ndarray, index: np.ndarray, batch: int) -> None:
    m = len(x)
    for name, value in (("labels", labels), ("index", index)):
        if value.shape != (m,) or not np.issubdtype(value.dtype, np.integer):
            raise ValueError(
                f"{name} must be integers of shape ({m},), one per image; "
                f"got {value.dtype}{value.shape}"
            )
    if m == 0:
        raise ValueError("x holds no images, so there is nothing to certify")
    if labels.min() < 0:
        raise ValueError(f"labels must be >= 0, got {labels.min()}; -1 is an abstention")
    if index.min() < 0 or index.max() >= 2**31 or len(np.unique(index)) < m:
        raise ValueError("index must hold distinct integers in [0, 2**31), one per image")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")


def _require_certificates(certificate: Any, size: int) -> None:
    if not isinstance(certificate, Certificate):
        raise TypeError(
            f"the certifier must return a Certificate, got {type(certificate).__name__}; "
            "wrap it: lambda x, index: certify(f, x)"
        )
    for name in ("prediction", "radius", "confidence"):
        shape = np.shape(getattr(certificate, name))
        if shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), one per image; got {shape}")
    prediction, radius = np.asarray(certificate.prediction), np.asarray(certificate.radius)
    if not np.issubdtype(prediction.dtype, np.integer):
        raise TypeError(f"prediction must be integers, got {prediction.dtype}")
    if not np.all(np.isfinite(radius) & (radius >= 0)):
        raise ValueError(
            "the certifier returned a radius that is NaN, infinite or negative; make certificates "
            "with jaxcert.certificate.issue, which turns those into 0"
        )


def _require_details(details: Any, size: int) -> None:
    if not isinstance(details, Mapping):
        raise TypeError(
            "beside a Certificate, the certifier may return a dict of what else to record, got "
            f"{type(details).__name__}"
        )
    for name, value in details.items():
        if name in {*FIELDS, "image"} or np.shape(value)[:1] != (size,):
            raise ValueError(
                f"the detail {name!r} must have a name of its own and one row per image, ({size}, "
                f"...); got shape {np.shape(value)}"
            )


def _require_same_norm(found: Sequence[Record]) -> None:
    norms = {record["norm"] for record in found}
    if len(norms) > 1:
        raise RecordMismatch(
            f"the certifier now proves the norm {found[-1]['norm']}, earlier images have "
            f"{found[0]['norm']}; use one run and one path per norm"
        )


@contextlib.contextmanager
def _bar(total: int, done: int, wanted: bool | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, as a function that moves it on by so many images."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda images: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("certified"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("certified", total=total, completed=done)
        yield lambda images: shown.advance(task, images)
