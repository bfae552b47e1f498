"""The one log of jaxcert: append-only JSON lines that survive a kill at any moment.

The first line is a header, `{"format": "jaxcert-records", "version": 1, "config": ..., ...}`; every
further line is one record. Records reach the disk (fsync) before `append` returns. What a killed
writer left half-written at the end is dropped when the log is next opened; damage anywhere else
raises. Everything here is host side.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxcert.errors import RecordMismatch

try:
    import fcntl
except ImportError:  # Windows has no flock: two writers are not told apart there
    fcntl = None

FORMAT = "jaxcert-records"
VERSION = 1

# Every header starts with these bytes, also one that a kill cut short: so a torn header is told
# from a file of another kind, which is never touched.
_MAGIC = f'{{"format": "{FORMAT}"'.encode()


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What a log holds.

    Attributes:
      config: the configuration of the run that wrote it.
      versions: of Python and the packages that began it.
      records: all complete records, in the order they were appended.
      torn: bytes of a half-written last line, which `records` does not include.
    """

    config: dict[str, Any]
    versions: dict[str, str]
    records: list[dict[str, Any]]
    torn: int


class Log:
    """An open log, of which this process is the only writer.

    Opening a path that does not exist begins a log. Opening one that does resumes it, if it was
    begun with an equal `config`: `recovered` holds its records, and a half-written last line is
    cut off. Use it as a context manager.

    Args:
      path: the file, in a folder that exists.
      config: what makes two runs comparable (net, method, sigma, n, seed); JSON types and numpy
        scalars, NaN and infinities included.

    Raises:
      RecordMismatch: the file is another run's, or no log at all. It is left as it was.
      BlockingIOError: another writer has it open.
      ValueError: a line other than the last is damaged.
    """

    recovered: list[dict[str, Any]]

    def __init__(self, path: str | os.PathLike[str], config: Mapping[str, Any]):
        self.path = pathlib.Path(path)
        wanted = _encoded_dict(config, "config")
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {self.path.parent} for a log; create it")
        self._file = os.open(self.path, flags, 0o644)
        try:
            self._lock()
            self.recovered = self._resume(wanted)
        except BaseException:
            self.close()
            raise

    def append(self, *records: Mapping[str, Any]) -> None:
        """Add records, with one write and one fsync; they are on disk when this returns.

        A failing disk raises `OSError` and leaves none of them behind.
        """
        self._write(b"".join(_line(_encoded_dict(record, "record")) for record in records))

    def close(self) -> None:
        """Let go of the file and its lock. Closing twice is fine; appending afterwards is not."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno,
                "another run is writing to this log; wait for it, or write to another path",
                str(self.path),
            ) from None

    def _resume(self, config: Any) -> list[dict[str, Any]]:
        data = self.path.read_bytes()
        if _is_unbegun(data):
            os.ftruncate(self._file, 0)
            header = {"format": FORMAT, "version": VERSION, "config": config}
            self._write(_line(header | {"versions": _versions()}))
            _sync_folder(self.path.parent)
            return []
        recorded = _parsed(self.path, data)
        differences = _differences(encoded(recorded.config), config)
        if differences:
            raise RecordMismatch(
                f"{self.path} belongs to a run with another configuration:\n"
                + "".join(f"  {line}\n" for line in differences)
                + "Nothing was written. Pass the file's configuration to resume it, "
                "or another path to begin a new log."
            )
        os.ftruncate(self._file, len(data) - recorded.torn)
        return recorded.records

    def _write(self, data: bytes) -> None:
        if self._file < 0:
            raise ValueError(f"{self.path} is closed; open it again with Log(path, config)")
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, data)
            if written != len(data):
                raise OSError(f"{self.path}: only {written} of {len(data)} bytes could be written")
            os.fsync(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            raise


def read(path: str | os.PathLike[str]) -> Recorded:
    """What a log holds, without opening it for writing; a running writer is not disturbed.

    Raises:
      RecordMismatch: the file is not a log of this version.
      ValueError: a line other than the last is damaged.
    """
    path = pathlib.Path(path)
    data = path.read_bytes()
    if _is_unbegun(data):
        raise RecordMismatch(f"{path} is no {FORMAT} log yet: it has no complete header")
    return _parsed(path, data)


def encoded(value: Any, where: str = "value") -> Any:
    """A value in strict JSON types, from which `decoded` restores it exactly.

    JSON has no NaN or infinity: they become `{"$float": "nan"}`, `"inf"` or `"-inf"`. Tuples and
    arrays become lists, numpy and JAX scalars Python numbers (float32 to float64 is exact).
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, list | tuple):
        return [encoded(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        bad = [key for key in value if not isinstance(key, str) or key == "$float"]
        if bad:
            raise TypeError(
                f"{where} has the key {bad[0]!r}; keys must be strings other than '$float', "
                f"so write {str(bad[0]).strip('$')!r}"
            )
        return {key: encoded(item, f"{where}[{key!r}]") for key, item in value.items()}
    if hasattr(value, "tolist") and not isinstance(value.tolist(), np.generic):
        return encoded(value.tolist(), where)
    raise TypeError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold; pass numbers, strings, "
        "lists or dicts, e.g. dataclasses.asdict(plan) or str(value)"
    )


def decoded(text: str | bytes) -> Any:
    """The value of one line of strict JSON, with NaN and infinities restored."""
    return json.loads(text, object_hook=_restored, parse_constant=_refused)


def _encoded_dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{where} must be a dict, got {type(value).__name__}")
    return encoded(value, where)


def _restored(value: dict[str, Any]) -> Any:
    return float(value["$float"]) if value.keys() == {"$float"} else value


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _line(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode() + b"\n"


def _is_unbegun(data: bytes) -> bool:
    """Whether a file is empty or ends inside the header, so that it holds no record."""
    return b"\n" not in data and (_MAGIC.startswith(data) or data.startswith(_MAGIC))


def _parsed(path: pathlib.Path, data: bytes) -> Recorded:
    if not data.startswith(_MAGIC):
        raise RecordMismatch(
            f"{path} is no {FORMAT} log: it begins with {data[:40]!r}. "
            "It was left as it is; pass another path."
        )
    body, _, tail = data.rpartition(b"\n")
    first, *rest = body.split(b"\n")
    header = _dict_or_none(first)
    if header is None or not {"config", "versions"} <= header.keys():
        raise ValueError(f"{path}: the header in line 1 is damaged; begin a new log")
    if header.get("version") != VERSION:
        raise RecordMismatch(
            f"{path} has format version {header.get('version')}, this jaxcert reads {VERSION}; "
            f"it was begun with jaxcert {header['versions'].get('jaxcert')}"
        )
    records = [_dict_or_none(line) for line in rest]
    # A kill leaves a line without its newline. A power cut can also leave one with its newline but
    # with a hole inside. Both are the last line, because an append is on disk before the next.
    torn = len(tail)
    if not tail and records and records[-1] is None:
        records.pop()
        torn = len(rest[-1]) + 1
    if None in records:
        raise ValueError(
            f"{path}: line {records.index(None) + 2} is damaged, and it is not the last; delete "
            "that line to have its record computed again"
        )
    whole = [record for record in records if record is not None]
    return Recorded(header["config"], header["versions"], whole, torn)


def _dict_or_none(line: bytes) -> dict[str, Any] | None:
    try:
        value = decoded(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    """One line per place where two encoded configurations differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        pairs = [(key, old.get(key, _MISSING), new.get(key, _MISSING)) for key in keys]
        return [line for k, a, b in pairs for line in _differences(a, b, f"{where}.{k}")]
    if old == new:
        return []
    return [f"{where.lstrip('.') or 'config'}: {_shown(old)} in the file, {_shown(new)} now"]


_MISSING = object()


def _shown(value: Any) -> str:
    text = "missing" if value is _MISSING else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("jaxcert", "jax", "numpy")}
    return {"python": platform.python_version(), **packages}


def _sync_folder(folder: pathlib.Path) -> None:
    """Make a new file's name as durable as its content (POSIX; elsewhere folders cannot be)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
