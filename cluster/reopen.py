"""Owns the way back from a commit that fails: its iteration becomes the open one again, with what is intact logged.

Knows neither the lease nor the run's other files; who falls back, and to which commit, is cluster/commits.py's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from cluster.append_log import AppendLog
from cluster.commits import CorruptRun, Segment, iteration_dir, iteration_of, read_commit, read_segment
from cluster.durable_files import FileDigest, sync_path
from cluster.log_records import LoggedRecord, encode_record

logger = logging.getLogger(__name__)


def reopen_rejected(run: Path, iteration: int, *, id_columns: Mapping[str, str]) -> None:
    """Turn an iteration whose commit fails back into an open one, with the rows of its intact segments logged.

    Each step can be repeated: a kill in between leaves COMMIT.json in place, and the next open comes here again.
    """
    directory = run / "journal" / iteration_dir(iteration)
    log = directory / "append.log"
    num_lost = 0
    if not log.exists():
        beside = directory / ".append.log.tmp"
        beside.unlink(missing_ok=True)
        rebuilt = AppendLog(beside)
        for stage, segment in _segments_to_recover(run, iteration, id_columns=id_columns).items():
            table = _intact_segment(run, segment)
            if table is None:
                num_lost += 1
            else:
                rebuilt.append([encode_record(LoggedRecord(stage, iteration, 0, table))])
        rebuilt.close()
        if num_lost:
            _set_aside_later_logs(run, iteration)
        os.replace(beside, log)
        sync_path(directory)
    os.replace(directory / "COMMIT.json", directory / "COMMIT.rejected.json")
    sync_path(directory)
    logger.error("%s: iteration %d is open again, %d of its segments lost", run, iteration, num_lost)


def _set_aside_later_logs(run: Path, iteration: int) -> None:
    """Rename later iterations' logs: sampled from weights that this iteration, with other rows, may not reproduce."""
    for log in sorted((run / "journal").glob("iteration=*/append.log")):
        if iteration_of(log.parent) > iteration:
            log.rename(log.with_name("append.rejected.log"))
            logger.error("%s: set aside as append.rejected.log", log)


def _segments_to_recover(run: Path, iteration: int, *, id_columns: Mapping[str, str]) -> dict[str, Segment]:
    try:
        return read_commit(run, iteration).segments
    except CorruptRun as error:
        # Without COMMIT.json nothing vouches for the segments.
        logger.error("%s: its segments cannot be verified, their rows are made again (%s)", run, error)
        names = {path.stem for path in (run / "journal" / iteration_dir(iteration)).glob("*.parquet")}
        nothing = FileDigest(path="", size_bytes=0, sha256="")
        return {stage: Segment(file=nothing, num_rows=0) for stage in sorted(names & set(id_columns))}


def _intact_segment(run: Path, segment: Segment) -> pa.Table | None:
    if not segment.file.path:
        return None
    try:
        return read_segment(run, segment)
    except CorruptRun as error:
        logger.error("segment lost: %s", error)
        return None
