"""VNN-COMP: counterexamples print inside the box, lists of instances find their files."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcert.errors import VnnlibError
from jaxcert.io import vnnlib

X = "(declare-const X_0 Real)(declare-const Y_0 Real)\n"


def test_inputs_are_printed_as_decimals_inside_the_box():
    text = X + "(assert (and (<= X_0 0.3) (>= X_0 0.1)))"
    (case,) = vnnlib.parse(text).cases
    for x, printed in [
        (0.1, "0.1"),  # the float lies above 0.1, and its shortest decimal is 0.1
        (case.box()[0][0], "0.1"),
        (0.3, "0.3"),
        (np.float32(0.2), "0.20000000298023224"),
        (-math.inf, "0.1"),
        (math.inf, "0.3"),
        (0.1 + 0.2, "0.3"),
    ]:
        texts, values = vnnlib.nearest_inside(case, [x])
        assert texts == (printed,)
        assert values == (Fraction(printed),)
        assert case.contains(values)
    with pytest.raises(ValueError, match="NaN"):
        vnnlib.nearest_inside(case, [math.nan])


@given(st.fractions(-2, 2), st.fractions(Fraction(1, 10**9), 2), st.floats(-3, 5))
@settings(max_examples=60)
def test_what_is_printed_lies_inside(low, width, x):
    text = X + f"(assert (and (<= X_0 (/ {(low + width).numerator} {(low + width).denominator}))"
    (case,) = vnnlib.parse(text + f"(>= X_0 (/ {low.numerator} {low.denominator}))))").cases
    assert case.contains(vnnlib.nearest_inside(case, [x]).values)


def test_counterexamples_have_the_form_of_the_competition():
    text = vnnlib.counterexample_text(["0.1", "1e-05"], np.array([0.1, -3], np.float32))
    assert text == "((X_0 0.1)\n(X_1 1e-05)\n(Y_0 0.10000000149011612)\n(Y_1 -3.0))"


def test_instances_find_plain_and_compressed_files(tmp_path):
    (tmp_path / "nets").mkdir()
    for name in ("nets/a.onnx", "p.vnnlib.gz", "q, r.vnnlib"):
        (tmp_path / name).touch()
    listed = tmp_path / "instances.csv"
    listed.write_text('nets/a.onnx,p.vnnlib,30\r\n\n./nets/a.onnx, "q, r.vnnlib" ,1.5e2\n')
    assert vnnlib.instances(listed) == [
        vnnlib.Instance(tmp_path / "nets/a.onnx", tmp_path / "p.vnnlib.gz", 30.0),
        vnnlib.Instance(tmp_path / "nets/a.onnx", tmp_path / "q, r.vnnlib", 150.0),
    ]


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        ("a.onnx,b.vnnlib,1", FileNotFoundError, r"b\.vnnlib nor .*b\.vnnlib\.gz exists"),
        ("a.onnx,a.onnx", VnnlibError, "2 columns"),
        ("a.onnx,a.onnx,soon", VnnlibError, "'soon'"),
        ("a.onnx,a.onnx,nan", VnnlibError, "'nan'"),
    ],
)
def test_wrong_instances_name_their_line(tmp_path, line, error, words):
    (tmp_path / "a.onnx").touch()
    (tmp_path / "instances.csv").write_text(f"a.onnx,a.onnx,1\n\n{line}\n")
    with pytest.raises(error, match=rf"instances\.csv:3: .*{words}"):
        vnnlib.instances(tmp_path / "instances.csv")
