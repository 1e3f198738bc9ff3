"""Follow a job's log to the job's end, whatever the connection does meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffsynth_ray.errors import ClusterError
from diffsynth_ray.launch.client import ACTIVE, Cluster, Ended, ended, job_client

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_STATUS_S = 1.0
_LOST_S = 60.0
"""How long a cluster that no longer answers is tried."""


def follow(
    cluster: Cluster, submission_id: str, on_line: Callable[[str], None], *, say: Callable[[str], None] | None = None
) -> Ended:
    """Give every line of the job's log once to `on_line`, until the job has ended.

    A stream that ends is not a job that ended, and a reconnected one starts from the log's beginning: the lines seen
    are counted. Raises ClusterError where the cluster stays away for a minute.
    """
    reader = _LogReader(on_line)
    lost_since: float | None = None
    while True:
        try:
            client = job_client(cluster)
            lost_since = None
            job = asyncio.run(_read_until_end(reader, client, cluster, submission_id))
            if job["status"] not in ACTIVE:
                reader.finish(_whole_log(cluster, submission_id))
                return ended(job)
        except ClusterError as error:
            gone = cluster.local is not None and not cluster.local.alive()
            lost_since = lost_since or time.monotonic()
            if gone or isinstance(error, _ForgottenError) or time.monotonic() - lost_since > _LOST_S:
                raise
            if say:
                say(f"{error.message}; trying again ...")
        time.sleep(0.5)


async def _read_until_end(
    reader: _LogReader, client: JobSubmissionClient, cluster: Cluster, submission_id: str
) -> dict[str, Any]:
    """Read the stream until it ends, or until the job does: Ray closes it seconds later, or not at all."""
    stream = asyncio.create_task(reader.read(client, submission_id))
    try:
        while True:
            await asyncio.wait({stream}, timeout=_STATUS_S)
            job = await asyncio.to_thread(cluster.job, submission_id)
            if job is None:
                raise _ForgottenError(f"{cluster.url} no longer knows the job {submission_id}")
            if stream.done():
                stream.result()  # raises where nobody takes the lines any more
                return job
            if job["status"] not in ACTIVE:
                return job
    finally:
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)


class _ForgottenError(ClusterError):
    """The cluster answers, but does not know the job: it was started anew."""


class _LogReader:
    """Splits the stream into lines and skips what was given before."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self.on_line = on_line
        self.num_chars = 0
        """Characters of the log that were given to on_line, always whole lines."""

    async def read(self, client: JobSubmissionClient, submission_id: str) -> None:
        """Read one stream to its end, however it ends."""
        import aiohttp

        skip, rest = self.num_chars, ""
        stream = client.tail_job_logs(submission_id)
        try:
            while True:
                try:
                    chunk = await anext(stream)
                except (StopAsyncIteration, TimeoutError, aiohttp.ClientError, OSError, RuntimeError):
                    return  # the caller asks the job's status, which tells whether this was the end
                skipped = min(skip, len(chunk))
                skip -= skipped
                rest = self._give(rest + chunk[skipped:])  # its errors are those of the lines' reader
        finally:
            await stream.aclose()

    def finish(self, log: str | None) -> None:
        """Give what the stream did not bring, and a last line without an end."""
        if log is not None and (rest := self._give(log[self.num_chars :])):
            self.num_chars += len(rest)
            self.on_line(rest)

    def _give(self, text: str) -> str:
        """Give the whole lines of `text`; returns the rest."""
        *lines, rest = text.split("\n")
        for line in lines:
            self.num_chars += len(line) + 1
            self.on_line(line)
        return rest


def _whole_log(cluster: Cluster, submission_id: str) -> str | None:
    try:
        return str(cluster.request(f"/api/jobs/{submission_id}/logs")["logs"])
    except ClusterError:
        return None  # the stream brought all or nearly all of it, and the run has its own copy
