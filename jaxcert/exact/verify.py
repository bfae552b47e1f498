"""Verdicts by search: falsification first, then branch and bound."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcert.bounds.interpreter import RULES
from jaxcert.bounds.planes import PLANES
from jaxcert.certificate import Reason, Status, Verdict
from jaxcert.exact.by_activations import by_activations
from jaxcert.exact.by_inputs import FEW_INPUTS, by_inputs
from jaxcert.exact.call import Call
from jaxcert.exact.model import posed
from jaxcert.exact.outcome import Budget, Clock, Outcome, Report
from jaxcert.exact.question import padded
from jaxcert.floats import ieee_float64
from jaxcert.model import Model
from jaxcert.sets import AnySet, Array, like
from jaxcert.specs import Property


def verify(
    f: Model,
    region: AnySet,
    prop: Property,
    *,
    budget: Budget = Budget(),  # noqa: B008
    split_inputs: bool | None = None,
    key: Array | None = None,
    report: Report | None = None,
) -> Verdict:
    """Decide for each set whether the property holds on all of it.

    Sets of one call share batches: many images cost little more than the hardest of them alone.

    Args:
      f: the model, (b, *input) -> (b, k), rows independent.
      region: a `Box`, `LinfBall`, `L2Ball`, `L1Ball` or `Polytope` of b sets.
      prop: a `Spec`, or `AllOf` and `AnyOf` of them, with `>` strict.
      budget: of the whole call.
      split_inputs: whether to split inputs rather than hidden values; by default where at most
        `FEW_INPUTS` of them vary.
      key: of the attack's starting points.
      report: called now and then with the `Progress`.

    Returns:
      A `Verdict`. VERIFIED is a proof: over the reals, rounding counted. FALSIFIED comes with a
      counterexample in the set that breaks the property in the model's own arithmetic and in
      float64. UNKNOWN says why: out of time, sub-domains or memory; LOOSE, if nothing is left to
      split but functions are not exactly bounded; or numerically undecided.

    Raises:
      ValueError, TypeError: wrong shapes, dtypes or values.
      UnsupportedEquation, MixedRows: the model cannot be bounded.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxcert import LinfBall, Spec
      >>> f = lambda x: jnp.abs(x - 0.25) + jnp.abs(x + 0.25)
      >>> ball = LinfBall(jnp.zeros((2, 1)), 1.0)
      >>> verdict = verify(f, ball, Spec(jnp.ones((1, 1)), jnp.array([[-0.4], [-0.6]])))
      >>> print(verdict.status, abs(verdict.counterexample[1, 0]) < 0.3)
      [1 2] True
    """
    outcome = decide(
        f, region, prop, budget=budget, split_inputs=split_inputs, key=key, report=report
    )
    example = jnp.asarray(outcome.example.astype(_own_dtype(region)))
    status, reason = (jnp.asarray(a, jnp.int32) for a in (outcome.status, outcome.reason))
    return Verdict(status, reason, example)


def _own_dtype(region: AnySet) -> Any:
    return jax.dtypes.canonicalize_dtype(like(region).dtype)


def decide(
    f: Model,
    region: AnySet,
    prop: Property,
    *,
    budget: Budget,
    split_inputs: bool | None = None,
    key: Array | None = None,
    report: Report | None = None,
) -> Outcome:
    """As `verify`, with the counterexamples in float64 and the number of sub-domains."""
    clock, key = Clock(budget, report), jax.random.key(0) if key is None else key
    model, arrays, asked = posed(f, region, prop, (*RULES.items(), *PLANES.items()))
    n = len(asked.offset)
    with jax.enable_x64(True):
        arrays, asked = ieee_float64((arrays, jax.tree.map(jnp.asarray, padded(asked))))
        none = np.zeros(n, np.int32)
        outcome = Outcome(none, np.full(n, Reason.TIME, np.int32), np.zeros((n, *model.shape)))
        outcome.settle(~np.asarray(asked.clauses).any((1, 2)), Status.VERIFIED)  # nothing is asked
        call = Call(model, arrays, asked, outcome, clock, key)
        first = jax.tree.map(lambda a: np.asarray(a)[:1], asked.region)
        model.require_alone_as_among_others(arrays, first)
        if asked.cuts.count:
            call.cut_boxes()
        if outcome.open.any():
            call.attack()
        varying = call.varying()
        few = len(varying) <= FEW_INPUTS if split_inputs is None else split_inputs
        if outcome.open.any():
            by_inputs(call, varying) if few else by_activations(call)
    return outcome
