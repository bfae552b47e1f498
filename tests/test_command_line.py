"""The command line: verdicts that can be checked, mistakes on one line, runs outlast a kill."""

import csv
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time
from fractions import Fraction

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import jaxcert.cli.answers
import jaxcert.cli.benchmark
from jaxcert.certificate import MESSAGES, Reason, Status
from jaxcert.cli.command import main
from jaxcert.errors import UnsupportedEquation
from jaxcert.exact.outcome import Outcome, Progress
from jaxcert.io import vnnlib

ROOT = pathlib.Path(__file__).parent.parent
HEAD = "(declare-const X_0 Real)(declare-const X_1 Real)(declare-const Y_0 Real)\n"
BOX = "(assert (and (>= X_0 (- 0.7)) (<= X_0 0.1) (>= X_1 0) (<= X_1 (/ 1 3))))\n"
PROPERTIES = {
    "holds": "(assert (<= Y_0 (- 0.01)))",
    "fails": "(assert (and (<= Y_0 0.02) (>= Y_0 0.01)))",
    "fails at an end": "(assert (>= Y_0 1.033))",
    "touches": "(assert (< Y_0 0))",
}


@pytest.fixture(autouse=True)
def settings_of_jax(monkeypatch):
    """The command line sets JAX up for its process; here the process is that of all tests."""
    names = (
        "jax_logging_level",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: jax.config.values[name] for name in names}
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", before["jax_compilation_cache_dir"])
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def write_net(path, nodes=None, constants=()):
    """A file with the net |x_0| + |x_1|, or with other nodes from "x" to "y"."""
    if nodes is None:
        signs = np.array([[1, -1, 0, 0], [0, 0, 1, -1]], np.float32)
        constants = (("w", signs), ("v", np.ones((4, 1), np.float32)))
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "v"], ["y"]),
        ]
    ends = (("x", [1, 2]), ("y", [1, 1]))
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in ends
    )
    weights = [numpy_helper.from_array(array, name) for name, array in constants]
    graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with nets, properties and a list of instances, which is the current one."""
    monkeypatch.chdir(tmp_path)
    write_net("net.onnx")
    write_net("odd.onnx", [helper.make_node("Det", ["x"], ["y"])])
    for name, assertion in PROPERTIES.items():
        pathlib.Path(f"{name}.vnnlib").write_text(HEAD + BOX + assertion)
    pairs = [("net", "holds"), ("net", "fails"), ("odd", "holds"), ("net", "touches")]
    lines = [f"{net}.onnx,{prop}.vnnlib,60\n" for net, prop in [*pairs, pairs[0]]]
    pathlib.Path("instances.csv").write_text("".join(lines))
    return tmp_path


def fake(monkeypatch, status=Status.VERIFIED, reason=Reason.NONE, point=(0.0, 0.0), does=None):
    """Put a search that knows its outcome in the place of the real one."""

    def decide(f, region, prop, *, budget, key, report):
        report(Progress(0.0, 7, 3, 1))
        if does is not None:
            does()
        status_, reason_ = np.array([status], np.int32), np.array([reason], np.int32)
        return Outcome(status_, reason_, np.array([[*point]]), visited=7)

    monkeypatch.setattr(jaxcert.cli.answers, "decide", decide)


def verify(capsys, *argv):
    """Exit status, lines on stdout, lines on stderr."""
    status = main(["verify", *map(str, argv)])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()


def counterexample(lines):
    """The texts of inputs and of outputs that follow `sat`."""
    text = "\n".join(lines)
    assert re.fullmatch(r"\((\([XY]_\d+ [^\s()]+\)\n?)+\)", text)
    pairs = re.findall(r"\(([XY])_(\d+) ([^\s()]+)\)", text)
    assert [(kind, int(i)) for kind, i, _ in pairs] == [("X", 0), ("X", 1), ("Y", 0)]
    return [t for kind, _, t in pairs if kind == "X"], [t for kind, _, t in pairs if kind == "Y"]


# --- One instance


def test_a_property_that_holds_is_unsat(here, capsys):
    status, out, err = verify(capsys, "net.onnx", "holds.vnnlib", "--json", "a.json")
    assert (status, out, len(err)) == (0, ["unsat"], 1)
    assert err[0].startswith("proved (")
    told = json.loads(pathlib.Path("a.json").read_text())
    assert (told["verdict"], told["reason"], told["counterexample"]) == ("unsat", "", None)
    assert told["seconds"] > 0
    assert told["cpu_seconds"] > 0
    assert told["domains"] >= 0
    assert told["versions"]["jax"] == jax.__version__
    assert not list(here.glob(".a.json*"))


@pytest.mark.parametrize("name", ["fails", "fails at an end"])
def test_a_counterexample_can_be_replayed_by_others(here, capsys, name):
    status, out, err = verify(capsys, "net.onnx", f"{name}.vnnlib", "--json", "a.json")
    assert (status, out[0], len(err)) == (10, "sat", 1)
    xs, ys = counterexample(out[1:])
    exact = [Fraction(x) for x in xs]
    assert Fraction("-0.7") <= exact[0] <= Fraction("0.1")
    assert 0 <= exact[1] <= Fraction(1, 3)
    problem = vnnlib.read(f"{name}.vnnlib")
    assert problem.refuted_by(exact, [sum(map(abs, exact))])  # the net over the reals
    session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    ((theirs,),) = session.run(None, {"x": np.array([xs], np.float64).astype(np.float32)})
    assert problem.refuted_by(exact, theirs.tolist())
    np.testing.assert_allclose(theirs, [float(y) for y in ys], rtol=1e-6)
    told = json.loads(pathlib.Path("a.json").read_text())["counterexample"]
    assert told == {"inputs": xs, "outputs": [float(y) for y in ys]}


def test_a_tie_is_unknown(here, capsys):
    status, out, err = verify(capsys, "net.onnx", "touches.vnnlib")
    assert (status, out, len(err)) == (11, ["unknown"], 1)
    assert "within rounding of zero" in err[0]


@pytest.mark.parametrize("reason", [Reason.TIME, Reason.MEMORY, Reason.NUMERICS])
def test_reasons_and_exit_status_of_no_answer(here, capsys, monkeypatch, reason):
    fake(monkeypatch, Status.UNKNOWN, reason)
    status, out, err = verify(capsys, "net.onnx", "holds.vnnlib")
    expected = (12, ["timeout"]) if reason == Reason.TIME else (11, ["unknown"])
    assert (status, out) == expected
    assert err[0].startswith(f"{MESSAGES[reason]} (")
    assert "7 sub-domains" in err[0]


def test_what_is_no_counterexample_is_not_printed(here, capsys, monkeypatch):
    fake(monkeypatch, Status.FALSIFIED, point=(0.0, 0.25))
    assert verify(capsys, "net.onnx", "holds.vnnlib")[:2] == (11, ["unknown"])

    # Violated in float32 alone, where x + 1e8 - 1e8 is 0.
    large = (("c", np.array([1e8], np.float32)), ("o", np.ones((2, 1), np.float32)))
    nodes = [("MatMul", "x o s"), ("Add", "s c a"), ("Sub", "a c y")]
    made = [helper.make_node(op, names.split()[:2], names.split()[2:]) for op, names in nodes]
    write_net("narrow.onnx", made, large)
    pathlib.Path("narrow.vnnlib").write_text(HEAD + BOX + "(assert (<= Y_0 0.1))")
    status, out, err = verify(capsys, "narrow.onnx", "narrow.vnnlib")
    assert (status, out) == (11, ["unknown"])
    assert "both float32 and float64" in err[0]

    # Outside of a constraint between inputs.
    cut = "(assert (and (<= (+ X_0 X_1) 0.2) (>= Y_0 0.2)))"
    pathlib.Path("cut.vnnlib").write_text(HEAD + BOX + cut)
    status, out, err = verify(capsys, "net.onnx", "cut.vnnlib")
    assert (status, out) == (11, ["unknown"])
    assert "constraints on inputs" in err[0]
    fake(monkeypatch, Status.FALSIFIED, point=(-0.5, 0.25))
    assert verify(capsys, "net.onnx", "cut.vnnlib")[0] == 10


def test_constraints_between_inputs_count(here, capsys):
    """|x_0| + |x_1| is at least 0.2 where x_0 + x_1 is, and at least 0 on the box."""
    at_least, level = "(assert (>= (+ X_0 X_1) 0.2))", "(assert (<= Y_0 {}))"
    texts = {
        "safe": at_least + level.format(0.19),
        "unsafe": at_least + level.format(0.21),
        "empty": "(assert (<= (* 3 X_0) (+ X_1 (- 3))))" + level.format(10),
    }
    for name, text in texts.items():
        pathlib.Path(f"{name}.vnnlib").write_text(HEAD + BOX + text)
    assert verify(capsys, "net.onnx", "safe.vnnlib")[:2] == (0, ["unsat"])
    status, out, err = verify(capsys, "net.onnx", "safe.vnnlib", "--proof", "p.npz")
    assert (status, out) == (14, ["unsat"])
    assert "without constraints between inputs" in err[-1]
    assert verify(capsys, "net.onnx", "empty.vnnlib")[:2] == (0, ["unsat"])
    status, out, _ = verify(capsys, "net.onnx", "unsafe.vnnlib")
    assert (status, out[0]) == (10, "sat")
    (case,) = vnnlib.read("unsafe.vnnlib").cases
    found = re.findall(r"\(([XY])_[0-9] (\S+?)\)", " ".join(out[1:]))
    assert case.contains([Fraction(value) for kind, value in found if kind == "X"])
    assert case.violated_by([Fraction(value) for kind, value in found if kind == "Y"])


@pytest.mark.parametrize(
    "error",
    [
        UnsupportedEquation("no rule for det"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room for 9 bytes"),
    ],
)
def test_what_the_search_refuses_is_unknown(here, capsys, monkeypatch, error):
    def does():
        raise error

    fake(monkeypatch, does=does)
    status, out, err = verify(capsys, "net.onnx", "holds.vnnlib")
    assert (status, out, len(err)) == (11, ["unknown"], 1)
    assert str(error) in err[0]


def test_every_case_must_be_proved(here, capsys, monkeypatch):
    halves = "(or (and (<= X_0 (- 0.1)) (<= Y_0 0)) (and (>= X_0 0.05) (<= Y_0 0)))"
    pathlib.Path("cases.vnnlib").write_text(HEAD + BOX + f"(assert {halves})")
    assert verify(capsys, "net.onnx", "cases.vnnlib")[:2] == (0, ["unsat"])
    fake(monkeypatch, Status.UNKNOWN, Reason.MEMORY)
    assert verify(capsys, "net.onnx", "cases.vnnlib")[:2] == (11, ["unknown"])


def test_a_proof_is_checked(here, capsys, monkeypatch):
    from jaxcert.exact import proof

    files = pathlib.Path("proof"), pathlib.Path("net.onnx"), pathlib.Path("holds.vnnlib")

    def check(*given, exact):
        assert given == files
        if not exact:
            raise proof.ProofRejected("a leaf is not proved")
        return proof.Report(trees=1, splits=2, leaves=3, margin=0.5)

    monkeypatch.setattr(proof, "check", check)
    assert main(["check", *map(str, files)]) == 13
    assert capsys.readouterr() == ("rejected\n", "a leaf is not proved\n")
    assert main(["check", "--exact", *map(str, files)]) == 0
    out, err = capsys.readouterr()
    assert out == "proved\n"
    assert "3 leaves" in err


@pytest.mark.parametrize(
    ("error", "status", "lines"), [(None, 0, 1), (UnsupportedEquation("time ran out"), 14, 2)]
)
def test_a_proof_is_written_or_missed(here, capsys, monkeypatch, error, status, lines):
    from jaxcert.exact import record

    def prove(network, prop, path, *, seconds):
        assert (network.name, prop.name) == ("net.onnx", "holds.vnnlib")
        assert 0 < seconds < 60
        if error is not None:
            raise error

    fake(monkeypatch)
    monkeypatch.setattr(record, "prove", prove)
    done, out, err = verify(capsys, "net.onnx", "holds.vnnlib", "--proof", "p")
    assert (done, out, len(err)) == (status, ["unsat"], lines)
    assert error is None or "no proof was written: time ran out" in err[1]
    fake(monkeypatch, Status.UNKNOWN, Reason.MEMORY)
    assert verify(capsys, "net.onnx", "holds.vnnlib", "--proof", "p")[0] == 11


# --- Mistakes


def test_mistakes_are_one_line(here, capsys):
    pathlib.Path("text.onnx").write_text("a text")
    pathlib.Path("open.vnnlib").write_text("(assert (<= X_0 1)\n")
    other = HEAD + "(declare-const Y_1 Real)" + BOX + PROPERTIES["holds"]
    pathlib.Path("other.vnnlib").write_text(other)
    pathlib.Path("two.csv").write_text("net.onnx,holds.vnnlib\n")
    pathlib.Path("gone.csv").write_text("gone.onnx,holds.vnnlib,5\n")
    pathlib.Path("empty.csv").write_text("\n")
    for argv, said in {
        "gone.onnx holds.vnnlib": "gone.onnx: No such file",
        "net.onnx gone.vnnlib": "gone.vnnlib: No such file",
        "net.onnx open.vnnlib": "open.vnnlib:1:1: ",
        "text.onnx holds.vnnlib": "text.onnx: not an ONNX file",
        "odd.onnx holds.vnnlib": "Det",
        "net.onnx other.vnnlib": "1 outputs but the property declares 2",
        "net.onnx holds.vnnlib --json gone/a.json": "gone",
        "net.onnx holds.vnnlib --cache net.onnx/cache": "net.onnx",
        "--instances none.csv": "none.csv: No such file",
        "--instances gone.csv": "gone.csv:1: neither gone.onnx",
        "--instances two.csv": "two.csv:1: found 2 columns",
        "--instances empty.csv": "empty.csv",
        "--instances instances.csv --results gone/r.csv": "gone",
    }.items():
        status, out, err = verify(capsys, *argv.split())
        assert (status, out, len(err)) == (1, [], 1), argv
        assert err[0].startswith("jaxcert: "), argv
        assert said in err[0], argv


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "verify",
        "verify net.onnx",
        "verify net.onnx holds.vnnlib --timeout 0",
        "verify net.onnx holds.vnnlib --timeout nan",
        "verify net.onnx holds.vnnlib --seed -1",
        "verify net.onnx holds.vnnlib --results r.csv",
        "verify --instances instances.csv --json a.json",
        "verify --instances instances.csv --proof p",
        "verify net.onnx holds.vnnlib --instances instances.csv",
        "verify --instances instances.csv --timeout 5 --timeout-scale 2",
    ],
)
def test_usage(here, capsys, argv):
    with pytest.raises(SystemExit) as ended:
        main(argv.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m jaxcert")


def test_help_names_every_exit_status(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--help"])
    text = capsys.readouterr().out
    statuses = [r"0  unsat", "10  sat", "11  unknown", "12  timeout", "130  interrupted"]
    assert ended.value.code == 0
    assert all(status in text for status in statuses)


def test_progress_is_for_terminals(here, capsys, monkeypatch):
    fake(monkeypatch)
    *_, err = verify(capsys, "net.onnx", "holds.vnnlib", "--quiet")
    assert err == []
    assert verify(capsys, "net.onnx", "holds.vnnlib")[2][0].startswith("proved (")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["verify", "net.onnx", "holds.vnnlib"]) == 0
    assert "7 sub-domains bounded, 3 waiting" in capsys.readouterr().err


# --- A whole benchmark


def table(path="results.csv"):
    """The rows without what differs from run to run."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(r.pop("seconds")) >= 0 and float(r.pop("cpu_seconds")) >= 0 for r in rows)
    return rows


def test_a_benchmark_resumed_anywhere_gives_the_same_table(here, capsys):
    argv = "--instances", "instances.csv", "--counterexamples", "found"
    status, out, err = verify(capsys, *argv)
    whole, expected = pathlib.Path("results.csv").read_bytes(), table()
    verdicts = [row["verdict"] for row in expected]
    assert status == 0
    assert verdicts == ["unsat", "sat", "unknown", "unknown", "unsat"]
    assert expected[0]["onnx"] == "net.onnx"
    assert expected[1]["vnnlib"] == "fails.vnnlib"
    assert "Det" in expected[2]["reason"]
    assert len(out) == 5
    assert [line.split()[:2] for line in err] == [
        ["verdict", "instances"], ["unsat", "2"], ["sat", "1"], ["unknown", "2"],
        ["timeout", "0"], ["total", "5"],
    ]  # fmt: skip
    (file,) = pathlib.Path("found").iterdir()
    sat, *rest = file.read_text().splitlines()
    assert sat == "sat"
    assert counterexample(rest)

    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in [0, 10, ends[0] - 1, ends[0], ends[1] - 1, ends[2], ends[2] + 4, ends[-1]]:
        pathlib.Path("results.csv").write_bytes(whole[:length])
        status, out, _ = verify(capsys, *argv)
        assert status == 0
        assert table() == expected
        assert len(out) == sum(end > length for end in ends[1:])
        kept = whole[: whole.rfind(b"\n", 0, length) + 1]  # rows that were there are not redone
        assert pathlib.Path("results.csv").read_bytes().startswith(kept)


def test_results_of_another_list_are_left_alone(here, capsys, monkeypatch):
    fake(monkeypatch)
    argv = "--instances", "instances.csv", "--results", "r.csv"
    verify(capsys, *argv)
    lines = pathlib.Path("r.csv").read_text().splitlines(keepends=True)
    foreign = [
        "a text\n",
        "".join([lines[0], lines[2]]),
        "".join([*lines, lines[-1]]),
        "".join([lines[0], lines[1].replace(",7,", ",seven,")]),
        "".join([lines[0], "net.onnx\n", lines[2]]),
    ]
    for text in foreign:
        pathlib.Path("r.csv").write_text(text)
        status, out, err = verify(capsys, *argv)
        assert (status, out, len(err)) == (1, [], 1)
        assert "--results" in err[0]
        assert pathlib.Path("r.csv").read_text() == text


def test_two_runs_do_not_write_to_the_same_results(here, capsys, monkeypatch):
    again = []
    argv = "--instances", "instances.csv", "--quiet"
    fake(monkeypatch, does=lambda: again or again.append(main(["verify", *argv])))
    status, _, err = verify(capsys, *argv)
    assert (status, again, len(err)) == (0, [1], 1)
    assert "another run" in err[0]


def test_a_crash_costs_one_instance_and_an_interrupt_none(here, capsys, monkeypatch):
    calls = []

    def does():
        calls.append(1)
        if len(calls) == 2:
            raise AssertionError("a bug")
        if len(calls) == 3:
            raise KeyboardInterrupt

    fake(monkeypatch, does=does)
    status, _, err = verify(capsys, "--instances", "instances.csv")
    assert status == 130
    assert "3 of 5 instances" in err[-1]
    assert "a bug" in "\n".join(err)
    assert [row["verdict"] for row in table()] == ["unsat", "unknown", "unknown"]
    assert table()[1]["reason"] == "AssertionError: a bug"
    assert verify(capsys, "--instances", "instances.csv")[0] == 0
    assert [row["verdict"] for row in table()][2:] == ["unknown", "unsat", "unsat"]


def test_an_answer_after_the_limit_is_a_timeout(here, capsys, monkeypatch):
    fake(monkeypatch, does=lambda: time.sleep(0.01))
    monkeypatch.setattr(jaxcert.cli.benchmark, "GRACE", 0.0)
    assert verify(capsys, "--instances", "instances.csv", "--timeout-scale", "1e-9")[0] == 0
    assert {row["verdict"] for row in table()} == {"timeout"}
    assert table()[0]["reason"].startswith("unsat came 0.0 s after the limit")


# --- Processes


def process(code, *argv):
    """A process in which a search does what the code says."""
    stub = f"""
        import sys, time
        import jaxcert.cli.answers as answers
        from jaxcert.certificate import Reason, Status
        from jaxcert.cli.command import main
        from jaxcert.exact.outcome import Outcome
        import numpy as np
        calls = []
        def decide(f, region, prop, **_):
            calls.append(1)
            {code}
            one = np.ones(1, np.int32)
            return Outcome(one * Status.VERIFIED, one * 0, np.zeros((1, 2)))
        answers.decide = decide
        sys.exit(main(sys.argv[1:]))
    """
    command = [sys.executable, "-c", textwrap.dedent(stub), *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_limit_holds_whatever_the_search_does(here):
    argv = "verify", "net.onnx", "holds.vnnlib", "--timeout", "0.4", "--json", "a.json"
    stuck = process("time.sleep(100)", *argv)
    out, err = stuck.communicate(timeout=60)
    assert (stuck.returncode, out) == (12, "timeout\n")
    assert err.startswith("the time budget ran out")
    told = json.loads(pathlib.Path("a.json").read_text())
    assert told["verdict"] == "timeout"
    assert 0.4 <= told["seconds"] <= 2.4


def test_a_benchmark_survives_being_killed(here, capsys, monkeypatch):
    killed = process(
        "time.sleep(100 * (len(calls) == 2))", "verify", "--instances", "instances.csv"
    )
    results = pathlib.Path("results.csv")
    for _ in range(600):
        if results.exists() and len(results.read_bytes().splitlines()) == 2:
            break
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert [row["verdict"] for row in table()] == ["unsat"]
    fake(monkeypatch)
    assert verify(capsys, "--instances", "instances.csv")[0] == 0
    assert [row["verdict"] for row in table()] == ["unsat", "unsat", "unknown", "unsat", "unsat"]


def test_as_a_program(here):
    command = [sys.executable, "-m", "jaxcert", "verify", "net.onnx", "fails.vnnlib"]
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 10
    assert done.stdout.startswith("sat\n((X_0 ")
    assert done.stdout.endswith("))\n")
    assert len(done.stderr.splitlines()) == 1  # nothing from XLA about what it finds in the cache
