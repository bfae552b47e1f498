"""Every equation with an interval rule has a linear one, or stands in a list of those without; the
documentation's table says which, and its page on bounds runs."""

import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from thinned import one_in

from jaxcert import UnsupportedEquation
from jaxcert.bounds import crown, ibp
from jaxcert.bounds.interpreter import RULES
from jaxcert.bounds.planes import CONSTANT
from jaxcert.bounds.relaxations import LINES
from jaxcert.sets import LinfBall

DOCS = pathlib.Path(__file__).parents[2] / "docs"
COVERAGE = runpy.run_path(str(DOCS / "coverage.py"))

WITHOUT_A_LINEAR_RULE: set[str] = set()


def test_names_without_a_linear_rule_are_known():
    assert {name for name in RULES if COVERAGE["linear"](name) == "no"} == WITHOUT_A_LINEAR_RULE


def test_linear_rules_have_interval_rules_to_start_from():
    assert {*LINES, *CONSTANT, *COVERAGE["REWRITES"]} <= set(RULES)


def test_the_table_has_a_row_for_every_rule():
    rows = re.findall(r"^\| `(\w+)` \| \w+ \| yes \| (.+) \|$", COVERAGE["table"](), re.M)
    assert sorted(name for name, _ in rows) == sorted(RULES)
    assert all(part in COVERAGE["MEANING"] for _, cell in rows for part in cell.split(", else "))


def pooled(x, start, function):
    return lax.reduce_window(x, start, function, (1, 2), (1, 1), "VALID")


# name: (what the table says, a function with such an equation)
EXAMPLES = {
    "add": ("affine", lambda x: x + x),
    "mul": ("affine, else planes", lambda x: x * x[:, ::-1]),
    "dot_general": ("affine, else planes", lambda x: jnp.einsum("bi,bi->b", x, x[:, ::-1])),
    "conv_general_dilated": (
        "affine",
        lambda x: lax.conv(x[:, None], jnp.ones((1, 1, 2)), (1,), "VALID"),
    ),
    "div": ("affine, else expanded", lambda x: x / (4 + x)),
    "select_n": ("affine, else planes", lambda x: jnp.where(x > 0.1, x, 2 * x + 1)),
    "tanh": ("lines", jnp.tanh),
    "max": ("lines, else expanded", lambda x: jnp.maximum(x, x[:, ::-1])),
    "pow": ("lines, else expanded", lambda x: (4 + x) ** (1 + x)),
    "reduce_max": ("planes", lambda x: jnp.max(x, 1)),
    "reduce_min": ("expanded", lambda x: jnp.min(x, 1)),
    "reduce_window_max": ("expanded", lambda x: pooled(x, -jnp.inf, lax.max)),
    "softmax": ("expanded", jax.nn.softmax),
    "floor": ("range", jnp.floor),
    "reduce_window_min": ("expanded", lambda x: pooled(x, jnp.inf, lax.min)),
}


@pytest.mark.parametrize("name", one_in(2, EXAMPLES))
def test_the_table_tells_what_crown_does(name):
    said, f = EXAMPLES[name]
    assert COVERAGE["linear"](name) == said
    region = LinfBall(jnp.array([[0.5, -0.25, 1.0], [-1.0, 0.75, 0.25]]), 0.5)
    if said == "no":
        with pytest.raises(UnsupportedEquation, match=name):
            crown(f)(region)
        return
    box, interval = crown(f)(region), ibp(f)(region)
    y = f(region.x)
    assert jnp.all((box.lower <= y) & (y <= box.upper))
    tolerance = 1e-6 * (1 + abs(y))
    assert jnp.all(box.lower >= interval.lower - tolerance)
    assert jnp.all(box.upper <= interval.upper + tolerance)


def test_expansion_of_a_single_example():
    box = crown(EXAMPLES["div"][1])(LinfBall(jnp.zeros((1, 3)), 0.5))
    assert jnp.all((box.lower <= 0) & (box.upper >= 0))


def test_the_example_on_the_page_runs(capsys):
    page = (DOCS / "bounds.md").read_text()
    code, printed = re.findall(r"```(?:python|text)\n(.*?)```", page, re.S)
    exec(code, {})
    assert capsys.readouterr().out == printed
