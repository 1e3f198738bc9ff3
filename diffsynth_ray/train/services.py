"""Experiment trackers: Weights & Biases, SwanLab, MLflow. Each is imported only where a job asks for it.

Credentials (WANDB_API_KEY, SWANLAB_API_KEY, MLFLOW_TRACKING_USERNAME, ...) come from the environment of the node that
rank 0 runs on. What is sent is the job's keys, the figures and the samples; none holds a secret.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from diffsynth_ray.config.packages import TRACKERS, extra_of, missing_trackers
from diffsynth_ray.config.resolve import ResolvedJob
from diffsynth_ray.config.schema import LoggingSection
from diffsynth_ray.errors import DsrayError, JobFileError, Problem
from diffsynth_ray.run_dir import RunDir
from diffsynth_ray.train.sample_file import SampleFile

_RETRY_S = 5.0
_LAST_TRY_S = 30.0
_BATCH = 500
"""Figures in one request; MLflow takes at most 1000."""


class Service(Protocol):
    """A tracker that figures and samples are sent to. Whatever it raises, the training goes on (`figures.FigureWriter`)."""

    name: str
    """For messages."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures of optimizer step `step`; returns at once."""

    def write_samples(self, step: int, samples: Sequence[SampleFile]) -> None:
        """Send pictures and clips made with the weights after `step`, which may be some steps ago."""

    def close(self) -> None:
        """Send what is left."""


def check_services(logging: LoggingSection) -> None:
    """Raise JobFileError where a tracker's package is missing here, before any GPU is taken."""
    problems = [
        Problem(f"logging.{key}", f"the package {package} is not installed on the cluster: pip install '{extra_of(key)}'")
        for key, package in missing_trackers(logging).items()
    ]
    if problems:
        raise JobFileError("job", problems)


def open_services(run_dir: RunDir, logging: LoggingSection, *, must_open: bool, say: Callable[[str], object]) -> list[Service]:
    """The trackers that the job asks for; one run of theirs for one run of ours, however often it is continued.

    With `must_open` one that refuses (no key, no server) is a DsrayError; without, and for any other failure, it is left out.
    """
    if all(getattr(logging, key) is None for key in TRACKERS):
        return []
    owner = run_dir.owner()
    assert owner is not None  # the attempt has written job.json
    builders: list[Callable[[], Service]] = []
    if logging.wandb_project is not None:
        builders.append(partial(_Wandb, run_dir, owner, project=logging.wandb_project))
    if logging.swanlab_project is not None:
        builders.append(partial(_Swanlab, run_dir, owner, project=logging.swanlab_project))
    if logging.mlflow_tracking_uri is not None:
        builders.append(partial(_Mlflow, owner, tracking_uri=logging.mlflow_tracking_uri, say=say))
    services: list[Service] = []
    for build in builders:
        try:
            services.append(build())
        except Exception as error:
            if must_open and isinstance(error, DsrayError):
                raise
            cause = error.message if isinstance(error, DsrayError) else f"{type(error).__name__}: {error}"
            say(f"warning: a tracker gets nothing from here on: {cause}")
    return services


class _Wandb:
    name = "Weights & Biases"

    def __init__(self, run_dir: RunDir, resolved: ResolvedJob, *, project: str) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=project, name=resolved.run, id=resolved.run, resume="allow", dir=str(run_dir.path),
                config=resolved.job.model_dump(mode="json"),
            )  # fmt: skip
        except wandb.errors.Error as error:
            hint = "set WANDB_API_KEY in the environment of the cluster's nodes, or WANDB_MODE=offline"
            raise DsrayError(f"logging.wandb_project: Weights & Biases: {error}", hint=hint) from error
        self._waiting: list[dict[str, Any]] = []
        """Samples that have not been sent, a step's each."""
        self._newest, self._shown_at = -1, -2
        """Steps of the newest figures, and of those that samples stand beside."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({f"train/{key}": value for key, value in figures.items()}, step=step)
        self._newest = step
        self._show_next()

    def write_samples(self, step: int, samples: Sequence[SampleFile]) -> None:
        import wandb

        shown: dict[str, Any] = {"samples/step": step}
        for each in samples:
            kind = wandb.Video if each.is_clip else wandb.Image
            shown[each.name] = kind(str(each.path), caption=f"{each.prompt} (step {step})")
        self._waiting.append(shown)
        self._show_next()

    def _show_next(self) -> None:
        """It drops what comes for an earlier step than its newest one, so that late samples stand beside the newest figures;
        those of another step would be replaced there, and so wait for the next figures."""
        if self._waiting and self._shown_at != self._newest:
            self._run.log(self._waiting.pop(0), commit=False)
            self._shown_at = self._newest

    def close(self) -> None:
        for shown in self._waiting:
            self._newest += 1
            self._run.log(shown, step=self._newest)
        self._run.finish()


class _Swanlab:
    name = "SwanLab"

    def __init__(self, run_dir: RunDir, resolved: ResolvedJob, *, project: str) -> None:
        import swanlab

        try:
            self._run = swanlab.init(
                project=project, name=resolved.run, id=resolved.run, resume="allow", log_dir=str(run_dir.path / "swanlab"),
                config=resolved.job.model_dump(mode="json"), reinit=True,
            )  # fmt: skip
        except (RuntimeError, ValueError, OSError) as error:
            hint = (
                "set SWANLAB_API_KEY in the environment of the cluster's nodes; or SWANLAB_MODE=offline, which keeps the run "
                f"in {run_dir.path / 'swanlab'}, from where `swanlab sync` sends it later"
            )
            raise DsrayError(f"logging.swanlab_project: SwanLab: {error}", hint=hint) from error

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({f"train/{key}": value for key, value in figures.items()}, step=step)

    def write_samples(self, step: int, samples: Sequence[SampleFile]) -> None:
        import swanlab

        for each in samples:  # of video it takes GIF only
            shown = (
                swanlab.Video(each.gif(), each.prompt) if each.is_clip else swanlab.Image(str(each.path), caption=each.prompt)
            )
            self._run.log({each.name: shown}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """Sends from a thread of its own: MLflow's client waits for its server, minutes where that is away."""

    name = "MLflow"

    def __init__(self, resolved: ResolvedJob, *, tracking_uri: str, say: Callable[[str], object]) -> None:
        # A server that is away is told in a minute, not in five; the user's own setting wins.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._error: type[Exception] = MlflowException
        self._say = say
        try:
            self._client = MlflowClient(tracking_uri=tracking_uri)
            self._run_id = self._find_or_create(resolved)
        except MlflowException as error:
            hint = "check that the server runs, and MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN on the nodes"
            raise DsrayError(f"logging.mlflow_tracking_uri: {tracking_uri}: {error}", hint=hint) from error
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        """Metrics of one step, samples of one step, or None: the end."""
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def _find_or_create(self, resolved: ResolvedJob) -> str:
        client, name = self._client, resolved.job.name
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        known = client.search_runs([experiment_id], filter_string=f"tags.dsray_run = '{resolved.run}'", max_results=1)
        if known:
            client.update_run(known[0].info.run_id, status="RUNNING")
            return str(known[0].info.run_id)
        run_id = str(client.create_run(experiment_id, run_name=resolved.run, tags={"dsray_run": resolved.run}).info.run_id)
        for section, keys in resolved.job.model_dump(mode="json").items():
            for key, value in (keys if isinstance(keys, dict) else {"": keys}).items():
                if value not in (None, [], {}):
                    client.log_param(run_id, f"{section}.{key}".rstrip("."), str(value)[:500])
        return run_id

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        when_ms = int(time.time() * 1000)
        self._waiting.put([Metric(f"train/{key}", value, when_ms, step) for key, value in figures.items()])

    def write_samples(self, step: int, samples: Sequence[SampleFile]) -> None:
        self._waiting.put((step, samples))

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join(_LAST_TRY_S)

    def _send_all(self) -> None:
        metrics: list[Any] = []
        samples: list[tuple[int, Sequence[SampleFile]]] = []
        is_open = True
        while is_open or metrics or samples:
            item = self._waiting.get() if is_open and not metrics and not samples else self._take_waiting()
            if item is _NOTHING and metrics:
                metrics = self._send(metrics)
            elif item is _NOTHING:
                # The figures before them went through: the server is there, and the files are tried once.
                self._send_samples(*samples.pop(0))
            elif item is None:
                is_open = False
            elif isinstance(item, tuple):
                samples.append(item)
            else:
                metrics += item
        self._client.set_terminated(self._run_id)

    def _take_waiting(self) -> Any:
        try:
            return self._waiting.get_nowait()
        except queue.Empty:
            return _NOTHING

    def _send(self, pending: list[Any]) -> list[Any]:
        """What could not be sent, to be tried again."""
        try:
            self._client.log_batch(self._run_id, metrics=pending[:_BATCH])
        except self._error:
            time.sleep(_RETRY_S)
            return pending
        return pending[_BATCH:]

    def _send_samples(self, step: int, samples: Sequence[SampleFile]) -> None:
        """Pictures beside the figures, with a slider over the steps; clips as artifacts, which its page plays."""
        try:
            for each in samples:
                if each.is_clip:
                    self._client.log_artifact(self._run_id, str(each.path), artifact_path=f"samples/step-{step}")
                else:
                    self._client.log_image(self._run_id, each.picture(), key=each.name, step=step)
        except Exception as error:  # noqa: BLE001  a boundary: no picture is worth the figures that follow
            self._say(f"warning: MLflow did not take the samples of step {step}: {type(error).__name__}: {error}")


_NOTHING = object()
"""The queue is empty; None ends it."""
