"""Whether a model computes the same hidden values in the same order for two batch sizes.

What is known of hidden values is found for one batch and used for others. A model is traced for
each, and may be traced to other equations: axes of size 1 are squeezed, `jnp.einsum` chooses its
order of contraction by sizes, a function may branch on `len(x)`. Outlines of two graphs are alike
if each equation of one has its counterpart in the other, with the same name, parameters, constants
and operands, and if sizes are the same or in the proportion of the batches.
"""

import dataclasses
import hashlib
import re
from typing import Any

import numpy as np

from jaxcert.errors import UnsupportedEquation
from jaxcert.graph import Graph, Var
from jaxcert.model import is_traced

_SIZES = frozenset("new_sizes shape limit_indices slice_sizes sizes".split())
"""Parameters that are sizes, of which an axis of examples may be one."""

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclasses.dataclass(frozen=True)
class Outline:
    """What a graph computes for so many examples.

    Attributes:
      batch: how many.
      parts: names, operands and parameters, which must be the same.
      sizes: those that may be proportional to the batch.
      constants: shapes and contents, as far as they are known.
    """

    batch: int
    parts: str
    sizes: tuple[int, ...]
    constants: tuple[tuple[tuple[int, ...], str], ...]

    def alike(self, other: "Outline") -> bool:
        """Whether two graphs compute the same for each example."""
        if self.parts != other.parts or len(self.sizes) != len(other.sizes):
            return False
        a, b = (np.array(each.sizes, np.float64) for each in (self, other))
        in_proportion = np.all((a == b) | (a * other.batch == b * self.batch))
        # A constant with an axis of examples has other entries for each batch.
        pairs = zip(self.constants, other.constants, strict=True)
        return bool(in_proportion) and all(x == y or x[0] != y[0] for x, y in pairs)


def require_alike(a: Outline, b: Outline) -> None:
    """Refuse a model that does not compute the same for two batch sizes."""
    if not a.alike(b):
        raise UnsupportedEquation(
            "the model is traced to other equations for other batch sizes, so what is known of its "
            "hidden values for one does not hold for the other; verify it with split_inputs=True"
        )


def outline(graph: Graph, batch: int) -> Outline:
    """The outline of a graph that was traced for so many examples."""
    number: dict[Var, int] = {}
    parts: list[Any] = []
    sizes: list[int] = []
    constants: list[Any] = []

    def written(v: Var) -> Any:
        number[v] = len(number)
        sizes.extend(v.shape)
        return number[v], len(v.shape), str(v.dtype), v.bounded

    def read(a: Any) -> Any:
        if isinstance(a, Var):
            return number[a]
        sizes.extend(np.shape(a))
        content = "" if is_traced(a) else hashlib.sha256(np.asarray(a).tobytes()).hexdigest()
        constants.append((np.shape(a), content))
        return np.ndim(a), str(a.dtype)

    parts.append([written(v) for v in graph.inputs])
    for eqn in graph.equations:
        parts.append((eqn.name, [read(a) for a in eqn.inputs], [written(v) for v in eqn.outputs]))
        for key, value in sorted(eqn.params.items()):
            if key in _SIZES and value is not None:
                flat = np.array(value, np.int64).reshape(-1).tolist()
                parts.append((key, len(flat)))
                sizes.extend(flat)
            else:
                parts.append((key, _ADDRESS.sub("", repr(value))))
    parts.append([read(a) for a in graph.outputs])
    return Outline(batch, repr(parts), tuple(sizes), tuple(constants))
