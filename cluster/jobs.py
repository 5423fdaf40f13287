"""Owns runs as jobs of a Ray cluster: shipped, found again by their run's name, followed and stopped.

    run's name ──► elenchus-NAME, elenchus-NAME~2, … (an attempt each; one at a time is alive)

Beside them errands: commands that must run where a run's directory is, and are over in a moment.

The only module that speaks to `ray.job_submission`. Knows nothing of what a job computes: it gets a folder and words.
Tokens travel in request headers alone: never in a job's metadata, environment or entrypoint.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import time
import uuid
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

ANSWER_DEADLINE_S = 5.0
"""Longest time for a cluster's address to answer a first request; Ray's own client waits without end."""
STOP_GRACE_S = 3600
"""How long a job may take from the request to stop to its end, before Ray kills it; Ray's default is 3 s."""
ERRAND_TIMEOUT_S = 120.0
TALKATIVE = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""Loggers that tell of every package sent and every connection closed; the last two set their level themselves."""
RAYS_OWN = r"Running entrypoint for job |\d{4}-\d\d-\d\d \S+\sINFO job_manager\.py"
"""How the lines begin that Ray writes into a job's log."""
POLL_EVERY_S = 1.0
ENDED = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})
ERRAND_KEY = "elenchus_errand"
"""In the metadata of an errand: the run that it is for."""
JOB_VARIABLE = "ELENCHUS_JOB"
"""Set in a job's environment to its submission id."""
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    # The driver's own answer to Ctrl-C is the clean stop; both are read by Ray's supervisor of the job.
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S),
}


class JobClient(Protocol):
    """What is used of `ray.job_submission.JobSubmissionClient`."""

    def submit_job(
        self,
        *,
        entrypoint: str,
        submission_id: str | None = None,
        runtime_env: dict[str, Any] | None = None,
        metadata: dict[str, str] | None = None,
    ) -> str: ...

    def list_jobs(self) -> list[Any]: ...

    def stop_job(self, job_id: str) -> bool: ...

    def get_job_logs(self, job_id: str) -> str: ...

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...

    def get_job_info(self, job_id: str) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One attempt at a run."""

    submission_id: str
    run: str
    status: str
    """Ray's word: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    attempt: int
    """From 1."""
    message: str
    """What Ray says about the status; may hold the end of the log."""
    started: float | None
    """Seconds since the epoch; None before it starts."""
    exit_code: int | None
    """Of the command; None while it runs, and when it was ended before it could say one."""
    metadata: Mapping[str, str]

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.status in ENDED


class Submitted(NamedTuple):
    """What came of a submission."""

    job: Job
    is_new: bool
    """False when the run had a job that was alive already: nothing was submitted."""


class Errand(NamedTuple):
    """What came of a short command."""

    lines: tuple[str, ...]
    """What it has written."""
    exit_code: int | None
    """None when it could not begin."""


class Jobs:
    """The jobs of this project on one cluster."""

    def __init__(self, client: JobClient, *, address: str) -> None:
        """Take a client of the cluster at an address, which is named in messages."""
        self._client = client
        self.address = address

    @classmethod
    def at(cls, address: str, *, token_path: Path | None = None) -> Jobs:
        """Connect to the cluster whose dashboard has the address.

        Raises:
            ValueError: no such address, nothing or something else answers, the token is wrong or missing, or the
                cluster runs another version of Ray.
        """
        url = dashboard_url(address)
        headers = token_headers(token_path)
        _check_cluster(url, headers=headers)
        from ray.job_submission import JobSubmissionClient

        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray would prefer them to what was said
            return cls(JobSubmissionClient(url, headers=headers), address=url)

    def all(self) -> list[Job]:
        """Return this project's jobs, by run and attempt."""
        with self._speaking():
            found = self._client.list_jobs()
        jobs = [
            Job(
                submission_id=str(info.submission_id),
                run=info.metadata["elenchus_run"],
                status=_status(info),
                attempt=int(info.metadata["elenchus_attempt"]),
                message=info.message or "",
                started=info.start_time / 1000 if info.start_time else None,
                exit_code=info.driver_exit_code,
                metadata=dict(info.metadata),
            )
            for info in found
            if info.submission_id and "elenchus_run" in (info.metadata or {})
        ]
        return sorted(jobs, key=lambda job: (job.run, job.attempt))

    def newest(self, run: str) -> Job:
        """Return the last attempt at a run.

        Raises:
            ValueError: the cluster knows no job of that run; names those it knows.
        """
        jobs = self.all()
        mine = [job for job in jobs if job.run == run]
        if mine:
            return mine[-1]
        names = sorted({job.run for job in jobs})
        wanted = f"wanted one of {', '.join(names)}" if names else "and it has none of elenchus yet"
        raise ValueError(f'run: got "{run}", of which {self.address} has no job, {wanted}')

    def submit(self, run: str, *, words: Sequence[str], folder: Path, metadata: Mapping[str, str]) -> Submitted:
        """Have a command run in a copy of a folder, unless the run has a job that is alive.

        Args:
            run: the run's name.
            words: the command, without a shell.
            folder: what is shipped.
            metadata: what `all` tells of the job; readable by everybody on the cluster.
        """
        attempts = [job for job in self.all() if job.run == run]
        if attempts and not attempts[-1].ended:
            return Submitted(attempts[-1], is_new=False)
        attempt = attempts[-1].attempt + 1 if attempts else 1
        # No run's name holds a ~: run "a" has no attempt that is another run's first.
        submission_id = f"elenchus-{run}" if attempt == 1 else f"elenchus-{run}~{attempt}"
        told = {**metadata, "elenchus_run": run, "elenchus_attempt": str(attempt)}
        try:
            variables = {**ENVIRONMENT, JOB_VARIABLE: submission_id}
            self._submit(submission_id, words=words, folder=folder, metadata=told, variables=variables)
        except RuntimeError as error:
            # Somebody else was quicker by a moment: theirs is the one.
            if "already exists" not in str(error):
                raise
            return Submitted(self.newest(run), is_new=False)
        return Submitted(self.newest(run), is_new=True)

    def errand(self, run: str, *, words: Sequence[str], folder: Path, timeout_s: float = ERRAND_TIMEOUT_S) -> Errand:
        """Have a short command run where a run's directory is, and return what came of it.

        Ray's own list of jobs keeps it, and with it who asked for what; `all` leaves it out.

        Raises:
            TimeoutError: it has not ended in time; it was told to stop.
        """
        submission_id = f"elenchus-{run}~errand-{uuid.uuid4().hex[:8]}"
        # Not the run's variables: an errand does not tell a state, and ends when it is told to.
        variables = {"RAY_AUTH_MODE": ENVIRONMENT["RAY_AUTH_MODE"]}
        self._submit(submission_id, words=words, folder=folder, metadata={ERRAND_KEY: run}, variables=variables)
        deadline = time.monotonic() + timeout_s
        with self._speaking():
            while _status(info := self._client.get_job_info(submission_id)) not in ENDED:
                if time.monotonic() > deadline:
                    self._client.stop_job(submission_id)
                    raise TimeoutError(
                        f'errand "{shlex.join(words[1:])}" at {self.address} has not ended within {timeout_s:g} s: '
                        f"got {str(info.message)[:200]!r}; look at the head node, then say this again"
                    )
                time.sleep(0.2)
            said = self._client.get_job_logs(submission_id)
        # Ray's own lines may come between the command's.
        lines = [line for line in said.splitlines() if not re.match(RAYS_OWN, line)]
        return Errand(tuple(lines), info.driver_exit_code)

    def _submit(
        self,
        submission_id: str,
        *,
        words: Sequence[str],
        folder: Path,
        metadata: Mapping[str, str],
        variables: Mapping[str, str],
    ) -> None:
        with self._speaking():
            self._client.submit_job(
                # exec: else the signal to stop would reach a shell too, which dies of it.
                entrypoint=f"exec {shlex.join(words)}",
                submission_id=submission_id,
                runtime_env={"working_dir": str(folder), "env_vars": dict(variables)},
                metadata=dict(metadata),
            )

    def logs(self, job: Job) -> str:
        """Return all that a job has written to its terminal so far."""
        with self._speaking():
            return self._client.get_job_logs(job.submission_id)

    def follow(self, job: Job) -> Generator[str, None, None]:
        """Yield the lines that a job has written and writes, until it ends."""
        chunks = self._client.tail_job_logs(job.submission_id)

        async def following() -> str | None:
            return await anext(chunks, None)

        rest = ""
        # It also closes the connection when the caller has seen enough.
        with asyncio.Runner() as runner:
            while True:
                with self._speaking():
                    chunk = runner.run(following())
                if chunk is None:
                    break
                *lines, rest = (rest + chunk).split("\n")
                yield from lines
        if rest:
            yield rest

    def stop(self, job: Job, *, timeout_s: float) -> Job:
        """Ask a job for a clean stop, wait for its end and return how it is then; still running after the timeout."""
        with self._speaking():
            self._client.stop_job(job.submission_id)
        return self.ended(job, timeout_s=timeout_s)

    def ended(self, job: Job, *, timeout_s: float) -> Job:
        """Wait until a job has ended and return how it is then; still running after the timeout."""
        deadline = time.monotonic() + timeout_s
        while not (now := self._again(job)).ended and time.monotonic() < deadline:
            time.sleep(POLL_EVERY_S)
        return now

    def _again(self, job: Job) -> Job:
        return next(found for found in self.all() if found.submission_id == job.submission_id)

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise ValueError(_wrong_token(self.address, has_token=True)) from None
        except (ConnectionError, requests.exceptions.ConnectionError):
            raise ValueError(
                f'--address: got "{self.address}", which has stopped answering, wanted a cluster that runs: '
                "look at its head node, then say this again"
            ) from None


def _status(info: Any) -> str:
    return str(getattr(info.status, "value", info.status))


def dashboard_url(address: str) -> str:
    """Return the URL of a cluster's dashboard, which takes jobs.

    >>> dashboard_url("10.0.0.1:8265")
    'http://10.0.0.1:8265'

    Raises:
        ValueError: the address is none, or another one of the cluster's.
    """
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme not in ("http", "https") or not parts.hostname or (port is None and parts.scheme == "http"):
        raise ValueError(
            f'--address: got "{address}", wanted the cluster\'s dashboard, which takes jobs, such as '
            "http://10.0.0.1:8265 (`ray start --head` prints it)"
        )
    return f"{parts.scheme}://{parts.netloc}"


def token_headers(token_path: Path | None) -> dict[str, str]:
    """Return the header that carries the token, from where Ray takes it; none without a token.

    Raises:
        ValueError: the file that was named is missing or empty.
    """
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if token_path is None and os.environ.get("RAY_AUTH_TOKEN"):
        token = os.environ["RAY_AUTH_TOKEN"].strip()
    else:
        path = token_path or (Path(named) if named else Path.home() / ".ray" / "auth_token")
        token = path.read_text().strip() if path.is_file() else ""
        if not token and token_path is not None:
            raise ValueError(f"--token-path: got {path}, which is missing or empty, wanted the cluster's token")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _check_cluster(url: str, *, headers: Mapping[str, str]) -> None:
    """Raise ValueError unless a Ray of our version answers at a URL and knows our token."""
    import ray
    import requests

    where = f'--address: got "{url}"'
    try:
        # /api/version may answer anybody; the list of jobs does not.
        version = requests.get(f"{url}/api/version", headers=dict(headers), timeout=ANSWER_DEADLINE_S)
        listed = requests.get(f"{url}/api/jobs/", headers=dict(headers), timeout=ANSWER_DEADLINE_S)
    except requests.exceptions.RequestException as error:
        slow = isinstance(error, requests.exceptions.Timeout)
        raise ValueError(
            f"{where}, where nothing answers{f' within {ANSWER_DEADLINE_S:g} s' if slow else ''}, wanted the dashboard "
            "of a running Ray: start one there by `ray start --head`, or forward its port"
        ) from None
    if {version.status_code, listed.status_code} & {401, 403}:
        raise ValueError(_wrong_token(url, has_token=bool(headers)))
    try:
        there = str(version.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{where}, where something answers that is no Ray, wanted the dashboard of a running Ray"
        ) from None
    if there != ray.__version__:
        raise ValueError(
            f"{where}, which runs Ray {there}, wanted Ray {ray.__version__} as here: install the same on both sides"
        )


def _wrong_token(url: str, *, has_token: bool) -> str:
    got = "a token that it does not know" if has_token else "no token"
    return (
        f'--address: got "{url}" and {got}, wanted that cluster\'s: give --token-path a file that holds it, or export '
        "RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN (on its head node `ray get-auth-token` prints it)"
    )


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Hide variables of the environment for a while."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
