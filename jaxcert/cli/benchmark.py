"""`verify --instances CSV`: a whole benchmark in one process, which resumes after a kill.

One process compiles once for all nets of one shape. It outlasts no limit by force: a compilation
that takes longer than its instance may is finished, since the next instances profit from it.
"""

import dataclasses
import functools
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from jaxcert.cli import files
from jaxcert.cli.answers import TIMEOUT, UNKNOWN, VERDICTS, Answer, answer, require_fitting, said
from jaxcert.cli.results import Results, Row
from jaxcert.cli.terminal import Ticker
from jaxcert.cli.watchdog import GRACE
from jaxcert.errors import VnnlibError
from jaxcert.io import onnx, vnnlib
from jaxcert.io.vnnlib import Instance

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""


@dataclasses.dataclass
class Benchmark:
    """A list of instances and what is wanted of it.

    Attributes:
      instances: the csv file.
      results: the file of results.
      timeout: seconds for each instance, or None for those in the list.
      scale: by which the seconds are multiplied.
      seed: of the attack's starting points.
      counterexamples: a folder for them, or None.
      quiet: whether to print nothing.
    """

    instances: pathlib.Path
    results: pathlib.Path
    timeout: float | None = None
    scale: float = 1.0
    seed: int = 0
    counterexamples: pathlib.Path | None = None
    quiet: bool = False

    def run(self) -> int:
        """Decide all instances that have no row yet; returns the exit status."""
        listed = vnnlib.instances(self.instances)
        if not listed:
            raise VnnlibError(f"{self.instances}: expected lines onnx,vnnlib,timeout, found none")
        files.require_folder(self.results)
        if self.counterexamples is not None:
            self.counterexamples.mkdir(parents=True, exist_ok=True)
        names = [self.names(instance) for instance in listed]
        ticker, read = Ticker(self.quiet), functools.cache(onnx.read)
        with Results(self.results, names) as results:
            try:
                for place in range(len(results.rows), len(listed)):
                    ticker.begin(f"[{place + 1}/{len(listed)}] {' '.join(names[place])}: ")
                    row = self.row(place, listed[place], names[place], read, ticker)
                    results.append(row)
                    ticker.clear()
                    self.say(f"{row.verdict:7} {row.seconds:8.1f} s  {row.onnx} {row.vnnlib}")
            except KeyboardInterrupt:
                ticker.clear()
                done = f"{len(results.rows)} of {len(listed)} instances are in {self.results}"
                self.say(f"interrupted: {done}; the same command goes on from there", sys.stderr)
                return INTERRUPTED
            self.say(summary(results.rows), sys.stderr)
        return 0

    def say(self, text: str, file=None) -> None:
        """Print, unless nothing shall be printed."""
        if not self.quiet:
            print(text, file=file or sys.stdout, flush=True)

    def names(self, instance: Instance) -> tuple[str, str]:
        """The files of an instance from the list's folder, without the ending of compression."""
        folder = self.instances.parent

        def name(path: pathlib.Path) -> str:
            short = path.relative_to(folder) if path.is_relative_to(folder) else path
            return short.as_posix().removesuffix(".gz")

        return name(instance.network), name(instance.property)

    def row(
        self,
        place: int,
        instance: Instance,
        names: tuple[str, str],
        read: Callable[[pathlib.Path], onnx.OnnxModel],
        ticker: Ticker,
    ) -> Row:
        """Decide an instance. Its clock runs from before its files are read."""
        began, used = time.perf_counter(), time.process_time()
        timeout = self.scale * (self.timeout or instance.timeout)
        try:
            problem, model = vnnlib.read(instance.property), read(instance.network)
            require_fitting(model, problem)
            found = answer(model, problem, until=began + timeout, seed=self.seed, report=ticker)
        except Exception as error:  # a benchmark goes on, whatever happens to one of its instances
            if not isinstance(error, OSError | ValueError | ImportError | NotImplementedError):
                ticker.clear()
                traceback.print_exc()
            found = Answer(UNKNOWN, said(error))
        seconds, cpu = time.perf_counter() - began, time.process_time() - used
        if seconds > timeout + GRACE and found.verdict != TIMEOUT:
            late = f"{found.verdict} came {seconds - timeout:.1f} s after the limit"
            found = Answer(TIMEOUT, late, domains=found.domains)
        if found.example is not None and self.counterexamples is not None:
            stems = "_".join(pathlib.PurePosixPath(name).stem for name in names)
            path = self.counterexamples / f"{place + 1}_{stems}.counterexample"
            files.write(path, found.text() + "\n")
        cost = round(seconds, 3), round(cpu, 3), found.domains
        return Row(*names, found.verdict, *cost, found.reason)


def summary(rows: Sequence[Row]) -> str:
    """A table of how many instances got which verdict, and in what time."""
    lines = [f"{'verdict':7} {'instances':>9} {'seconds':>9}"]
    for name in (*VERDICTS, "total"):
        seconds = [row.seconds for row in rows if name in (row.verdict, "total")]
        lines.append(f"{name:7} {len(seconds):9} {sum(seconds):9.1f}")
    return "\n".join(lines)
