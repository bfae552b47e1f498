"""How many sub-domains to bound at a time, going by what the model costs.

A step's places that are empty take as long as others, as they are in the first steps, and the clock
is not looked at during a step. So there are as many as a CPU is done with in about a second.
"""

import math
from typing import Any

import jax
import numpy as np

from jaxcert.bounds.expand import expand
from jaxcert.bounds.relaxations import LINES
from jaxcert.bounds.residual import products
from jaxcert.exact.model import Traceable
from jaxcert.graph import Var

_A_SECOND = 2**34
"""Multiplications of matrices with rows, where many are pulled back at a time."""


def of_rows(model: Traceable, arrays: Any) -> tuple[int, int]:
    """Multiplications for one row of the outputs pulled back to one input, and for the rows of all
    hidden values."""
    graph, _ = model.trace(arrays, 1)
    behind = every = 1
    for eqn in expand(graph).graph.equations:
        size = sum(math.prod(a.shape) for a in eqn.inputs if isinstance(a, Var) and a.bounded)
        every += size * behind if eqn.name in LINES else 0
        behind += size * products(eqn) if eqn.bounded else 0
    return behind, every


def affordable(multiplications: int, most: int) -> int:
    """A power of two from 2 up to `most`, itself one, for so many multiplications each."""
    if jax.default_backend() != "cpu":
        return most
    return 2 ** int(np.clip(np.log2(_A_SECOND / multiplications), 1, np.log2(most)))
