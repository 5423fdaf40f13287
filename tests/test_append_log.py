"""The append log survives every truncation, flipped bit, failed sync and full disk, or says what is damaged where."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.append_log import AppendLog, CorruptLog, durable, read_log
from cluster.durable_files import EXIT_SYNC_FAILED

HEADER_BYTES = 20  # magic 8, salt 8, crc32 4
RECORD_HEADER_BYTES = 12  # marker 4, length 4, crc32 4
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def fifty_records(tmp_path: Path) -> tuple[list[bytes], list[int], bytes]:
    """Return payloads, the offset at which each record begins, and the file's bytes."""
    payloads = [f"record {number}".encode() * (number % 5) for number in range(50)]
    log = AppendLog(tmp_path / "fifty.log")
    for payload in payloads:
        log.append([payload])
    log.close()
    offsets = [HEADER_BYTES]
    for payload in payloads[:-1]:
        offsets.append(offsets[-1] + RECORD_HEADER_BYTES + len(payload))
    data = (tmp_path / "fifty.log").read_bytes()
    assert len(data) == offsets[-1] + RECORD_HEADER_BYTES + len(payloads[-1])
    return payloads, offsets, data


def test_every_truncation_recovers_exactly_the_whole_records_before_it(
    fifty_records: tuple[list[bytes], list[int], bytes], tmp_path: Path
) -> None:
    payloads, offsets, data = fifty_records
    ends = [*offsets[1:], len(data)]
    path = tmp_path / "cut.log"
    for size_bytes in range(len(data) + 1):
        path.write_bytes(data[:size_bytes])
        num_whole = sum(end <= size_bytes for end in ends)
        assert read_log(path).payloads == payloads[:num_whole], size_bytes


def test_every_flipped_bit_is_named_or_costs_the_last_record_alone(
    fifty_records: tuple[list[bytes], list[int], bytes], tmp_path: Path
) -> None:
    payloads, offsets, data = fifty_records
    path = tmp_path / "flipped.log"
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position * 5 % 8)
        path.write_bytes(damaged)
        if position >= offsets[-1]:
            assert read_log(path).payloads == payloads[:-1], position
            continue
        hit = max((offset for offset in offsets if offset <= position), default=0)
        with pytest.raises(CorruptLog, match=f"flipped.log: .* at offset {hit}[ ,]"):
            read_log(path)


def test_a_log_goes_on_after_its_torn_tail_was_cut(
    fifty_records: tuple[list[bytes], list[int], bytes], tmp_path: Path
) -> None:
    payloads, offsets, data = fifty_records
    path = tmp_path / "torn.log"
    for size_bytes in (0, 7, HEADER_BYTES, offsets[10] + 3, len(data) - 1):
        path.write_bytes(data[:size_bytes])
        log = AppendLog(path)
        num_whole = len(log.payloads())
        log.append([b"new", b"newer"])
        assert log.payloads() == [*payloads[:num_whole], b"new", b"newer"]
        log.close()
        assert read_log(path).payloads == [*payloads[:num_whole], b"new", b"newer"]


def test_a_copy_of_a_log_inside_a_torn_record_is_not_taken_for_records(
    fifty_records: tuple[list[bytes], list[int], bytes], tmp_path: Path
) -> None:
    log = AppendLog(tmp_path / "outer.log")
    log.append([b"whole", fifty_records[2]])
    log.close()
    os.truncate(log.path, log.path.stat().st_size - 1)
    assert read_log(log.path).payloads == [b"whole"]


def test_concurrent_appends_keep_the_order_of_their_calls(tmp_path: Path) -> None:
    async def append_all(log: AppendLog) -> None:
        await asyncio.gather(*(durable(log.submit([str(number).encode()])) for number in range(300)))

    log = AppendLog(tmp_path / "many.log")
    asyncio.run(append_all(log))
    assert log.payloads() == [str(number).encode() for number in range(300)]
    log.close()


def test_a_cancelled_append_is_written_all_the_same_and_harms_no_other(tmp_path: Path) -> None:
    async def cancel_one_of_three(log: AppendLog) -> None:
        tasks = [asyncio.create_task(durable(log.submit([name]))) for name in (b"a", b"b", b"c")]
        await asyncio.sleep(0)
        tasks[1].cancel()
        assert await asyncio.gather(*tasks[::2]) == [None, None]

    log = AppendLog(tmp_path / "cancelled.log", sync=lambda _: time.sleep(0.05))
    asyncio.run(cancel_one_of_three(log))
    assert log.payloads() == [b"a", b"b", b"c"]
    log.close()


def test_records_that_wait_together_share_one_sync_of_at_most_64(tmp_path: Path) -> None:
    num_syncs = 0

    def slow_sync(_: int) -> None:
        nonlocal num_syncs
        num_syncs += 1
        time.sleep(0.05)

    log = AppendLog(tmp_path / "grouped.log", sync=slow_sync)  # one sync at recovery
    for future in [log.submit([b"x"]) for _ in range(129)]:
        future.result()
    log.close()
    # The first group holds what was there when the writer woke (1 to 64), the others 64: 128 in between at most.
    assert num_syncs - 1 in (3, 4)


def test_a_failed_sync_ends_the_process_and_acknowledges_nothing(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from cluster.append_log import AppendLog
num_calls = 0
def sync(descriptor):
    global num_calls
    num_calls += 1
    if num_calls > 2:
        raise OSError(5, "Input/output error")
log = AppendLog(Path(sys.argv[1]), sync=sync)
log.append([b"first"])
print("first acknowledged", flush=True)
log.append([b"second"])
print("second acknowledged", flush=True)
"""
    done = run_python(script, str(tmp_path / "failing.log"))
    assert done.returncode == EXIT_SYNC_FAILED
    assert done.stdout == "first acknowledged\n"
    assert "fsync failed" in done.stderr


def test_a_full_disk_is_reported_and_the_log_stays_sound(tmp_path: Path) -> None:
    script = """
import resource, signal, sys
from pathlib import Path
from cluster.append_log import AppendLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = AppendLog(Path(sys.argv[1]))
log.append([b"small"])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    log.append([b"x" * 2000])
except OSError as error:
    print("refused", error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append([b"again"])
print(log.payloads())
"""
    done = run_python(script, str(tmp_path / "full.log"))
    assert done.stdout == "refused 27\n[b'small', b'again']\n", done.stderr


def run_python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
