"""`verify NET PROP`: one instance, its answer on stdout."""

import dataclasses
import json
import pathlib
import platform
import sys
import time
from typing import Any

import jax
import numpy as np

import jaxcert
from jaxcert.cli import files
from jaxcert.cli.answers import SAT, TIMEOUT, UNKNOWN, UNSAT, Answer, answer, require_fitting, said
from jaxcert.cli.terminal import Ticker
from jaxcert.cli.watchdog import GRACE, Watchdog
from jaxcert.errors import JaxcertError
from jaxcert.io import onnx, vnnlib

EXIT_STATUS = {UNSAT: 0, SAT: 10, UNKNOWN: 11, TIMEOUT: 12}
"""0 says that the property is proved, and nothing else does, so `verify ... && deploy` is safe."""

UNPROVED = 14
"""The exit status of `unsat` without the proof file that was asked for."""

LATE = "the time budget ran out while a step was running that cannot be interrupted"


@dataclasses.dataclass
class Single:
    """An instance and what is wanted of it.

    Attributes:
      network, property: the files.
      timeout: seconds, from `began` on.
      began: a time of `time.perf_counter()`.
      seed: of the attack's starting points.
      json: where to write the answer as a JSON object, or None.
      proof: where to write a proof of `unsat`, or None.
      quiet: whether to say nothing on stderr.
    """

    network: pathlib.Path
    property: pathlib.Path
    timeout: float
    began: float
    seed: int = 0
    json: pathlib.Path | None = None
    proof: pathlib.Path | None = None
    quiet: bool = False
    _found: Answer | None = dataclasses.field(default=None, init=False)
    _unproved: str = dataclasses.field(default=LATE, init=False)

    def run(self) -> int:
        """Read, decide, say it; returns the exit status."""
        for path in filter(None, (self.json, self.proof)):
            files.require_folder(path)
        ticker, limit = Ticker(self.quiet), self.began + self.timeout

        def too_late() -> int:
            late = Answer(TIMEOUT, LATE, domains=ticker.visited)
            return self.finish(self._found or late, ticker)

        with Watchdog(limit + GRACE, too_late):
            ticker.begin("")
            problem, model = vnnlib.read(self.property), onnx.read(self.network)
            require_fitting(model, problem)
            found = answer(model, problem, until=limit, seed=self.seed, report=ticker)
            self._found = found
            if self.proof is not None and found.verdict == UNSAT:
                self._unproved = self.prove(self.proof, limit)
        return self.finish(found, ticker)

    def prove(self, path: pathlib.Path, limit: float) -> str:
        """Write a proof; returns why there is none, nothing if there is one."""
        from jaxcert.exact import record

        try:
            seconds = limit - time.perf_counter()
            record.prove(self.network, self.property, path, seconds=seconds)
        except (JaxcertError, ValueError) as error:
            return said(error)
        return ""

    def finish(self, found: Answer, ticker: Ticker) -> int:
        """Say the answer on stdout, the reason on stderr, all of it in the JSON file."""
        seconds = time.perf_counter() - self.began
        ticker.clear()
        print(found.text(), flush=True)
        if not self.quiet:
            print(found.remark(seconds), file=sys.stderr, flush=True)
        unproved = self._unproved if self.proof is not None and found.verdict == UNSAT else ""
        if unproved:
            print(f"jaxcert: no proof was written: {unproved}", file=sys.stderr, flush=True)
        if self.json is not None:
            files.write(self.json, json.dumps(self.record(found, seconds), indent=2) + "\n")
        return UNPROVED if unproved else EXIT_STATUS[found.verdict]

    def record(self, found: Answer, seconds: float) -> dict[str, Any]:
        """The JSON object about an answer."""
        return {
            "network": str(self.network),
            "property": str(self.property),
            "verdict": found.verdict,
            "reason": found.reason,
            "counterexample": found.example and dataclasses.asdict(found.example),
            "seconds": round(seconds, 3),
            "cpu_seconds": round(time.process_time(), 3),
            "domains": found.domains,
            "timeout": self.timeout,
            "seed": self.seed,
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """Of what a verdict depends on."""
    return {
        "jaxcert": jaxcert.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
