"""The results of a benchmark: a CSV file that grows by a row per instance and survives a kill."""

import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Sequence

from jaxcert.errors import RecordMismatch

try:
    import fcntl
except ImportError:  # Windows has no flock: two writers are not told apart there
    fcntl = None


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of an instance: its files as the list of instances names them, the verdict, its
    cost, and why there is no answer."""

    onnx: str
    vnnlib: str
    verdict: str
    seconds: float
    cpu_seconds: float
    domains: int
    reason: str = ""

    def line(self) -> bytes:
        """The row as a line of the file."""
        return _line([str(value) for value in dataclasses.astuple(self)])


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def _line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([" ".join(cell.split()) for cell in cells])
    return text.getvalue().encode()


class Results:
    """An open file of results, of which this process is the only writer.

    Rows stand in the order of the instances. A file that exists is resumed: `rows` holds what is
    in it, a last line that a kill cut short is cut off.

    Args:
      path: the file, in a folder that exists.
      instances: (onnx, vnnlib) of all instances.

    Raises:
      RecordMismatch: the file is another benchmark's, or something else. It is left as it was.
      BlockingIOError: another run is writing to it.
    """

    rows: list[Row]

    def __init__(self, path: pathlib.Path, instances: Sequence[tuple[str, str]]):
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._file = os.open(path, flags, 0o644)
        try:
            self._lock()
            self._resume(instances)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def append(self, row: Row) -> None:
        """Add a row, which is on disk when this returns."""
        self._write(row.line())
        self.rows.append(row)

    def _lock(self) -> None:
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = "another run is writing to it; wait for it, or write to another path"
            raise BlockingIOError(error.errno, message, str(self.path)) from None

    def _resume(self, instances: Sequence[tuple[str, str]]) -> None:
        data, header = self.path.read_bytes(), _line(COLUMNS)
        if header.startswith(data):  # empty, or cut short within the header
            os.ftruncate(self._file, 0)
            self._write(header)
            data = header
        whole = data[: data.rfind(b"\n") + 1]
        self.rows = self._parsed(whole, header, instances)
        os.ftruncate(self._file, len(whole))

    def _parsed(
        self, data: bytes, header: bytes, instances: Sequence[tuple[str, str]]
    ) -> list[Row]:
        if not data.startswith(header):
            raise self._mismatch(1, f"expected the header {header.decode().strip()}")
        lines = list(csv.reader(data.decode(errors="replace").splitlines()))[1:]
        rows = []
        for number, cells in enumerate(lines, start=2):
            if len(cells) != len(COLUMNS):
                raise self._mismatch(number, f"expected {len(COLUMNS)} columns")
            if number - 2 >= len(instances):
                raise self._mismatch(number, "there are fewer instances than rows")
            wanted = instances[number - 2]
            onnx, vnnlib, verdict, seconds, cpu, domains, reason = cells
            if (onnx, vnnlib) != wanted:
                raise self._mismatch(number, f"the instance in this place is {','.join(wanted)}")
            try:
                cost = float(seconds), float(cpu), int(domains)
            except ValueError:
                raise self._mismatch(number, "its seconds or domains are no numbers") from None
            rows.append(Row(onnx, vnnlib, verdict, *cost, reason))
        return rows

    def _mismatch(self, line: int, what: str) -> RecordMismatch:
        return RecordMismatch(
            f"{self.path}:{line}: these are not results of these instances ({what}); "
            "the file was left as it is, pass another path with --results"
        )

    def _write(self, data: bytes) -> None:
        before = os.fstat(self._file).st_size
        try:
            if os.write(self._file, data) != len(data):
                raise OSError(f"{self.path}: no room for another row")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, before)
            raise
