"""Results: the certificates of a whole data set, as numpy arrays, built from a log's records."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from jaxcert.certificate import Certificate
from jaxcert.errors import RecordMismatch
from jaxcert.evaluate import records
from jaxcert.sets import Box, Grid

Record: TypeAlias = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """Certificates of m images; each row says what a `Certificate` says of its image.

    Attributes:
      index: int64 (m,), which image of the data set.
      label: int64 (m,).
      prediction: int64 (m,), or `ABSTAIN`.
      radius: float64 (m,).
      confidence: float64 (m,): 1 for a proof, 1 - alpha for smoothing.
      norm: the threat's norm as numpy's `ord`; a threat that no norm names is kept as its repr.
      seconds: float64 (m,), an equal share of its batch's wall time.
      within: the `Box` or `Grid` the perturbed images must lie in, or None; a box's ends are
        scalars, or (m, *input) where they differ.
      post_hoc: whether the confidence was chosen after the votes were seen, so that it describes
        them but bounds nothing.
    """

    index: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    radius: np.ndarray
    confidence: np.ndarray
    norm: Any
    seconds: np.ndarray
    within: Box | Grid | None = None
    post_hoc: bool = False


def load(path: str | os.PathLike[str]) -> Results:
    """The results in a log that `run` wrote, finished or not, in the order of the file.

    Raises:
      RecordMismatch: the file is no log of jaxcert, or its records are not `run`'s.
      ValueError: it holds no record yet, or a line other than the last is damaged.
    """
    found = records.read(path).records
    if not found:
        raise ValueError(f"{path} holds no record yet; run(..., path={str(path)!r}) fills it")
    require_fields(found, path)
    return from_records(found)


FIELDS = {"index", "label", "prediction", "radius", "confidence", "norm", "seconds", "within"}


def require_fields(found: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Raise `RecordMismatch` unless all records of the log at `path` are such as `run` writes."""
    for line, record in enumerate(found, start=2):
        if not record.keys() >= FIELDS:
            raise RecordMismatch(
                f"{path} is not a log of evaluate.run: line {line} lacks "
                f"{sorted(FIELDS - record.keys())}; read it with evaluate.records.read"
            )


def to_records(
    certificate: Certificate,
    index: np.ndarray,
    label: np.ndarray,
    seconds: float,
    details: Mapping[str, Any] | None = None,
) -> list[Record]:
    """One record per row of `index`; further rows of the certificate are padding and dropped.

    Details are further fields, by name: arrays (b, ...) of which each record has its row.
    """
    norm = certificate.norm
    shared = {
        "norm": float(norm) if isinstance(norm, int | float) else repr(norm),
        "seconds": seconds / len(index),
    }
    columns = {
        "index": index,
        "label": label,
        "prediction": np.asarray(certificate.prediction),
        "radius": np.asarray(certificate.radius, np.float64),
        "confidence": np.asarray(certificate.confidence, np.float64),
    }
    further = {name: np.asarray(value).tolist() for name, value in (details or {}).items()}
    return [
        {name: column[i].item() for name, column in columns.items()}
        | {"within": _row_of(certificate.within, i)}
        | {name: value[i] for name, value in further.items()}
        | shared
        for i in range(len(index))
    ]


def from_records(found: Sequence[Mapping[str, Any]]) -> Results:
    """The results that at least one record of `run` makes up."""
    norms = {record["norm"] for record in found}
    if len(norms) > 1:
        raise RecordMismatch(f"the records mix the norms {sorted(map(str, norms))}; split them")

    def column(name: str, dtype: Any) -> np.ndarray:
        return np.array([record[name] for record in found], dtype)

    return Results(
        index=column("index", np.int64),
        label=column("label", np.int64),
        prediction=column("prediction", np.int64),
        radius=column("radius", np.float64),
        confidence=column("confidence", np.float64),
        norm=norms.pop(),
        seconds=column("seconds", np.float64),
        within=_joined([record["within"] for record in found]),
    )


def _row_of(within: Any, i: int) -> Record | None:
    """Image i's share of a certificate's `within`, in JSON types; one number where it is constant.

    Box ends are scalars or (b, *input), as everywhere in jaxcert; a batch axis of 1 is for all.
    """
    if within is None:
        return None
    if isinstance(within, Grid):
        return {"levels": within.levels}
    if not isinstance(within, Box):
        raise TypeError(f"within must be a Box, a Grid or None, got {type(within).__name__}")

    def share(end: Any) -> Any:
        end = np.asarray(end, np.float64)
        end = end[i if len(end) > 1 else 0] if end.ndim else end
        return end.flat[0].item() if np.all(end == end.flat[0]) else end.tolist()

    return {"lower": share(within.lower), "upper": share(within.upper)}


def _joined(regions: Sequence[Record | None]) -> Box | Grid | None:
    rows = [region for region in regions if region is not None]
    if not rows:
        return None
    if len(rows) < len(regions):
        raise RecordMismatch("some records are restricted to a box and some are not; split them")
    if any("levels" in row for row in rows):
        if any(row != rows[0] for row in rows):
            raise RecordMismatch("the records are restricted to different grids; split them")
        return Grid(rows[0]["levels"])

    def end(name: str) -> Any:
        values = np.stack(np.broadcast_arrays(*[np.asarray(row[name], np.float64) for row in rows]))
        return values[0].item() if values.ndim == 1 and np.all(values == values[0]) else values

    return Box(end("lower"), end("upper"))
