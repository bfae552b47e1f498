"""Curves: certified accuracy against radius, drawn for print (extra `plots`)."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcert.evaluate import metrics
from jaxcert.evaluate.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours, told apart by colour-blind readers; darkest first, yellow left out.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")


def curve(results: Results) -> tuple[np.ndarray, np.ndarray]:
    """The corners of certified accuracy as a function of r: radii r_0 = 0 < r_1 < ... and values.

    The value at r in (r_{j-1}, r_j] is values[j], and 0 beyond the last: matplotlib's
    `step(radii, values, where="pre")`.
    """
    correct = results.prediction == results.label
    radii = np.union1d([0.0], results.radius[correct])
    return radii, metrics.certified_accuracy(results, results.label, radii)


def plot_certified_accuracy(
    results: Mapping[str, Results],
    path: str | os.PathLike[str] | None = None,
    *,
    unit: str | None = None,
    level: float | None = 0.95,
    title: str | None = None,
) -> "Figure":
    """Certified accuracy against radius, one curve per certifier and one panel per norm.

    Curves are exact step functions: the value at r counts radii >= r. Matplotlib's global state is
    left alone.

    Args:
      results: certifier's name -> its results; a name has one colour in all panels.
      path: where to save it too; the suffix chooses the format (.png, .pdf, .svg).
      unit: of the radii, for the axis labels, e.g. "pixels in [0, 1]".
      level: coverage of the Clopper-Pearson band around each curve, None for no band.
      title: above the panels.

    Returns:
      The figure, for further changes.

    Raises:
      ImportError: matplotlib is missing; the message says what to install.
    """
    figure_class, canvas_class = _matplotlib()
    if not results:
        raise ValueError("nothing to plot; pass a mapping such as {'CROWN': results}")
    norms = list(dict.fromkeys(r.norm for r in results.values()))
    figure = figure_class(figsize=(4.4 * len(norms) + 0.6, 3.4), layout="constrained")
    canvas_class(figure)
    figure.get_layout_engine().set(wspace=0.05)
    panels = figure.subplots(1, len(norms), sharey=True, squeeze=False)[0]
    for axes, norm in zip(panels, norms, strict=True):
        chosen = [(i, name) for i, name in enumerate(results) if results[name].norm == norm]
        end = 1.04 * max(float(curve(results[name])[0][-1]) for _, name in chosen) or 1.0
        for i, name in chosen:
            _draw(axes, results[name], name, i, level)
        _finish(axes, norm, end, unit)
    panels[0].set_ylabel("certified accuracy (%)")
    if title is not None:
        figure.suptitle(title)
    if path is not None:
        figure.savefig(path, dpi=200)
    return figure


def _draw(axes: "Axes", results: Results, name: str, number: int, level: float | None) -> None:
    radii, values = curve(results)
    radii, values = np.append(radii, radii[-1]), np.append(values, 0.0)
    colour = _COLOURS[number % len(_COLOURS)]
    dash = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    axes.step(radii, 100 * values, where="pre", color=colour, ls=dash, lw=1.6, label=name, zorder=3)
    if level is not None:
        m = len(results.label)
        lower, upper = metrics.clopper_pearson(np.rint(m * values).astype(int), m, level=level)
        band = {"step": "pre", "color": colour, "alpha": 0.12, "lw": 0}
        axes.fill_between(radii, 100 * lower, 100 * upper, **band)


def _finish(axes: "Axes", norm: Any, end: float, unit: str | None) -> None:
    axes.set_xlim(0, end)
    axes.set_ylim(0, 100)
    axes.set_xlabel(f"{_symbol(norm)} radius" + (f" ({unit})" if unit else ""))
    axes.locator_params(axis="x", nbins=6)
    axes.grid(color="0.9", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", fontsize="small", edgecolor="none", framealpha=0.9)


def _symbol(norm: Any) -> str:
    """The norm in matplotlib's mathtext; a threat that no norm names is shown as it is."""
    if not isinstance(norm, int | float):
        return str(norm)
    return r"$\ell_\infty$" if norm == np.inf else rf"$\ell_{{{norm:g}}}$"


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("curves need matplotlib: pip install jaxcert[plots]") from error
    return Figure, FigureCanvasAgg
