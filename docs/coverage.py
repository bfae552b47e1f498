"""Which equations the bound methods have rules for, by their tables: `python docs/coverage.py`."""

import jax.numpy as jnp

import jaxcert.bounds  # noqa: F401  (fills the tables)
from jaxcert.bounds.expand import REWRITES
from jaxcert.bounds.interpreter import RULES
from jaxcert.bounds.planes import CONSTANT, PLANES, is_affine
from jaxcert.bounds.relaxations import LINES
from jaxcert.graph import Equation, Var
from jaxcert.idioms import IDIOMS

MEANING = {
    "affine": "propagated exactly",
    "lines": "a line below and a line above, fitted to the operand's interval",
    "planes": "affine functions of its operands, fitted to their intervals",
    "expanded": "written out as equations that have rules",
    "range": "the constant ends of its interval",
    "no": "an error, use `ibp`",
}
LEGEND = (
    "; ".join(f"**{kind}**: {meaning}" for kind, meaning in MEANING.items())
    + ". **a, else b**: b where both factors, the divisor, the exponent, the predicate, both sides "
    "of a maximum or minimum, or the ends of a clamp depend on the input, and a elsewhere."
)


def linear(name: str) -> str:
    """How the linear methods treat equations of this name."""
    # One operand depends on the input, whichever suits the rule; or several do.
    one, several = _kind(name, (True, False), (False, True)), _kind(name, (True, True))
    if name == "conv_general_dilated":  # its kernel may not: see `rows.py`
        return one
    return one if one == several else f"{one}, else {several}"


def _kind(name: str, *cases: tuple[bool, bool]) -> str:
    if any(is_affine(_equation(name, bounded)) for bounded in cases):
        return "affine"
    if name in REWRITES and all(map(all, cases)):
        return "expanded"
    tables = {"planes": PLANES, "lines": LINES, "range": CONSTANT, "expanded": REWRITES}
    return next((kind for kind, names in tables.items() if name in names), "no")


def _equation(name: str, bounded: tuple[bool, bool]) -> Equation:
    return Equation(name, tuple(Var((), jnp.dtype("float32"), b) for b in bounded), (), {})


def table() -> str:
    """All equations that have a rule as a Markdown table, sorted by their linear rule."""
    functions, kinds = {idiom.name for idiom in IDIOMS}, list(MEANING)
    rows = {name: linear(name) for name in {*RULES, *functions}}
    lines = [
        "| equation | | `ibp` | `crown`, `crown_ibp`, `alpha_crown`, `forward_linear` |",
        "|---|---|---|---|",
    ]
    for name in sorted(rows, key=lambda n: (list(map(kinds.index, rows[n].split(", else "))), n)):
        what = "function" if name in functions else "primitive"
        interval = "yes" if name in RULES else "no"
        lines.append(f"| `{name}` | {what} | {interval} | {rows[name]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"{table()}\n\n{LEGEND}")
