"""A few instances of VNN-COMP against the consensus of its tools."""

import csv
import time

import pytest

from jaxcert.cli.answers import answer
from jaxcert.io import onnx, vnnlib

CHOSEN = {
    "acasxu": [("3_3", "prop_9.")],
    "rl_benchmarks": [("cartpole", "unsafe_1."), ("dubinsrejoin", "unsafe_25.")],
    "mnist_fc": [("256x2", "prop_0_0.03"), ("256x2", "prop_1_0.05")],
}


@pytest.mark.parametrize(
    "benchmark",
    ["acasxu", *(pytest.param(b, marks=pytest.mark.slow) for b in ("mnist_fc", "rl_benchmarks"))],
)
def test_verdicts_are_those_of_the_consensus(data, benchmark):
    folder = data / "vnncomp"
    with (folder / "expected.csv").open() as file:
        known = [row for row in csv.DictReader(file) if row["benchmark"] == benchmark]
    for net, prop in CHOSEN[benchmark]:
        row = next(row for row in known if net in row["onnx"] and prop in row["vnnlib"])
        paths = [next((folder / benchmark).glob(row[key] + "*")) for key in ("onnx", "vnnlib")]
        found = answer(onnx.read(paths[0]), vnnlib.read(paths[1]), until=time.perf_counter() + 300)
        assert found.verdict == row["consensus"]
