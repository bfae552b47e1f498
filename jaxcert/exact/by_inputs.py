"""Branch and bound on boxes of the inputs that vary, from the host."""

import functools
import math

import jax
import numpy as np

from jaxcert.exact import cost, inputs, search
from jaxcert.exact.call import Call
from jaxcert.exact.question import rounded

AT_A_TIME = 32  # boxes, at most
FEW_INPUTS = 16
"""Up to so many inputs that vary, the search splits inputs, else hidden values."""


def by_inputs(call: Call, varying: tuple[int, ...]) -> None:
    """Work on all open questions of a call. Only inside `enable_x64`."""
    places = inputs.Places(call.model.shape, _filled_up(varying, math.prod(call.model.shape)))
    box = inputs.box_of(call.asked.region, True)
    start = inputs.Boxes(*[places.pick(np.asarray(end)) for end in (box.lower, box.upper)])
    here = np.flatnonzero(call.outcome.open)

    def block(state, steps):
        return _block(call.model, places, call.arrays, call.asked, state, steps)

    call.run(block, None, AT_A_TIME, start, here, np.arange(len(call.outcome.status)))


def _filled_up(varying: tuple[int, ...], size: int) -> np.ndarray:
    """The inputs that vary and some that do not, so that few programs serve all numbers."""
    count = size if size <= FEW_INPUTS else max(4, rounded(len(varying)))
    others = [i for i in range(min(size, 2 * count)) if i not in set(varying)]
    more = max(0, min(count, size) - len(varying))
    return np.array(sorted([*varying, *others[:more]]), np.int32)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _block(model, places, arrays, asked, state, steps):
    expand = functools.partial(inputs.expansion, model, places, arrays, asked)
    _, each = cost.of_rows(model, arrays)
    return search.block(expand, cost.affordable(each, AT_A_TIME), state, steps)
