"""The log: exact round trips, resuming, and what is left after a kill at any moment."""

import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcert.errors import RecordMismatch
from jaxcert.evaluate import records
from jaxcert.evaluate.records import Log

CONFIG = {"net": "lenet", "sigma": 0.25, "norm": math.inf, "layers": [1, 2]}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5).filter(lambda k: k != "$float"), inner, max_size=3)
    ),
    max_leaves=8,
)


def bits(value):
    """A value with its floats as bit patterns, so that -0.0 and NaN compare."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack("d", value)
    if isinstance(value, list):
        return [bits(item) for item in value]
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return value


@given(json_values)
def test_encoding_round_trips_exactly_and_is_strict_json(value):
    text = json.dumps(records.encoded(value), allow_nan=False)
    assert bits(records.decoded(text)) == bits(value)


def test_arrays_and_scalars_of_numpy_and_jax_become_plain_numbers():
    value = {
        "a": np.float32(0.1),
        "b": np.arange(3),
        "c": jnp.float32(0.1),
        "d": (np.bool_(True), np.int8(-1)),
        "e": np.array([np.nan]),
    }
    back = records.decoded(json.dumps(records.encoded(value)))
    assert back["a"] == back["c"] == float(np.float32(0.1))
    assert back["b"] == [0, 1, 2]
    assert back["d"] == [True, -1]
    assert back["d"][0] is True
    assert math.isnan(back["e"][0])


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"f": print}, r"record\['f'\] is a builtin_function"),
        ({"a": [1, object()]}, r"record\['a'\]\[1\] is a object"),
        ({3: 1}, "key 3"),
        ({"$float": "nan"}, "'\\$float'"),
        ({"x": np.longdouble(1)}, "longdouble"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_name(tmp_path, value, named):
    with Log(tmp_path / "a.jsonl", CONFIG) as log, pytest.raises(TypeError, match=named):
        log.append(value)
    assert records.read(tmp_path / "a.jsonl").records == []


def test_bare_nan_in_a_file_is_not_json():
    with pytest.raises(ValueError, match="NaN is not JSON"):
        records.decoded('{"a": NaN}')


def test_a_log_is_a_header_and_one_line_per_record(tmp_path):
    path = tmp_path / "a.jsonl"
    with Log(path, CONFIG) as log:
        log.append({"i": 0, "radius": math.inf})
        log.append({"i": 1}, {"i": 2})
    lines = path.read_text().splitlines()
    header = json.loads(lines[0])
    assert (header["format"], header["version"]) == ("jaxcert-records", 1)
    assert header["config"] == CONFIG | {"norm": {"$float": "inf"}}
    assert {"python", "jaxcert", "jax", "numpy"} <= header["versions"].keys()
    assert len(lines) == 4
    found = records.read(path)
    assert found.config == CONFIG
    assert found.records == [{"i": 0, "radius": math.inf}, {"i": 1}, {"i": 2}]
    assert found.torn == 0


def test_resuming_recovers_the_records_and_appends_after_them(tmp_path):
    path = tmp_path / "a.jsonl"
    with Log(path, CONFIG) as log:
        assert log.recovered == []
        log.append({"i": 0})
    with Log(path, dict(reversed(CONFIG.items()))) as log:
        assert log.recovered == [{"i": 0}]
        log.append({"i": 1})
    assert records.read(path).records == [{"i": 0}, {"i": 1}]


def test_nan_in_a_configuration_equals_itself(tmp_path):
    Log(tmp_path / "a.jsonl", {"x": math.nan}).close()
    with Log(tmp_path / "a.jsonl", {"x": math.nan}) as log:
        assert log.recovered == []


def test_another_configuration_raises_with_the_differences_and_writes_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    with Log(path, {"sigma": 0.25, "plan": {"n": 100, "alpha": 1e-3}}) as log:
        log.append({"i": 0})
    before = path.read_bytes()
    with pytest.raises(RecordMismatch) as error:
        Log(path, {"sigma": 0.5, "plan": {"n": 100, "key": 7}})
    message = str(error.value)
    assert "sigma: 0.25 in the file, 0.5 now" in message
    assert "plan.alpha: 0.001 in the file, missing now" in message
    assert "plan.key: missing in the file, 7 now" in message
    assert "plan.n" not in message
    assert "another path" in message
    assert path.read_bytes() == before


def test_a_file_of_another_kind_is_never_touched(tmp_path):
    path = tmp_path / "thesis.txt"
    for content in (b"my only copy", b"my only copy\n", b'{"format": "other"}\n', b"\0" * 50):
        path.write_bytes(content)
        with pytest.raises(RecordMismatch, match="is no jaxcert-records log"):
            Log(path, CONFIG)
        with pytest.raises(RecordMismatch, match="is no jaxcert-records log"):
            records.read(path)
        assert path.read_bytes() == content


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    Log(path, CONFIG).close()
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(RecordMismatch, match="format version 2, this jaxcert reads 1"):
        Log(path, CONFIG)


def test_cut_at_every_byte_all_complete_records_survive(tmp_path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    written = [{"i": 0, "text": "ü\n"}, {"i": 1, "radius": 0.1}]
    with Log(whole, CONFIG) as log:
        log.append(*written)
    data = whole.read_bytes()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        complete = max(data[:size].count(b"\n") - 1, 0)
        with Log(path, CONFIG) as log:
            assert log.recovered == written[:complete]
            log.append(*written[complete:])
        assert path.read_bytes() == data, f"cut at byte {size}"


def test_reading_tells_of_a_torn_line_and_leaves_it(tmp_path):
    path = tmp_path / "a.jsonl"
    with Log(path, CONFIG) as log:
        log.append({"i": 0}, {"i": 1})
    path.write_bytes(path.read_bytes()[:-3])
    before = path.read_bytes()
    found = records.read(path)
    assert found.records == [{"i": 0}]
    assert found.torn == len('{"i": 1}\n') - 3
    assert path.read_bytes() == before


def test_a_last_line_with_a_hole_is_dropped_a_damaged_line_before_it_raises(tmp_path):
    path = tmp_path / "a.jsonl"
    with Log(path, CONFIG) as log:
        log.append({"i": 0}, {"i": 1}, {"i": 2})
    good = path.read_bytes()
    path.write_bytes(good.replace(b'{"i": 2', b"\0" * 7))
    with Log(path, CONFIG) as log:
        assert log.recovered == [{"i": 0}, {"i": 1}]
        log.append({"i": 2})
    assert path.read_bytes() == good
    for damaged in (good.replace(b'{"i": 1}', b'{"i": 1'), good.replace(b'{"i": 1}', b"5")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="line 3 is damaged"):
            Log(path, CONFIG)
        with pytest.raises(ValueError, match="line 3 is damaged"):
            records.read(path)
        assert path.read_bytes() == damaged


def test_a_damaged_header_raises(tmp_path):
    path = tmp_path / "a.jsonl"
    Log(path, CONFIG).close()
    path.write_bytes(path.read_bytes().replace(b'"config"', b'"confi\xff"'))
    with pytest.raises(ValueError, match="header in line 1 is damaged"):
        Log(path, CONFIG)


def test_each_append_is_one_write_and_one_fsync_and_the_folder_is_synced_once(
    tmp_path, monkeypatch
):
    calls = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda f, d: (calls.append("write"), write(f, d))[1])

    def spying_fsync(file):
        is_folder = os.path.isdir(f"/proc/self/fd/{file}")
        calls.append("fsync folder" if is_folder else "fsync")
        fsync(file)

    monkeypatch.setattr(os, "fsync", spying_fsync)
    with Log(tmp_path / "a.jsonl", CONFIG) as log:
        if os.path.isdir("/proc/self/fd"):
            assert calls == ["write", "fsync", "fsync folder"]
        calls.clear()
        log.append({"i": 0}, {"i": 1})
        assert calls == ["write", "fsync"]


def test_a_full_disk_raises_and_leaves_no_half_record(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    write = os.write
    with Log(path, CONFIG) as log:
        log.append({"i": 0})
        before = path.read_bytes()
        monkeypatch.setattr(os, "write", lambda f, d: write(f, d[:5]))
        with pytest.raises(OSError, match="only 5 of"):
            log.append({"i": 1})
        assert path.read_bytes() == before
        monkeypatch.setattr(os, "write", write)
        log.append({"i": 2})
    assert records.read(path).records == [{"i": 0}, {"i": 2}]


def test_a_closed_log_refuses_records(tmp_path):
    log = Log(tmp_path / "a.jsonl", CONFIG)
    log.close()
    log.close()
    with pytest.raises(ValueError, match="is closed"):
        log.append({"i": 0})


@pytest.mark.skipif(records.fcntl is None, reason="no flock here")
def test_a_second_writer_is_refused_until_the_first_closes(tmp_path):
    path = tmp_path / "a.jsonl"
    with Log(path, CONFIG) as log:
        log.append({"i": 0})
        with pytest.raises(BlockingIOError, match="another run is writing to this log"):
            Log(path, CONFIG)
        assert records.read(path).records == [{"i": 0}]
        log.append({"i": 1})
    with Log(path, CONFIG) as log:
        assert [r["i"] for r in log.recovered] == [0, 1]


def test_without_flock_a_log_still_works(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "fcntl", None)
    with Log(tmp_path / "a.jsonl", CONFIG) as log:
        log.append({"i": 0})
    with Log(tmp_path / "a.jsonl", CONFIG) as log:
        assert log.recovered == [{"i": 0}]


def test_only_mappings_are_records_and_configurations(tmp_path):
    with Log(tmp_path / "a.jsonl", CONFIG) as log, pytest.raises(TypeError, match="got list"):
        log.append([1, 2])
    assert records.read(tmp_path / "a.jsonl").records == []
    with pytest.raises(TypeError, match="config must be a dict, got str"):
        Log(tmp_path / "b.jsonl", "lenet")
    assert not (tmp_path / "b.jsonl").exists()


def test_a_refused_log_lets_go_of_its_lock(tmp_path):
    path = tmp_path / "a.jsonl"
    Log(path, CONFIG).close()
    with pytest.raises(RecordMismatch):
        Log(path, {})
    Log(path, CONFIG).close()


# Kill -9, for real: a child appends records 0, 1, 2, ... and the parent kills it once the file has
# grown by a random amount, over and over; a last child then finishes. A child that is to be killed
# stops before the last record, so a slow parent is never late.

TOTAL = 400
CHILD = f"""
import sys
from jaxcert.evaluate.records import Log
with Log(sys.argv[1], {{"run": "kill"}}) as log:
    numbers = [record["i"] for record in log.recovered]
    assert numbers == list(range(len(numbers))), numbers
    print(len(numbers), flush=True)
    for i in range(len(numbers), {TOTAL}):
        if i == {TOTAL - 1} and sys.argv[2] == "wait":
            sys.stdin.read()
        log.append({{"i": i, "radius": i / 7, "text": "x" * (i * 37 % 3000)}})
"""


def child(path, at_the_end):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), at_the_end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_killed_at_random_moments_nothing_is_lost_or_doubled(tmp_path):
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    rng, begun = random.Random(0), []
    for _ in range(5):
        with child(killed, "wait") as process:
            begun.append(int(process.stdout.readline()))
            enough = killed.stat().st_size + rng.randint(5_000, 80_000)
            while killed.stat().st_size < enough and process.poll() is None:
                time.sleep(rng.uniform(0, 1e-4))
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    for path in (killed, whole):
        with child(path, "finish") as process:
            process.communicate()
        assert process.returncode == 0
    assert begun == sorted(set(begun)), "each child was killed after some records"
    assert begun[-1] < TOTAL
    assert killed.read_bytes() == whole.read_bytes()
    assert [r["i"] for r in records.read(killed).records] == list(range(TOTAL))
