"""What can be typed after `python -m jaxcert`, with the texts of `--help`."""

import argparse
import pathlib
import platform
import threading
from typing import Any

import jax

import jaxcert
from jaxcert.cli.benchmark import Benchmark
from jaxcert.cli.checking import Checking
from jaxcert.cli.single import Single

_DESCRIPTION = """\
Proofs and counterexamples for properties of neural nets (ONNX and VNN-LIB files).
"""

_EPILOG = """\
examples:
  python -m jaxcert verify net.onnx prop.vnnlib --timeout 60 --json answer.json
  python -m jaxcert verify --instances instances.csv --results results.csv
  python -m jaxcert verify net.onnx prop.vnnlib --proof prop.proof
  python -m jaxcert check prop.proof net.onnx prop.vnnlib
  python -m jaxcert verify --help          verdicts, exit status, how a benchmark resumes
"""

_VERIFY = """\
Decide whether a net has an input that makes the assertions of a property file true.

The first line on stdout is the verdict in the words of VNN-COMP:

  unsat    there is none: the property holds. A proof, with rounding counted.
  sat      there is one. It follows as ((X_0 ...) ... (Y_0 ...)): decimals that lie in the file's
           bounds exactly, and the outputs in float32. It was replayed in float32 and float64.
  unknown  no answer within memory or rounding, or something the search has no rule for.
  timeout  no answer within --timeout.

Reasons are on stderr, and so is the progress if that is a terminal.
"""

_VERIFY_EPILOG = """\
exit status, of one instance:
  0  unsat, and only then      10  sat      11  unknown      12  timeout
  14 unsat, but no proof could be written to the file of --proof
  1  a file is missing, malformed or unsupported; one line on stderr says where and why
  2  the command line is wrong                 130  interrupted
exit status, with --instances:
  0  each instance has its row, whatever its verdict; 1, 2 and 130 as above

a benchmark:
  instances.csv has lines onnx,vnnlib,timeout with paths from its folder; files may be compressed
  (.gz). Each row is on disk before the next instance begins; after a kill or Ctrl-C the same
  command goes on with the first instance that has no row. An instance that cannot be read is
  `unknown` with its reason. A compilation is always finished, as later instances use it, so an
  instance may exceed its limit; what it then finds is recorded as `timeout`.

time:
  --timeout counts from the start of the process, or of the instance with --instances; reading and
  compiling and writing a proof are included. One instance stops at most two seconds after it.
  Compiled programs are kept in --cache, else $JAX_COMPILATION_CACHE_DIR, else jaxcert in
  $XDG_CACHE_HOME or ~/.cache, so the first run on a net's architecture is the slow one.
"""

_CHECK = """\
Check that a file proves that a property of a net holds. The net and the property are read from
their own files; nothing in the proof is believed, and nothing is searched.

The first line on stdout is `proved` or `rejected`; why is on stderr.

exit status:
  0  proved, and only then                     13  rejected
  1  a file is missing, malformed or unsupported; one line on stderr says where and why
  2  the command line is wrong                 130  interrupted
"""


def parser() -> argparse.ArgumentParser:
    """The parser; what it returns has a `task(typed, began)` that makes what is to be run."""
    top = argparse.ArgumentParser(
        "python -m jaxcert",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    versions = f"jaxcert {jaxcert.__version__}, jax {jax.__version__}, "
    versions += f"Python {platform.python_version()}"
    top.add_argument("--version", action="version", version=versions)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_verify(commands)
    _add_check(commands)
    return top


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="decide one instance, or a whole benchmark",
        description=_VERIFY,
        epilog=_VERIFY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s NET.onnx PROP.vnnlib [--timeout SECONDS] [--json FILE] ...\n"
        "       %(prog)s --instances CSV [--results FILE] [--timeout-scale X] ...",
    )
    verify.set_defaults(task=_verify_task, wrong=verify.error)
    path = pathlib.Path
    add = verify.add_argument_group("one instance").add_argument
    add("network", nargs="?", type=path, metavar="NET.onnx", help="the net, or NET.onnx.gz")
    add("property", nargs="?", type=path, metavar="PROP.vnnlib", help="likewise")
    add("--json", type=path, metavar="FILE", help="write verdict, reason, cost and versions there")
    add("--proof", type=path, metavar="FILE", help="write a proof of unsat there, for `check`")
    add = verify.add_argument_group("a benchmark").add_argument
    add("--instances", type=path, metavar="CSV", help="the list of its instances")
    add("--results", type=path, metavar="FILE", help="the table of results (results.csv)")
    add("--timeout-scale", type=_positive, metavar="X", help="multiply the list's seconds by X")
    add("--counterexamples", type=path, metavar="DIR", help="write each to a file in DIR")
    add = verify.add_argument_group("both").add_argument
    add("--timeout", type=_positive, metavar="SECONDS", help="of an instance (60, or the list's)")
    add("--seed", type=_seed, default=0, help="of the attack's starting points (0)")
    add("--quiet", action="store_true", help="nothing on stderr but mistakes, no lines of rows")
    add("--cache", type=path, metavar="DIR", help="of compiled programs")


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="check a proof, wherever it comes from",
        description=_CHECK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.set_defaults(task=_check_task, cache=None)
    for name, metavar in (("proof", "PROOF"), ("network", "NET.onnx"), ("property", "PROP.vnnlib")):
        check.add_argument(name, type=pathlib.Path, metavar=metavar)
    check.add_argument("--exact", action="store_true", help="in rationals, for small nets")
    check.add_argument("--quiet", action="store_true", help="nothing on stderr but mistakes")


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"expected a number greater than 0, got {text}")
    return number


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"expected 0 to {2**32 - 1}, got {text}")
    return number


def _verify_task(typed: argparse.Namespace, began: float) -> Single | Benchmark:
    """What `verify` is to do."""
    if typed.instances is None:
        if None in (typed.network, typed.property):
            typed.wrong("expected NET.onnx PROP.vnnlib, or --instances CSV")
        if typed.results or typed.timeout_scale or typed.counterexamples:
            typed.wrong("--results, --timeout-scale and --counterexamples go with --instances")
        limit = typed.timeout or 60.0
        net, prop = typed.network, typed.property
        return Single(net, prop, limit, began, typed.seed, typed.json, typed.proof, typed.quiet)
    if typed.network or typed.json or typed.proof:
        typed.wrong("--instances goes without NET.onnx PROP.vnnlib, --json and --proof")
    if typed.timeout and typed.timeout_scale:
        typed.wrong("--timeout replaces the list's seconds, so --timeout-scale has nothing to do")
    results = typed.results or pathlib.Path("results.csv")
    return Benchmark(
        typed.instances,
        results,
        typed.timeout,
        typed.timeout_scale or 1.0,
        typed.seed,
        typed.counterexamples,
        typed.quiet,
    )


def _check_task(typed: argparse.Namespace, began: float) -> Checking:
    """What `check` is to do, in whatever time it takes."""
    return Checking(typed.proof, typed.network, typed.property, typed.exact, typed.quiet)
