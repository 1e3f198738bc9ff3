from types import SimpleNamespace

import pytest

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.errors import ClusterError
from diffsynth_ray.launch import doctor, follow
from diffsynth_ray.launch.client import Cluster, Ended
from diffsynth_ray.launch.node_checks import Finding


@pytest.mark.parametrize(
    ("nodes", "bundle", "fitting"),
    [
        ([{"CPU": 4}, {"CPU": 3}], {"CPU": 2}, 3),
        ([{"GPU": 8, "CPU": 4}], {"GPU": 1, "CPU": 1}, 4),
        ([{"CPU": 64}], {"GPU": 1, "CPU": 1}, 0),
        ([{"CPU": 0.3}], {"CPU": 0.1}, 3),
        ([{"CPU": 1}], {"CPU": 1, "GPU": 0}, 1),
    ],
)
def test_a_worker_is_never_split_over_two_nodes(nodes, bundle, fitting) -> None:
    assert doctor._fitting([{"Resources": node} for node in nodes], bundle) == fitting


def test_a_request_names_what_the_job_names(repository, monkeypatch) -> None:
    monkeypatch.chdir(repository)
    job = load_job("jobs/qwen_lora.toml", ['model.paths=["/a", ["/b", "/c"]]', "model.tokenizer_path=/tokenizer"])
    request = doctor.build_request(resolve(job, Resources(cpus=64, gpus=8)))
    assert request.weights == ["/a", "/b", "/c", "/tokenizer"]
    assert (request.num_workers, request.fp8, request.cache_path) == (8, False, None)
    assert request.output_path == str(repository / "outputs" / "qwen_lora")
    assert doctor.build_request(None).weights == []


def follow_lines(monkeypatch, lines, state):
    def fake(cluster, submission_id, on_line, *, say):
        for line in lines:
            on_line(line)
        return Ended(state, 0, "the message of Ray")

    monkeypatch.setattr(follow, "follow", fake)
    told = []
    return doctor.follow_checks(Cluster(url="http://x", token=None), "doctor-1", say=told.append), told


def test_findings_and_progress_come_from_the_log(monkeypatch) -> None:
    lines = ["noise", 'finding {"check": "shm", "where": "n", "state": "ok", "detail": "d", "cure": ""}', "doing more"]
    assert follow_lines(monkeypatch, lines, "SUCCEEDED") == ([Finding("shm", "n", "ok", "d")], ["more"])


def test_a_driver_that_does_not_start_is_a_finding_with_its_last_words(monkeypatch) -> None:
    (finding,), _ = follow_lines(monkeypatch, ["ModuleNotFoundError: No module named 'diffsynth_ray'"], "FAILED")
    assert (finding.check, finding.state) == ("nodes", "failed")
    assert "ModuleNotFoundError" in finding.detail
    assert "install dsray" in finding.cure
    (finding,), _ = follow_lines(monkeypatch, [], "FAILED")
    assert "the message of Ray" in finding.detail


@pytest.mark.parametrize(
    ("url", "token", "answers_without", "state"),
    [
        ("http://10.0.0.1:8265", "t", False, "ok"),
        ("http://10.0.0.1:8265", "t", True, "warning"),
        ("http://10.0.0.1:8265", None, True, "warning"),
        ("http://127.0.0.1:8265", None, True, "ok"),
    ],
)
def test_a_cluster_that_takes_everybody_is_a_warning(monkeypatch, url, token, answers_without, state) -> None:
    def request(self, path):
        if self.token is None and not answers_without:
            raise ClusterError("no")
        return SimpleNamespace()

    monkeypatch.setattr(Cluster, "request", request)
    finding = doctor.check_authentication(Cluster(url=url, token=token))
    assert (finding.state, bool(finding.cure)) == (state, state == "warning")
