"""The field's log format: tab-separated `idx label predict radius correct time`."""

import csv
import decimal
import os

import numpy as np

from jaxcert.certificate import ABSTAIN
from jaxcert.evaluate.results import Results

_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")


def read_cohen_log(
    path: str | os.PathLike[str], *, alpha: float = 0.001, lowered: bool = False
) -> Results:
    """The results of a log written by the code of Cohen, Rosenfeld & Kolter (ICML 2019).

    predict is -1 for an abstention; time is seconds or h:mm:ss. The format keeps three digits of
    each radius, rounded to nearest: a radius read here can exceed the certified one by half a
    unit of its third digit. It is an L2 radius, and the format does not hold alpha.

    Args:
      path: the file.
      alpha: failure probability per image of the run that wrote it; 0.001 in the published logs.
      lowered: lower each radius by that half unit, so that none exceeds the certified one. The
        published tables count the radii as they are.

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
        radius=_below(radius) if lowered else radius,
        confidence=np.full(len(rows), 1 - alpha),
        norm=2.0,
        seconds=seconds,
    )


def write_cohen_log(results: Results, path: str | os.PathLike[str]) -> None:
    """Results in the same format, for the field's scripts; radii are floored to three digits.

    The format holds no votes, norm, alpha or grid: keep the log of jaxcert beside it.

    Raises:
      FileExistsError: there is a file at `path` already.
      ValueError: the radii are not those of L2, which readers take them for, or post hoc.
    """
    if results.norm != 2 or results.post_hoc:
        raise ValueError(
            "the format is one of L2 radii at a confidence fixed beforehand; got norm="
            f"{results.norm} and post_hoc={results.post_hoc}"
        )
    with open(path, "x", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(_COLUMNS)
        for i in range(len(results.index)):
            label, prediction = int(results.label[i]), int(results.prediction[i])
            radius = _floored(float(results.radius[i]))
            seconds = f"{results.seconds[i]:.3f}"
            writer.writerow(
                (
                    int(results.index[i]),
                    label,
                    prediction,
                    radius,
                    int(label == prediction),
                    seconds,
                )
            )


def _floored(radius: float) -> str:
    """The largest decimal of three significant digits that is at most the radius."""
    exact = decimal.Decimal(radius)
    down = decimal.Context(prec=3, rounding=decimal.ROUND_FLOOR)
    return format(down.create_decimal(exact), "f")


def _below(radius: np.ndarray) -> np.ndarray:
    """Radii lowered by half a unit of their third significant digit."""
    size = np.where(radius > 0, radius, 1.0)
    unit = 10.0 ** (np.floor(np.log10(size) + 1e-9) - 2)
    return np.maximum(radius - unit / 2, 0) * (1 - 1e-12)


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
