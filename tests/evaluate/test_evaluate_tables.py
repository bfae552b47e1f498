"""Tables: what they say, and that neither a pipe nor a narrow terminal garbles them."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from jaxcert import evaluate
from jaxcert.evaluate.tables import shown_norm, shown_radius


@pytest.fixture(autouse=True)
def _terminal_of_known_kind(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # rich ignores the width it is given on a dumb one


def results(norm=2.0, m=200, scale=0.5):
    rng = np.random.default_rng(0)
    prediction = rng.integers(-1, 3, m)
    return evaluate.Results(
        index=np.arange(m),
        label=np.where(rng.random(m) < 0.6, np.abs(prediction), 3),
        prediction=prediction,
        radius=rng.exponential(scale, m),
        confidence=np.ones(m),
        norm=norm,
        seconds=np.full(m, 0.125),
    )


def two_norms():
    linf = results(np.inf, scale=0.02)
    return [
        evaluate.row("a smoothed net", results(), [0.25, 0.5, 1.0]),
        evaluate.row("another smoothed net", results(), [0.25, 0.5, 1.0]),
        evaluate.row("a net with bounds", linf, [2 / 255, 8 / 255]),
    ]


def test_a_row_holds_the_metrics():
    r, row = results(), evaluate.row("net", results(), [0.25, 0.5])
    assert row.name == "net"
    assert row.images == 200
    assert row.radii == (0.25, 0.5)
    assert row.clean == evaluate.clean_accuracy(r, r.label)
    assert list(row.certified) == list(evaluate.certified_accuracy(r, r.label, [0.25, 0.5]))
    assert row.average_radius == evaluate.average_certified_radius(r, r.label)
    assert row.abstained == evaluate.abstention_rate(r)
    assert row.seconds == 0.125
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.name = "other"


def test_a_table_line_by_line():
    rows = [
        evaluate.Row("IBP", np.inf, 500, 0.9, (1 / 255, 0.1), (0.5, 0.25), 0.0123, 0.0, 0.0042),
        evaluate.Row("RS", 2, 400, 0.8, (1,), (0.124,), 1.0, 0.031, 151.7),
    ]
    assert evaluate.table(rows).splitlines() == [
        "net  norm  clean  r = 1/255   0.1     ACR  abstain  s/image",
        "-----------------------------------------------------------",
        "IBP  Linf   90.0       50.0  25.0  0.0123      0.0   0.0042",
        "-----------------------------------------------------------",
        "                    r = 1.0",
        "RS   L2     80.0       12.4          1.00      3.1      152",
        "% of 400 to 500 images, 95% intervals within 4.5 points; ACR in units of r",
    ]


def test_radii_stand_in_columns_under_their_norm():
    first, _, one, two, _, radii, three, caption = evaluate.table(two_norms()).splitlines()
    assert first.split()[3:8] == ["r", "=", "0.25", "0.5", "1.0"]
    assert one.startswith("a smoothed net  ")
    assert two.startswith("another smoothed net  L2")
    assert radii.split() == ["r", "=", "2/255", "8/255"]
    assert three.startswith("a net with bounds     Linf")
    percent = f"{100 * two_norms()[2].certified[1]:.1f}"
    assert three[radii.index("8/255") :].split()[0] == percent
    assert caption.startswith("% of 200 images")


def test_a_pipe_gets_plain_text_of_any_width():
    rows = [dataclasses.replace(row, name=row.name * 20) for row in two_norms()]
    out = io.StringIO()
    evaluate.show(rows, Console(file=out, width=80, force_terminal=False))
    assert out.getvalue() == evaluate.table(rows)
    assert out.getvalue().isascii()
    assert all(f"\n{row.name}  " in out.getvalue() for row in rows)


@pytest.mark.parametrize("width", [100, 75])
def test_a_terminal_gets_every_number_within_its_width(width):
    rows = [dataclasses.replace(row, name=row.name + " with a long name") for row in two_norms()]
    out = io.StringIO()
    evaluate.show(rows, Console(file=out, width=width, force_terminal=True, color_system=None))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in out.getvalue()
    plain = evaluate.table(rows).split()
    numbers = [word for word in plain if word.replace(".", "").isdigit()]
    assert numbers == [w for w in out.getvalue().split() if w.replace(".", "").isdigit()]


def test_a_terminal_too_narrow_for_the_numbers_gets_plain_lines():
    out = io.StringIO()
    evaluate.show(two_norms(), Console(file=out, width=40, force_terminal=True))
    assert out.getvalue() == evaluate.table(two_norms())


def test_names_are_not_markup():
    row = dataclasses.replace(two_norms()[0], name="[bold]net[/nonsense]")
    assert "[bold]net[/nonsense]" in evaluate.table([row])


def test_an_empty_table_says_how_to_fill_it():
    with pytest.raises(ValueError, match="at least one row"):
        evaluate.table([])


def test_norms_and_radii_in_words():
    assert [shown_norm(n) for n in (np.inf, 2.0, 1, 0, "Patch(5)")] == [
        "Linf",
        "L2",
        "L1",
        "L0",
        "Patch(5)",
    ]
    assert shown_radius(np.inf, 8 / 255) == "8/255"
    assert shown_radius(2.0, 8 / 255) == "0.03137"
    assert shown_radius(np.inf, 0.1) == "0.1"
    assert [shown_radius(2.0, r) for r in (0, 1, 0.25)] == ["0.0", "1.0", "0.25"]
