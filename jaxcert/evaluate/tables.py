"""Tables: certified nets side by side, for a terminal or a pipe."""

import dataclasses
import io
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcert.evaluate import metrics
from jaxcert.evaluate.results import Results

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Row:
    """One net's line of a table; fractions are of all `images`.

    Attributes:
      name: what the reader knows it by.
      norm: of the radii, as numpy's `ord`.
      images: how many were certified.
      clean: accuracy, abstentions counted as wrong.
      radii: where the certified accuracy was taken.
      certified: the certified accuracy at each of them.
      average_radius: mean(correct * radius).
      abstained: fraction without a prediction.
      seconds: median per image.
    """

    name: str
    norm: Any
    images: int
    clean: float
    radii: tuple[float, ...]
    certified: tuple[float, ...]
    average_radius: float
    abstained: float
    seconds: float


def row(name: str, results: Results, radii: Sequence[float]) -> Row:
    """The line of a table that results make, with the certified accuracy at these radii."""
    label = results.label
    return Row(
        name=f"{name} (post hoc)" if results.post_hoc else name,
        norm=results.norm,
        images=len(label),
        clean=metrics.clean_accuracy(results, label),
        radii=tuple(map(float, radii)),
        certified=tuple(metrics.certified_accuracy(results, label, list(radii)).tolist()),
        average_radius=metrics.average_certified_radius(results, label),
        abstained=metrics.abstention_rate(results),
        seconds=float(np.median(results.seconds)),  # the first batch may include a compilation
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as plain text, as wide as they need to be.

    Radii in different norms cannot be compared, so neighbouring rows of one norm and the same radii
    stand under a line of radii of their own. Accuracies and abstentions are percentages.
    """
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=10_000, color_system=None, force_terminal=False)
    console.print(_grid(rows, rule="-"))
    lines = [*text.getvalue().splitlines(), _caption(rows)]
    return "".join(line.rstrip() + "\n" for line in lines)


def show(rows: Sequence[Row], console: "Console | None" = None) -> None:
    """Print the rows: to a terminal with names folded to fit, into a pipe as `table` has them.

    Args:
      rows: at least one, see `row`.
      console: where to; default: stdout.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = console or Console()
    grid = _grid(rows, rule="─")
    excess = Measurement.get(console, console.options.update(width=10_000), grid).maximum
    room = max(len(r.name) for r in rows) - max(0, excess - console.width)
    if console.is_terminal and room >= _NARROWEST:
        grid.columns[0].max_width = room
        console.print(grid)
        console.print(_caption(rows), style="dim", highlight=False)
    else:
        console.file.write(table(rows))


_NARROWEST = 8


def _grid(rows: Sequence[Row], rule: str) -> "Table":
    from rich.box import Box
    from rich.table import Table
    from rich.text import Text

    if not rows:
        raise ValueError("a table needs at least one row: table([row(name, results, radii)])")
    groups = [list(group) for _, group in itertools.groupby(rows, lambda r: (r.norm, r.radii))]
    width = max(len(r.radii) for r in rows)
    blank, line = "    \n", f" {rule}{rule} \n"
    box = Box(blank * 2 + line + blank + line + blank * 3)
    grid = Table(box=box, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    first, *others = (_radius_titles(group[0], width) for group in groups)
    grid.add_column("net", overflow="fold")
    grid.add_column("norm", no_wrap=True)
    for title in ("clean", *first, "ACR", "abstain", "s/image"):
        grid.add_column(title, justify="right", no_wrap=True)
    for group, titles in zip(groups, [None, *others], strict=True):
        if titles is not None:
            grid.add_section()
            grid.add_row("", "", "", *titles, "", "", "", style="bold")
        for r in group:
            grid.add_row(Text(r.name), *_cells(r, width))
    return grid


def _radius_titles(r: Row, width: int) -> list[str]:
    titles = [shown_radius(r.norm, radius) for radius in r.radii]
    if titles:
        titles[0] = f"r = {titles[0]}"
    return titles + [""] * (width - len(titles))


def _cells(r: Row, width: int) -> list[str]:
    certified = [_percent(value) for value in r.certified]
    return [
        shown_norm(r.norm),
        _percent(r.clean),
        *certified,
        *[""] * (width - len(certified)),
        f"{r.average_radius:#.3g}",
        _percent(r.abstained),
        f"{r.seconds:.2g}" if r.seconds < 100 else f"{r.seconds:.0f}",
    ]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _caption(rows: Sequence[Row]) -> str:
    """How many images, and how far chance may have moved any accuracy of the table."""
    fewest, most = min(r.images for r in rows), max(r.images for r in rows)
    images = f"{most:,} images" if fewest == most else f"{fewest:,} to {most:,} images"
    values = ((value, r.images) for r in rows for value in (r.clean, *r.certified))
    widest = max(
        max(value - lower, upper - value)
        for value, m in values
        for lower, upper in [metrics.clopper_pearson(round(value * m), m)]
    )
    return f"% of {images}, 95% intervals within {100 * widest:.1f} points; ACR in units of r"


def shown_norm(norm: Any) -> str:
    """L2, Linf, ...; a threat that no norm names is shown as it is."""
    return f"L{norm:g}" if isinstance(norm, int | float) else str(norm)


def shown_radius(norm: Any, radius: float) -> str:
    """A radius in at most four digits, and in Linf as k/255 where it is one."""
    k = round(255 * radius)
    if norm == np.inf and k > 0 and abs(255 * radius - k) < 1e-6:
        return f"{k}/255"
    text = f"{radius:.4g}"
    return text if "." in text or "e" in text else f"{text}.0"
