"""A sign of life from a worker: what its training thread is at and for how long, told by another thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

LOADING = frozenset({"starting", "checking the checkpoint", "loading the model", "restoring the checkpoint"})
"""Phases that read much from a disk, and so may take several times distributed.timeout_s."""
LOADING_PATIENCE = 4
_SEND_AT_MOST_EVERY_S = 0.2
"""Phases within a step."""
DONE = "done"
"""The phase of a worker that waits for the others to end too."""


class Heartbeat:
    """A process that is stopped or gone sends nothing; one whose training thread stands still sends a growing age."""

    def __init__(self, send: Callable[[str, int, float], object], *, every_s: float) -> None:
        """`send` gets phase, step and seconds in that phase."""
        self._send, self._every_s = send, every_s
        self._phase, self._step, self._since = "starting", 0, time.monotonic()
        self._sent = 0.0
        self._telling = threading.Lock()
        """Two threads tell, and the older news must not come last."""
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """The training thread begins something else, at optimizer step `step` if that is another one.

        A new step is always told, and so before anything else that this worker tells of it.
        """
        with self._telling:
            is_new_step = step is not None and step != self._step
            self._phase, self._since = phase, time.monotonic()
            self._step = self._step if step is None else step
            if is_new_step or self._since - self._sent > _SEND_AT_MOST_EVERY_S:
                self._tell()

    def end(self) -> None:
        """No more signs: the training function has ended."""
        with self._telling:
            self._ended.set()
            self._send(DONE, self._step, 0.0)

    def _run(self) -> None:
        while True:
            with self._telling:
                if self._ended.is_set():
                    return
                self._tell()
            self._ended.wait(self._every_s)

    def _tell(self) -> None:
        self._sent = time.monotonic()
        self._send(self._phase, self._step, self._sent - self._since)
