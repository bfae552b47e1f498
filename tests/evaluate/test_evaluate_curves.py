"""Curves: the drawn steps are the certified accuracy, and nothing global is changed."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest

from jaxcert import evaluate
from jaxcert.evaluate import curves
from jaxcert.evaluate.metrics import clopper_pearson


def results(norm, radius, prediction, label):
    m = len(radius)
    return evaluate.Results(
        index=np.arange(m),
        label=np.asarray(label),
        prediction=np.asarray(prediction),
        radius=np.asarray(radius, float),
        confidence=np.ones(m),
        norm=norm,
        seconds=np.ones(m),
    )


SMALL = results(2.0, [0.5, 0.0, 1.0, 0.5, 9.0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0])
OTHER = results(2.0, [0.2, 0.3], [1, 1], [1, 1])
BOUNDS = results(np.inf, [0.01, 0.02], [1, 1], [1, 1])
HOPELESS = results(np.inf, [0.01, 0.02], [1, 1], [0, 0])


def drawn_at(line, r):
    """What matplotlib's `steps-pre` line shows at r: the value of the first corner at or after."""
    x, y = line.get_data()
    inside = np.searchsorted(x, r, side="left")
    return y[inside] if inside < len(y) else 0.0


def test_the_corners_by_hand():
    radii, values = curves.curve(SMALL)
    np.testing.assert_array_equal(radii, [0.0, 0.5, 1.0])
    np.testing.assert_array_equal(values, [0.8, 0.6, 0.2])


def test_the_line_is_the_certified_accuracy_at_every_radius():
    axes = evaluate.plot_certified_accuracy({"small": SMALL}).axes[0]
    (line,) = axes.get_lines()
    assert line.get_drawstyle() == "steps-pre"
    for r in (0, 0.1, 0.5, 0.500001, 0.9, 1.0, 1.01):
        expected = 100 * evaluate.certified_accuracy(SMALL, SMALL.label, r)
        assert drawn_at(line, r) == pytest.approx(expected)
    assert line.get_data()[1][-1] == 0, "the last step goes down to 0"


def test_the_band_is_the_interval():
    figure = evaluate.plot_certified_accuracy({"small": SMALL}, level=0.9)
    (band,) = figure.axes[0].collections
    corners = band.get_paths()[0].vertices
    for r, count in ((0.0, 4), (0.5, 3), (1.0, 1), (1.0, 0)):
        for end in clopper_pearson(count, 5, level=0.9):
            assert np.isclose(corners, [r, 100 * end]).all(1).any()
    assert not evaluate.plot_certified_accuracy({"small": SMALL}, level=None).axes[0].collections


def test_one_panel_per_norm_with_shared_accuracy_axis():
    figure = evaluate.plot_certified_accuracy(
        {"a": SMALL, "b": BOUNDS, "c": OTHER, "d": HOPELESS}, unit="pixels", title="MNIST"
    )
    left, right = figure.axes
    assert left.get_xlabel() == r"$\ell_{2}$ radius (pixels)"
    assert right.get_xlabel() == r"$\ell_\infty$ radius (pixels)"
    assert left.get_ylabel() == "certified accuracy (%)"
    assert right.get_ylabel() == ""
    assert left.get_ylim() == right.get_ylim() == (0, 100)
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["a", "c"]
    assert [t.get_text() for t in right.get_legend().get_texts()] == ["b", "d"]
    assert left.get_xlim()[1] >= 1.0
    assert 0.02 <= right.get_xlim()[1] < 0.03
    assert figure.get_suptitle() == "MNIST"
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    assert len({line.get_color() for line in lines}) == 4


def test_twenty_curves_look_different():
    figure = evaluate.plot_certified_accuracy({str(i): SMALL for i in range(20)}, level=None)
    lines = figure.axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20


@pytest.mark.parametrize(
    ("suffix", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_a_file_is_written_in_the_format_of_its_suffix(tmp_path, suffix, magic):
    path = tmp_path / f"curve.{suffix}"
    evaluate.plot_certified_accuracy({"a": SMALL, "b": BOUNDS, "none": HOPELESS}, path)
    content = path.read_bytes()
    assert content.startswith(magic)
    assert len(content) > 5_000


def test_the_picture_is_not_empty(tmp_path):
    figure = evaluate.plot_certified_accuracy({"a": SMALL})
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    blue = np.array([0x00, 0x72, 0xB2])
    assert (np.abs(pixels.astype(int) - blue).sum(-1) < 10).sum() > 200
    assert (pixels == 255).all(-1).mean() > 0.3


def test_nothing_global_is_changed(tmp_path):
    before = dict(matplotlib.rcParams)
    evaluate.plot_certified_accuracy({"a": SMALL}, tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before
    code = (
        "import sys, runpy; from jaxcert import evaluate; import numpy as np; one = np.ones(1);"
        "r = evaluate.Results(one, one.astype(int), one.astype(int), one, one, 2.0, one);"
        "evaluate.plot_certified_accuracy({'a': r});"
        "assert 'matplotlib.figure' in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_say_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match="nothing to plot; pass a mapping"):
        evaluate.plot_certified_accuracy({})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install jaxcert\[plots\]"):
        evaluate.plot_certified_accuracy({"a": SMALL})
