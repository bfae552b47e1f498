"""The field's log format: tab-separated `idx label predict radius correct time`."""

import csv
import os

import numpy as np

from jaxcert.certificate import ABSTAIN
from jaxcert.evaluate.results import Results

_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")


def read_cohen_log(path: str | os.PathLike[str], *, alpha: float = 0.001) -> Results:
    """The results of a log written by the code of Cohen, Rosenfeld & Kolter (ICML 2019).

    predict is -1 for an abstention; time is seconds or h:mm:ss. The format keeps three digits of
    each radius, rounded to nearest: a radius read here can exceed the certified one by half a
    unit of its third digit. It is an L2 radius, and the format does not hold alpha.

    Args:
      path: the file.
      alpha: failure probability per image of the run that wrote it; 0.001 in the published logs.

    Raises:
      ValueError: columns are missing, or a line is not of this format.
    """
    with open(path, encoding="utf-8", newline="") as file:
        header, *lines = list(csv.reader(file, delimiter="\t")) or [[]]
    missing = [name for name in _COLUMNS if name not in header]
    if missing:
        raise ValueError(
            f"{path} lacks the columns {missing}; a certification log begins with the line "
            f"{chr(9).join(_COLUMNS)!r}"
        )
    rows = [_row(path, number, header, line) for number, line in enumerate(lines, start=2)]
    if not rows:
        raise ValueError(f"{path} holds no image")
    index, label, prediction, radius, seconds = map(np.array, zip(*rows, strict=True))
    return Results(
        index=index.astype(np.int64),
        label=label.astype(np.int64),
        prediction=prediction.astype(np.int64),
        radius=radius,
        confidence=np.full(len(rows), 1 - alpha),
        norm=2.0,
        seconds=seconds,
    )


def _row(
    path: str | os.PathLike[str], number: int, header: list[str], line: list[str]
) -> tuple[int, int, int, float, float]:
    try:
        field = dict(zip(header, line, strict=True))
        label, prediction = int(field["label"]), int(field["predict"])
        radius = float(field["radius"])
        if (
            not radius >= 0
            or prediction < ABSTAIN
            or int(field["correct"]) != (label == prediction)
        ):
            raise ValueError("radius, predict and correct do not fit together")
        return int(field["idx"]), label, prediction, radius, _seconds(field["time"])
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from None


def _seconds(text: str) -> float:
    """`15.4` or `0:02:31.238689` in seconds."""
    total = 0.0
    for part in text.split(":"):
        total = 60 * total + float(part)
    return total
