"""Branch and bound on boxes of the inputs that vary, from the host."""

import functools

import jax
import numpy as np

from jaxcert.exact import inputs, search
from jaxcert.exact.call import Call

AT_A_TIME = 32  # boxes


def by_inputs(call: Call, varying: tuple[int, ...]) -> None:
    """Work on all open questions of a call. Only inside `enable_x64`."""
    places = inputs.Places(call.model.shape, varying)
    box = inputs.box_of(call.asked.region, True)
    start = inputs.Boxes(*[places.pick(np.asarray(end)) for end in (box.lower, box.upper)])
    here = np.flatnonzero(call.outcome.open)

    def block(state, steps):
        return _block(call.model, places, AT_A_TIME, call.arrays, call.asked, state, steps)

    call.run(block, None, AT_A_TIME, start, here, np.arange(len(call.outcome.status)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _block(model, places, k, arrays, asked, state, steps):
    expand = functools.partial(inputs.expansion, model, places, arrays, asked)
    return search.block(expand, k, state, steps)
