"""Processes that every run of Ray Train waits for, started while the run still reads its data.

Ray Train starts its coordinator of resources, waits for it, then starts the actor behind the dashboard's Train page and
waits for that. Each takes some four seconds of imports, and both are named: who asks first makes them, and who asks later
finds them. While the stage that trains builds its index the other CPUs have nothing to do. It starts them, not the driver,
because asking for them imports Ray Data, which it needs anyway.
"""

from __future__ import annotations

import os
from contextlib import suppress


def start_early() -> None:
    """Have both actors started on the connected cluster; returns at once, and does nothing where Ray has others."""
    # They are Ray's own and move with its versions: without them a run only starts later.
    with suppress(ImportError):
        from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator

        get_or_create_autoscaling_coordinator()
    if os.environ.get("RAY_TRAIN_ENABLE_STATE_TRACKING") != "1":
        return
    with suppress(ImportError):
        from ray.train.v2._internal.state.state_actor import get_or_create_state_actor

        get_or_create_state_actor()
