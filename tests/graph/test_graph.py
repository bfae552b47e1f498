"""Graphs are the functions they were traced from: calls, loops, branches, dead code, errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import MODELS, weights

from jaxcert.bounds import ibp, interpreter, register
from jaxcert.errors import DataDependent, UnsupportedEquation
from jaxcert.graph import Var, evaluate, prune, trace
from jaxcert.idioms import simplify
from jaxcert.model import split
from jaxcert.rows import FOLLOW
from jaxcert.sets import Box


def _unit(batch=2, width=3):
    return Box(jnp.zeros((batch, width)), jnp.ones((batch, width)))


@pytest.mark.parametrize("name", ["attention", "recurrent", "rematted_nnx", "arithmetic"])
def test_a_graph_evaluates_to_its_function(name):
    f, shape = MODELS[name]()
    arrays, structure = split(f)
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, *shape)), jnp.float32)
    graph = trace(lambda a: structure.build(arrays)(a), x)
    y = np.asarray(f(x))
    plain, simplified = jax.jit(lambda x: (evaluate(graph, x), evaluate(simplify(graph), x)))(x)
    assert np.allclose(plain[0], y, atol=1e-5)
    assert np.allclose(simplified[0], y, atol=1e-5)
    # flat: nothing is left to enter, every name is a primitive or a known function
    entered = {"jit", "pjit", "custom_jvp_call", "custom_vjp_call", "scan", "cond", "remat2"}
    assert not entered & {eqn.name for eqn in graph.equations}
    assert len(simplify(graph).equations) <= len(graph.equations)


def test_scan_is_its_loop():
    stack = weights(3, 3, 3, seed=1)

    def scanned(x, reverse=False):
        h, ys = lax.scan(lambda h, w: (jnp.tanh(h @ w), h.sum(1)), x, stack, reverse=reverse)
        return h + ys.sum(0)[:, None] + ys[0][:, None]

    def looped(x, reverse=False):
        ys = [None] * 3
        for i in reversed(range(3)) if reverse else range(3):
            ys[i] = x.sum(1)
            x = jnp.tanh(x @ stack[i])
        return x + sum(ys)[:, None] + ys[0][:, None]

    for reverse in (False, True):
        both = [ibp(functools.partial(f, reverse=reverse))(_unit()) for f in (scanned, looped)]
        assert np.allclose(both[0].lower, both[1].lower, atol=1e-6)
        assert np.allclose(both[0].upper, both[1].upper, atol=1e-6)


def test_loops_with_constant_limits_and_empty_ones():
    def f(x):
        x = lax.fori_loop(0, 3, lambda i, h: h * 2, x)
        x, none = lax.scan(lambda h, _: (h + 1, h.sum(1)), x, jnp.zeros((0, 1)))
        return x + none.sum()

    box = ibp(f)(_unit())
    assert (box.lower == 0).all()
    assert (box.upper == 8).all()


def test_while_over_bounded_values_is_refused():
    def f(x):
        return lax.while_loop(lambda h: h[0, 0] < 1, lambda h: h + 1, x)

    with pytest.raises(DataDependent, match=r"while loop.*test_graph.py:\d+.*lax.scan"):
        ibp(f)(_unit())


def test_cond_on_a_bounded_value_is_refused():
    with pytest.raises(DataDependent, match=r"control flow.*test_graph.py:\d+.*jnp.where"):
        ibp(lambda x: lax.cond(x[0, 0] > 0, lambda a: a, lambda a: -a, x))(_unit(1))


def test_cond_on_known_values_takes_its_branch():
    def f(x, flag):
        return lax.cond(flag > 0, lambda a: a + 10, lambda a: a - 10, x)

    for flag, sign in ((1, 10), (-1, -10)):
        for method in (ibp, functools.partial(ibp, outward=True)):
            eager = method(functools.partial(f, flag=np.float32(flag)))(_unit())
            assert np.allclose(eager.lower, sign, atol=1e-5)
            assert np.allclose(eager.upper, sign + 1, atol=1e-5)


@pytest.mark.parametrize("outward", [False, True])
def test_branches_on_weights_under_jit(outward):
    def f(switch, x):
        y = lax.cond(switch[0] > 0, lambda a: a * 2, lambda a: a - 5, x)
        return lax.switch(switch[1], [lambda a: a, lambda a: -a, lambda a: a * 0], y)

    @jax.jit
    def bounds(switch):
        return ibp(functools.partial(f, switch), outward=outward)(_unit())

    for s0, s1 in [(-1, 0), (1, 1), (1, 2), (1, 7), (-1, -4)]:
        switch = jnp.array([s0, s1], jnp.int32)
        box = bounds(switch)
        ends = np.stack([f(switch, jnp.zeros((2, 3))), f(switch, jnp.ones((2, 3)))])
        assert np.allclose(box.lower, ends.min(0), atol=1e-5)
        assert np.allclose(box.upper, ends.max(0), atol=1e-5)


def test_dead_code_is_not_asked_about():
    def f(x):
        lax.while_loop(lambda h: h < 3, lambda h: h + 1.0, 0.0)
        jnp.argmax(x, axis=1)
        jax.scipy.special.digamma(x)
        return x * 2

    assert (ibp(f)(_unit()).upper == 2).all()
    graph = trace(f, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    assert [eqn.name for eqn in graph.equations] == ["mul"]
    assert prune(graph).equations == graph.equations


def test_an_unknown_primitive_is_named_with_its_line_and_the_remedy():
    def f(x):
        return jax.scipy.special.digamma(x + 2)

    for outward in (False, True):
        with pytest.raises(UnsupportedEquation, match="digamma") as info:
            ibp(f, outward=outward)(_unit())
        assert re.search(r"test_graph.py:\d+ in \S*f", str(info.value))
        assert "jaxcert.bounds.register('digamma', rule)" in str(info.value)


@pytest.fixture
def registered():
    """Undo what a test registers."""
    rules, follow = dict(interpreter.RULES), dict(FOLLOW)
    yield
    for table, before in ((interpreter.RULES, rules), (FOLLOW, follow)):
        table.clear()
        table.update(before)


@pytest.mark.usefixtures("registered")
def test_a_user_can_register_a_rule():
    def increasing(equation, values, outward):
        (x,) = values
        return Box(*equation.bind(x.lower), *equation.bind(x.upper))

    register("digamma", increasing)
    digamma = jax.scipy.special.digamma
    box = ibp(lambda x: digamma(x + 2))(_unit())
    assert np.allclose(box.lower, digamma(2.0))
    assert np.allclose(box.upper, digamma(3.0))


def test_registrations_of_other_tests_are_gone():
    assert "digamma" not in interpreter.RULES


@pytest.mark.parametrize("outward", [False, True])
def test_arithmetic_on_weights_alone(outward):
    """Functions of the weights are computed, or bounded, without depending on the input."""
    w = weights(3, 3, seed=3)

    def f(w, x):
        scaled = w / jnp.sqrt(jnp.sum(w**2, axis=0) + 1e-3) * jnp.where(w > 0, 1.0, 0.5)
        return x @ jnp.sort(scaled, axis=0) + jnp.exp(scaled[0])

    bound = jax.jit(lambda w: ibp(functools.partial(f, w), outward=outward)(_unit()))
    box = bound(w)
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(64, 3)), jnp.float32)
    y = np.asarray(f(w, x))
    assert (np.asarray(box.lower[0]) <= y.min(0) + 1e-5).all()
    assert (y.max(0) - 1e-5 <= np.asarray(box.upper[0])).all()
    assert (np.asarray(box.upper - box.lower) < 5).all()


def test_constants_are_folded_and_inputs_are_not():
    def f(x):
        return x + jnp.reshape(jnp.arange(6.0), (2, 3))[::-1]

    graph = trace(f, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    assert [eqn.name for eqn in graph.equations] == ["add"]
    (eqn,) = graph.equations
    assert sum(isinstance(a, Var) for a in eqn.inputs) == 1
    assert eqn.bounded
