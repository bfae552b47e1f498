"""Dataclasses as pytrees: classes of equally many fields are not taken for each other."""

import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import pytest

import jaxcert
from jaxcert import AllOf, AnyOf, L1Ball, L2Ball, LinfBall, Spec
from jaxcert.model import split
from jaxcert.pytrees import pytree

X = jnp.ones((1, 2))
ALIKE = [
    [ball(X, 0.5) for ball in (LinfBall, L2Ball, L1Ball)],
    [group((Spec(X), Spec(X))) for group in (AllOf, AnyOf)],
]


@pytest.mark.parametrize("values", ALIKE, ids=["balls", "groups"])
def test_classes_of_equally_many_fields_differ(values):
    """`jit` ran the program of one ball for another, in one process of thirty."""
    for a, b in itertools.combinations(values, 2):
        assert jax.tree.structure(a) != jax.tree.structure(b)
        assert jax.tree.structure(a) == jax.tree.structure(dataclasses.replace(a))


def test_no_class_is_registered_in_another_way():
    sources = pathlib.Path(jaxcert.__file__).parent.rglob("*.py")
    users = [p.name for p in sources if "register_dataclass" in p.read_text()]
    assert users == ["pytrees.py"]  # which says why


@pytree
@dataclasses.dataclass(frozen=True)
class Pair:
    first: object
    name: str = dataclasses.field(metadata={"static": True})
    second: object = None


def test_static_fields_belong_to_the_structure():
    pair = Pair(X, "a", [X, 2 * X])
    leaves, treedef = jax.tree.flatten(pair)
    assert len(leaves) == 3
    again = jax.tree.unflatten(treedef, leaves)
    assert (again.first is X, again.name) == (True, "a")
    assert jax.tree.structure(Pair(X, "b", [X, X])) != treedef
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(pair)]
    assert paths == [".first", ".second[0]", ".second[1]"]


def test_models_that_are_dataclasses_of_the_user_differ():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Plain:
        weight: object

        def __call__(self, x):
            return x @ self.weight

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Negated(Plain):
        def __call__(self, x):
            return -x @ self.weight

    one, other = (split(kind(jnp.eye(2)))[1] for kind in (Plain, Negated))
    assert one != other
    assert one == split(Plain(2 * jnp.eye(2)))[1]
