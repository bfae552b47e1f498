"""VNN-LIB 2.0 through the package `vnnlib`: the same problem, and errors with places."""

import sys
from fractions import Fraction

import pytest

from jaxcert.errors import VnnlibError
from jaxcert.io import vnnlib

SECOND = """; the second edition
(vnnlib-version <2.0>)
(declare-network f
  (declare-input image float32 [2, 3])
  (declare-output logits float32 [1, 2]))
(assert (and (>= image[0,0] -0.1) (<= image[0,0] 0.1)))
(assert (and (>= image[0,1] 0.0) (<= image[0,1] 1.0) (== image[0,2] 0.5)))
(assert (and (>= image[1,0] 0.0) (<= image[1,0] 1.0) (== image[1,1] 0.5)))
(assert (and (>= (* 2.0 image[1,2]) 0.0) (<= (+ image[1,2] image[1,2]) 0.30)))
(assert (or (< logits[0,0] (- logits[0,1] 0.1)) (>= (- logits[0,0]) 5.0)))
"""


def test_the_second_edition_says_the_same():
    pytest.importorskip("vnnlib")
    problem = vnnlib.parse(SECOND)
    assert (problem.inputs, problem.outputs) == (6, 2)
    (case,) = problem.cases
    assert case.lower == (Fraction("-0.1"), 0, Fraction(1, 2), 0, Fraction(1, 2), 0)
    assert case.upper == (Fraction("0.1"), 1, Fraction(1, 2), 1, Fraction(1, 2), Fraction("0.15"))
    assert case.unsafe == (
        (vnnlib.Row(((0, 1), (1, -1)), Fraction("0.1"), strict=True),),
        (vnnlib.Row(((0, 1),), Fraction(5)),),
    )


@pytest.mark.parametrize(
    ("old", "new", "place", "words"),
    [
        ("(declare-network f", "(declare-network", "4:3", "syntax error: '.declare-input'"),
        ("0.30", "0.3e", "9:75", "syntax error: 'e'"),
        ("image[1,2] image[1,2]", "image[1,9] image[1,2]", "9:1", "bounds for variable: image.1,9"),
        ("(* 2.0 ", "(* image[0,0] ", "9:1", "a product of variables"),
        ("(- logits[0,1] 0.1)", "image[0,1]", "10:1", "in one comparison"),
        ("(<= image[1,0] 1.0)", "(!= image[1,0] 1.0)", "8:1", "NotEqual"),
        ("(declare-output", "(declare-input more real [])(declare-output", "1:1", "2 inputs"),
        ("(and (>= image[1,0] 0.0) ", "(and ", "1:1", "no lower bound on X_3"),
    ],
)
def test_the_second_edition_has_errors_with_places(old, new, place, words):
    pytest.importorskip("vnnlib")
    assert old in SECOND
    with pytest.raises(VnnlibError, match=rf"(?s)^f.vnnlib:{place}: .*{words}"):
        vnnlib.parse(SECOND.replace(old, new), "f.vnnlib")


@pytest.mark.parametrize("sort", ["int8", "Real", "complex64"])
def test_the_second_edition_is_read_for_real_tensors_only(sort):
    pytest.importorskip("vnnlib")
    text = f"""(vnnlib-version <2.0>)
    (declare-network f (declare-input x {sort} [1]) (declare-output y float32 []))
    (assert (<= x[0] x[0]))"""
    with pytest.raises(VnnlibError, match="x of another type; expected real, float16"):
        vnnlib.parse(text)


def test_the_second_edition_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "vnnlib", None)
    with pytest.raises(VnnlibError, match="pip install vnnlib"):
        vnnlib.parse(SECOND)
