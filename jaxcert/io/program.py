"""A net read from a file, as steps over numbered values: static, hashable, without names.

Two nets of one architecture have equal programs, whatever their tensors are called, so they share
whatever is compiled.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax

from jaxcert.errors import JaxcertError
from jaxcert.graph import trace
from jaxcert.io.operators import lookup
from jaxcert.rows import check

Array: TypeAlias = jax.Array

_BATCH = 3  # at which a program is compared with itself on a single example


@dataclasses.dataclass(frozen=True)
class Step:
    """One operator applied to values.

    Attributes:
      name, version: which operator.
      operands: numbers of values, and ~i for weight i; None for one that is left out.
      options: its known operands and attributes.
      results: how many results it has.
      label: the node's name in the file, which error messages of the bounds show.
    """

    name: str
    version: int
    operands: tuple[int | None, ...]
    options: tuple[tuple[str, Any], ...]
    results: int = 1
    label: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Program:
    """What a net computes from its weights and its input, value 0.

    Attributes:
      steps: in order of evaluation; their results are values 1, 2, ...
      result: the output's number.
      input_shape: of one example.
      outputs: how many numbers there are in the output for one example.
      leading: whether the file's input has an axis for the batch.
      together: whether the steps hold for a batch along axis 0 of every value; if not, examples are
        mapped over.
      input_name, output_name: as in the file.
    """

    steps: tuple[Step, ...]
    result: int
    input_shape: tuple[int, ...]
    outputs: int
    leading: bool
    together: bool = False
    input_name: str = dataclasses.field(default="", compare=False)
    output_name: str = dataclasses.field(default="", compare=False)

    def values(self, weights: Sequence[Any], x: Any) -> list[Any]:
        """All values, the input first, for one example in the file's shape or for a batch."""
        values = [x]
        for step in self.steps:
            operator = lookup(step.name, step.version)
            assert operator is not None
            operands = [_read(i, values, weights) for i in step.operands]
            with jax.named_scope(step.label or step.name):
                results = operator.apply(*operands, **dict(step.options))
            values.extend(results if isinstance(results, tuple) else (results,))
        return values

    def __call__(self, weights: Sequence[Any], x: Array) -> Array:
        """Logits (b, outputs) of a batch (b, *input_shape)."""
        if self.together:
            return self.values(weights, x)[self.result].reshape(len(x), self.outputs)

        def one(row: Array) -> Array:
            row = row[None] if self.leading else row
            return self.values(weights, row)[self.result].reshape(self.outputs)

        return jax.vmap(one)(x)


def _read(place: int | None, values: Sequence[Any], weights: Sequence[Any]) -> Any:
    if place is None:
        return None
    return values[place] if place >= 0 else weights[~place]


# A file describes what happens to one example. Axis 0 of a value may stand for the batch if it has
# size 1 for one example and grows with the batch while nothing else does, and if no equation mixes
# rows (`rows.py`): then row i is made of row i in the way the file says. Constants cannot tell rows
# apart, because along that axis they have size 1 for one example, like everything else.


@functools.lru_cache(maxsize=256)
def rows_stay_apart(
    program: Program, weights: tuple[jax.ShapeDtypeStruct, ...], dtype: Any
) -> bool:
    """Whether a program holds for batches along axis 0 of every value. Inside of `enable_x64`.

    Args:
      program: the program.
      weights: what its weights are like.
      dtype: of its input.
    """

    def run(x: Any, *weights: Any) -> tuple[Any, ...]:
        return tuple(program.values(weights, x))

    def at(batch: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *program.input_shape), dtype)

    def result(x: Any, *weights: Any) -> Any:
        return run(x, *weights)[program.result]

    if not program.leading:
        return False
    one = jax.eval_shape(run, at(1), *weights)
    try:
        many = jax.eval_shape(run, at(_BATCH), *weights)
        bounded = [True] + [False] * len(weights)
        check(trace(result, at(_BATCH), *weights, bounded=bounded), _BATCH)
    except (TypeError, ValueError, JaxcertError):  # what fails on a batch holds for none
        return False
    return all(
        (a.shape[:1], b.shape) == ((1,), (_BATCH, *a.shape[1:]))
        for a, b, depends in zip(one, many, _depends(program), strict=True)
        if depends
    )


def _depends(program: Program) -> list[bool]:
    """Which values depend on the input."""
    flags = [True]
    for step in program.steps:
        flags += [any(i is not None and i >= 0 and flags[i] for i in step.operands)] * step.results
    return flags
