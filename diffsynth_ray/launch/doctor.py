"""`dsray doctor`: checks of the cluster and of every node in parallel, as a Ray job that takes no resources.

The driver (`python -m` this module) runs on the head; each finding is a line of its log.
"""

from __future__ import annotations

import json
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth_ray.config.resolve import show_amounts
from diffsynth_ray.errors import ClusterError, last_line
from diffsynth_ray.launch.node_checks import (
    Finding,
    Request,
    check_node,
    compare_versions,
    versions,
    write_probe,
)
from diffsynth_ray.launch.visibility import named_paths

if TYPE_CHECKING:
    from diffsynth_ray.config.resolve import ResolvedJob
    from diffsynth_ray.launch.client import Cluster

_MARK, _PROGRESS = "finding ", "doing "
_NODE_TIMEOUT_S = 150.0
_GROUP_TIMEOUT_S = 20.0
_ALL_REDUCE_TIMEOUT_S = 120.0
_BYTES = {"nccl": 256 << 20, "gloo": 16 << 20}
_ROUNDS = 5
_SLOW_GB_S = 2.0
"""Below it, the gradients of a full training take longer than its computation on any recent GPU."""


def build_request(resolved: ResolvedJob | None) -> Request:
    """What a job needs to be looked at; without a job, what every cluster needs."""
    if resolved is None:
        return Request()
    job = resolved.job
    weights = [path for key, path in named_paths(resolved) if key != "dataset.base_path"]
    return Request(
        output_path=str(resolved.output_path),
        cache_path=job.split.cache_path if job.split.enabled else None,
        checkpoint_path=job.output.checkpoint_path,
        base_path=job.dataset.base_path,
        metadata_path=job.dataset.metadata_path,
        data_file_keys=list(job.dataset.data_file_keys),
        weights=weights,
        fp8=bool(job.model.fp8_models),
        num_workers=resolved.num_workers,
        resources_per_worker=resolved.resources_per_worker,
    )


def submit_checks(cluster: Cluster, request: Request) -> str:
    """Start the checks on the cluster; returns the id of their job."""
    from diffsynth_ray.launch import client

    submission_id = f"doctor-{secrets.token_hex(4)}"
    return client.submit_entrypoint(
        cluster,
        submission_id=submission_id,
        command=f"{shlex.quote(sys.executable)} -m diffsynth_ray.launch.doctor job.json",
        job_json=request.to_json(),
        metadata={"kind": "doctor"},
    )


def follow_checks(cluster: Cluster, submission_id: str, *, say: Callable[[str], None]) -> list[Finding]:
    """What the checks found, once they are through; raises ClusterError where the cluster goes away meanwhile."""
    from diffsynth_ray.launch import follow

    findings: list[Finding] = []
    other_lines: list[str] = []

    def on_line(line: str) -> None:
        if line.startswith(_MARK):
            findings.append(Finding(**json.loads(line.removeprefix(_MARK))))
        elif line.startswith(_PROGRESS):
            say(line.removeprefix(_PROGRESS))
        elif line.strip():
            other_lines.append(line)

    end = follow.follow(cluster, submission_id, on_line, say=say)
    if end.state != "SUCCEEDED":
        said = "\n".join(other_lines[-5:]) or end.message or end.state
        cure = f"install dsray on every node in the same place as here: {sys.executable} must exist (cluster/Dockerfile)"
        findings.append(Finding("nodes", "head", "failed", f"the checks ended early: {said}", cure))
    return findings


def _tell(finding: Finding) -> None:
    _write(_MARK + json.dumps(finding.as_dict()))


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: list[str]) -> int:
    """Entry point of the Ray job."""
    import ray

    request = Request.from_json(Path(arguments[0]).read_text())
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    nodes = [node for node in ray.nodes() if node["Alive"]]
    head = ray.get_runtime_context().get_node_id()
    nodes.sort(key=lambda node: node["NodeID"] != head)
    _write(f"{_PROGRESS}{len(nodes)} node(s): versions, storage, data, decoding, GPUs ...")
    probe = write_probe(request.output_path) if request.output_path and len(nodes) > 1 else None
    try:
        for finding in _on_every_node(nodes, request, probe):
            _tell(finding)
    finally:
        if probe is not None:
            Path(probe).unlink(missing_ok=True)
    for finding in _all_reduce(nodes, request):
        _tell(finding)
    return 0


def _look(request_json: str, where: str, ray_gpus: float, probe: str | None) -> tuple[dict[str, str], list[dict[str, str]]]:
    findings = check_node(Request.from_json(request_json), where=where, ray_gpus=ray_gpus, probe=probe)
    return versions(), [finding.as_dict() for finding in findings]


def _on_every_node(nodes: list[dict[str, Any]], request: Request, probe: str | None) -> Iterator[Finding]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    asked = {}
    for number, node in enumerate(nodes):
        where = node["NodeManagerAddress"] + (" (head)" if number == 0 else "")
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        gpus = node["Resources"].get("GPU", 0.0)
        seen = probe if number else None
        asked[where] = look.options(scheduling_strategy=here).remote(request.to_json(), where, gpus, seen)
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=_NODE_TIMEOUT_S)
    found: dict[str, dict[str, str]] = {}
    for where, reference in asked.items():
        try:
            found[where], findings = ray.get(reference, timeout=0.1)
        except (ray.exceptions.RayError, TimeoutError) as error:
            last = last_line(error)
            cure = "install dsray there as on the head (cluster/Dockerfile), and see that the node is not overloaded"
            yield Finding("nodes", where, "failed", last, cure)
            continue
        yield Finding("nodes", where, "ok", "runs tasks")
        yield from (Finding(**finding) for finding in findings)
    if found:
        yield from compare_versions(found)


def _all_reduce(nodes: list[dict[str, Any]], request: Request) -> Iterator[Finding]:
    from ray.util.placement_group import placement_group, remove_placement_group

    gpus = int(sum(node["Resources"].get("GPU", 0.0) for node in nodes))
    bundle = request.resources_per_worker or ({"GPU": 1.0} if gpus else {"CPU": 0.1})
    size = request.num_workers or (gpus if gpus else len(nodes))
    if size < 2:
        yield Finding("all_reduce", "cluster", "skipped", "one worker has nobody to speak to")
        return
    fitting = _fitting(nodes, bundle)
    if fitting < size:
        shape = show_amounts(bundle)
        cure = "lower distributed.num_workers or distributed.resources_per_worker, or add nodes"
        yield Finding("resources", "cluster", "failed", f"of {size} workers with {shape} only {fitting} fit the nodes", cure)
        yield Finding("all_reduce", "cluster", "skipped", "the workers do not fit")
        return
    backend = "nccl" if bundle.get("GPU", 0.0) >= 1 else "gloo"
    _write(f"{_PROGRESS}all-reduce of {_BYTES[backend] >> 20} MiB between {size} workers ({backend}) ...")
    group = placement_group([bundle] * size, strategy="PACK")
    if not group.wait(_GROUP_TIMEOUT_S):
        remove_placement_group(group)
        cure = "run it again when the cluster is idle; a job in the queue takes its place by itself"
        yield Finding("all_reduce", "cluster", "skipped", f"{size} workers are not free now", cure)
        return
    try:
        yield _measure(group, bundle, size=size, backend=backend)
    finally:
        remove_placement_group(group)


def _fitting(nodes: list[dict[str, Any]], bundle: dict[str, float]) -> int:
    """How many workers of this shape the nodes have room for when they are idle; a worker is never split over two."""
    asked = {name: amount for name, amount in bundle.items() if amount > 0}
    rooms = ([node["Resources"].get(name, 0.0) / amount for name, amount in asked.items()] for node in nodes)
    return sum(int(min(room, default=0.0) + 1e-6) for room in rooms)


def _measure(group: Any, bundle: dict[str, float], *, size: int, backend: str) -> Finding:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    member = ray.remote(_Member)
    extra = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
    members = [
        member.options(
            num_cpus=bundle.get("CPU", 0.0), num_gpus=bundle.get("GPU", 0.0), resources=extra,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        ).remote()
        for index in range(size)
    ]  # fmt: skip
    hosts = 0
    try:
        address, port = ray.get(members[0].address.remote(), timeout=_NODE_TIMEOUT_S)
        runs = [
            each.all_reduce.remote(rank, size, address, port, backend, _BYTES[backend]) for rank, each in enumerate(members)
        ]
        results = ray.get(runs, timeout=_ALL_REDUCE_TIMEOUT_S)
        hosts = len({host for host, _ in results})
        seconds = max(spent for _, spent in results)
    except (ray.exceptions.RayError, TimeoutError) as error:
        last = last_line(error)
        cure = "let the nodes reach each other on all ports; NCCL_DEBUG=INFO says more, NCCL_SOCKET_IFNAME picks the network"
        return Finding("all_reduce", "cluster", "failed", f"{size} workers, {backend}: {last}", cure)
    finally:
        for each in members:
            with suppress(ray.exceptions.RayError):
                ray.kill(each)
    # What each link carries: a ring sends 2 (n - 1) / n of the tensor.
    speed = 2 * (size - 1) / size * _BYTES[backend] / seconds / 1e9
    detail = f"{size} workers on {hosts} node(s), {backend}: {speed:.2f} GB/s"
    if backend == "nccl" and speed < _SLOW_GB_S:
        cure = "look for a faster network (NCCL_SOCKET_IFNAME, InfiniBand); a LoRA needs little of it, full training much"
        return Finding("all_reduce", "cluster", "warning", detail, cure)
    return Finding("all_reduce", "cluster", "ok", detail)


class _Member:
    """One worker of the all-reduce."""

    def address(self) -> tuple[str, int]:
        """Where the others find this one."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def all_reduce(self, rank: int, size: int, address: str, port: int, backend: str, num_bytes: int) -> tuple[str, float]:
        """This node's address and the seconds of one all-reduce. Raises RuntimeError where the sum is wrong."""
        import ray
        import torch
        import torch.distributed as dist

        device = "cuda" if backend == "nccl" else "cpu"
        store = dist.TCPStore(address, port, size, is_master=rank == 0)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        values = torch.full((num_bytes // 4,), float(rank + 1), device=device)
        dist.all_reduce(values)
        if values[0].item() != size * (size + 1) / 2:
            raise RuntimeError(f"rank {rank}: the sum of 1 to {size} came back as {values[0].item():g}")
        dist.barrier()
        started = time.monotonic()
        for _ in range(_ROUNDS):
            dist.all_reduce(values)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = (time.monotonic() - started) / _ROUNDS
        dist.destroy_process_group()
        return ray.util.get_node_ip_address(), seconds


def check_authentication(cluster: Cluster) -> Finding:
    """Whether the cluster wants a token of those who can reach it."""
    from dataclasses import replace

    if cluster.token is None:
        answer = "answers, and wants no token"
    else:
        try:
            replace(cluster, token=None).request("/api/jobs/")
            answer = "answers, and takes requests without the token too"
        except ClusterError:
            return Finding("cluster", "cluster", "ok", f"{cluster.url} answers and took the token")
    cure = "whoever reaches it can run code: set RAY_AUTH_MODE=token for head, nodes and clients, or keep it on the loopback"
    local = cluster.url.startswith(("http://127.", "http://localhost"))
    return Finding("cluster", "cluster", "ok" if local else "warning", f"{cluster.url} {answer}", "" if local else cure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
