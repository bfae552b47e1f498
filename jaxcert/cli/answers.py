"""The answer to a problem from a property file, in VNN-COMP's words.

`unsat`: no input makes the assertions true, the property holds. `sat`: this input does, the
property is violated. `timeout` and `unknown`: no answer, with the reason.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.certificate import MESSAGES, Reason, Status
from jaxcert.errors import JaxcertError
from jaxcert.exact.outcome import Budget, Report
from jaxcert.exact.verify import decide
from jaxcert.io.onnx import OnnxModel
from jaxcert.io.vnnlib import Case, Problem, counterexample_text, nearest_inside
from jaxcert.model import run, split
from jaxcert.sets import AnySet, Box, Polytope

UNSAT, SAT, UNKNOWN, TIMEOUT = "unsat", "sat", "unknown", "timeout"
VERDICTS = (UNSAT, SAT, UNKNOWN, TIMEOUT)

OUTSIDE = (
    "a point was found that violates the property, but its decimals do not satisfy the constraints "
    "on inputs"
)
NOT_REPLAYED = (
    "a counterexample was found, but its decimals do not violate the property in both float32 and "
    "float64; the margin is within rounding of zero"
)


@dataclasses.dataclass(frozen=True)
class Example:
    """A counterexample: inputs as they are printed, and the outputs of the net in float32."""

    inputs: tuple[str, ...]
    outputs: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What is said about a problem.

    Attributes:
      verdict: one of `VERDICTS`.
      reason: why there is no answer; empty where there is one.
      example: the counterexample of `sat`.
      domains: sub-domains that were bounded.
      spent: seconds by what was done (`Outcome.spent`).
    """

    verdict: str
    reason: str = ""
    example: Example | None = None
    domains: int = 0
    spent: Mapping[str, float] = dataclasses.field(default_factory=dict, compare=False)

    def text(self) -> str:
        """The lines that VNN-COMP reads: the verdict, after `sat` the counterexample."""
        if self.example is None:
            return self.verdict
        return f"{self.verdict}\n{counterexample_text(self.example.inputs, self.example.outputs)}"

    def remark(self, seconds: float) -> str:
        """One line for people: the reason, or what was done instead, and at what cost."""
        done = {UNSAT: "proved", SAT: "replayed in float32 and float64"}
        return (
            f"{done.get(self.verdict, self.reason)} ({seconds:.1f} s, {self.domains} sub-domains)"
        )


def require_fitting(model: OnnxModel, problem: Problem) -> None:
    """A net and a property have the same numbers of inputs and outputs."""
    pairs = (
        ("inputs", math.prod(model.input_shape), problem.inputs),
        ("outputs", model.outputs, problem.outputs),
    )
    for name, has, declared in pairs:
        if has != declared:
            raise ValueError(
                f"the net has {has} {name} but the property declares {declared}; "
                "is this the property of another net?"
            )


def answer(
    model: OnnxModel,
    problem: Problem,
    *,
    until: float,
    seed: int = 0,
    report: Report | None = None,
) -> Answer:
    """Decide a problem before `time.perf_counter()` shows `until`.

    Whatever the search refuses, a net without a rule for one of its operators for example, is
    `unknown` with the refusal as the reason.
    """
    try:
        return _answer(model, problem, until, seed, report)
    except (JaxcertError, ValueError, TypeError, MemoryError) as error:
        return Answer(UNKNOWN, said(error))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Answer(UNKNOWN, said(error))


def _answer(
    model: OnnxModel, problem: Problem, until: float, seed: int, report: Report | None
) -> Answer:
    reasons: list[str] = []
    domains, spent = 0, dict[str, float]()

    def ended(verdict: str, reason: str = "", example: Example | None = None) -> Answer:
        return Answer(verdict, reason, example, domains, spent)

    for case in problem.cases:
        outcome = decide(
            model,
            region(case, model.input_shape),
            case.spec(problem.outputs),
            budget=Budget(seconds=until - time.perf_counter()),
            key=jax.random.key(seed),
            report=report,
        )
        domains += outcome.visited
        for name, seconds in outcome.spent.items():
            spent[name] = spent.get(name, 0.0) + seconds
        status, reason = Status(outcome.status[0]), Reason(outcome.reason[0])
        if status == Status.FALSIFIED:
            example, refusal = replay(model, case, outcome.example[0])
            if example is not None:
                return ended(SAT, example=example)
            reasons.append(refusal)
        elif reason == Reason.TIME:
            return ended(TIMEOUT, MESSAGES[reason])
        elif status != Status.VERIFIED:
            reasons.append(MESSAGES[reason])
    if reasons:
        return ended(UNKNOWN, reasons[0])
    return ended(UNSAT)


def region(case: Case, shape: tuple[int, ...]) -> AnySet:
    """The set that is searched: the box of a case, cut by its constraints between inputs.

    It is rounded outward and closed, so it has all of the case, and a counterexample may be next to
    the case, which `replay` looks at.
    """
    lower, upper = (end.reshape(1, *shape) for end in case.box())
    if not case.cuts:
        return Box(lower, upper)
    matrix, offset = case.cut_rows()
    return Polytope(lower, upper, matrix.reshape(-1, *shape), offset)


def replay(model: OnnxModel, case: Case, x: np.ndarray) -> tuple[Example | None, str]:
    """A point as a counterexample, if what is printed is one; else why it is none.

    The decimals lie in the case exactly. What they round to gives outputs that violate the property
    exactly, in the net's float32 as well as in float64.
    """
    printed = nearest_inside(case, x.reshape(-1).tolist())
    if not case.contains(printed.values):
        return None, OUTSIDE
    point = np.array([float(text) for text in printed.texts]).reshape(1, *model.input_shape)
    narrow = _outputs(model, point.astype(np.float32))
    with jax.enable_x64(True):
        wide = _outputs(jax.tree.map(_widened, model), point)
    if not (case.violated_by(narrow) and case.violated_by(wide)):
        return None, NOT_REPLAYED
    return Example(printed.texts, tuple(narrow)), ""


def _outputs(model: OnnxModel, point: np.ndarray) -> list[float]:
    """What a net computes for a single input, without the shortcuts of accelerators."""
    arrays, structure = split(model)
    with jax.default_matmul_precision("highest"):
        return np.asarray(run(structure, arrays, jnp.asarray(point)))[0].tolist()


def _widened(weight: Any) -> np.ndarray:
    """A weight in float64 if it is a float; by numpy, since each operation of JAX would compile."""
    weight = np.asarray(weight)
    return weight.astype(np.float64) if jnp.issubdtype(weight.dtype, jnp.floating) else weight


def said(error: BaseException) -> str:
    """What an exception says, on one line; the first of a message that goes on with details."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    first = str(error).strip().partition("\n")[0].rstrip()
    if first and isinstance(error, JaxcertError | OSError | ValueError | ImportError):
        return first
    return f"{type(error).__name__}: {first}"
