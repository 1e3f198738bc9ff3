"""`dsray doctor` without a cluster: order, exit codes, what is shown."""

import json

import pytest

from diffsynth_ray.cli import app
from diffsynth_ray.cli import doctor as command
from diffsynth_ray.errors import ExitCode
from diffsynth_ray.launch.node_checks import CHECKS, Finding


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DSRAY_STATE_DIR", str(tmp_path / "state"))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    def doctor(*arguments):
        code = app.main(["doctor", *(str(each) for each in arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return doctor


@pytest.fixture
def finds(monkeypatch):
    def have(*findings, code=ExitCode.DONE):
        monkeypatch.setattr(command, "_examine", lambda *arguments: (list(findings), code))

    return have


def test_a_cluster_that_does_not_answer_is_exit_3_and_the_job_is_checked_all_the_same(run):
    code, out, _ = run("no.toml", "--address", "http://127.0.0.1:9", "--json")
    shown = json.loads(out)
    assert (code, shown["exit_code"]) == (ExitCode.CLUSTER, ExitCode.CLUSTER)
    checks = {check["name"]: check for check in shown["checks"]}
    assert checks["cluster"]["state"] == checks["job"]["state"] == "failed"
    assert "does not answer" in checks["cluster"]["findings"][0]["detail"]
    assert checks["cluster"]["findings"][0]["cure"]
    assert "no such file" in checks["job"]["findings"][0]["detail"]
    assert checks["gpu"]["state"] == "skipped"


def test_all_checks_are_there_numbered_and_in_order(run, finds):
    finds(Finding("shm", "n1", "ok", "8 GiB"))
    code, out, _ = run("--json")
    checks = json.loads(out)["checks"]
    assert code == 0
    assert [(check["number"], check["name"]) for check in checks] == list(enumerate(CHECKS, start=1))


@pytest.mark.parametrize(
    ("states", "worst", "code"),
    [
        (["ok", "ok"], "ok", 0),
        (["ok", "warning"], "warning", 0),
        (["warning", "failed", "ok"], "failed", 1),
        (["skipped", "ok"], "ok", 0),
        (["skipped"], "skipped", 0),
    ],
)
def test_a_check_is_as_bad_as_its_worst_node(run, finds, states, worst, code):
    finds(*(Finding("gpu", f"n{number}", state, "d", "c") for number, state in enumerate(states)))
    shown = run("--json")
    check = next(each for each in json.loads(shown[1])["checks"] if each["name"] == "gpu")
    assert (check["state"], shown[0]) == (worst, code)


def test_equal_nodes_take_one_line_and_unequal_ones_a_line_each_with_the_cure(run, finds):
    finds(
        Finding("shm", "n1", "ok", "8 GiB"),
        Finding("shm", "n2", "ok", "8 GiB"),
        Finding("gpu", "n1", "ok", "8 x H100"),
        Finding("gpu", "n2", "failed", "none", "start Ray again"),
    )
    code, out, err = run()
    assert code == 1
    assert "11  ok      /dev/shm: 8 GiB, 2 nodes\n" in out
    assert "12  failed  GPUs\n            n1: ok: 8 x H100\n            n2: none\n            -> start Ray again\n" in out
    assert "1 failed, 1 ok, 12 skipped" in err
