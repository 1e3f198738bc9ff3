"""`dsray data check` from the command line; the decoding itself is tested in tests/ray."""

import json
import shutil

import pytest

from diffsynth_ray.cli import app
from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.errors import DataError
from diffsynth_ray.launch import client, data_check, follow
from diffsynth_ray.launch.data_check import REPORT_MARK, CheckReport, parse_report, report_of

JOB = """
[dataset]
base_path = "{photos}"
metadata_path = "{photos}/metadata.csv"
[model]
family = "qwen_image"
tiny = true
[lora]
base_model = "dit"
[output]
path = "{output}"
"""


def report(num_bad, *, bad_sample="error", limit=0.01):
    bad = [{"row": 3, "file": "/x/cat.jpg", "cause": "/x/cat.jpg: no such file"}][:num_bad]
    buckets = [{"height": 64, "width": 48, "num_frames": 1, "rows": 100}]
    return CheckReport(100, num_bad, bad_sample, limit, {"no such file": num_bad} if num_bad else {}, bad, buckets, 2.0)


@pytest.fixture
def check(tmp_path, photos, monkeypatch, capsys):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "job.toml"
    path.write_text(JOB.format(photos=photos, output=tmp_path / "out"))

    def command(*options):
        code = app.main(["data", "check", str(path), *options])
        out, err = capsys.readouterr()
        return code, out, err

    return command


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (report(0), 0),
        (report(1), 2),
        (report(1, bad_sample="skip"), 0),
        (report(2, bad_sample="skip"), 2),
        (report(2, bad_sample="skip", limit=0.02), 0),
    ],
)
def test_the_exit_code_says_whether_a_run_would_go_through(check, monkeypatch, found, code):
    monkeypatch.setattr(data_check, "check_locally", lambda resolved, say: found)
    assert check()[0] == code
    as_json = json.loads(check("--json")[1])
    assert (as_json["exit_code"], as_json["num_bad"]) == (code, found.num_bad)
    assert report_of(as_json) == found


def test_people_get_causes_rows_and_sizes(check, monkeypatch):
    monkeypatch.setattr(data_check, "check_locally", lambda resolved, say: report(2))
    out = check()[1]
    assert "100 rows decoded in 2.0 s (50.0 rows/s), 2 bad" in out
    assert "2 x no such file" in out
    assert "row 3: /x/cat.jpg: no such file" in out
    assert "... and 1 more" in out
    assert "64 x 48 x 1: 100" in out
    assert "would be ended by them" in out


def test_on_a_cluster_the_report_comes_with_the_log(check, monkeypatch):
    submitted = {}
    monkeypatch.setattr(client, "connect", lambda address: client.Cluster(url=address, token=None))
    monkeypatch.setattr(client, "cluster_resources", lambda cluster: client.Resources(cpus=8, gpus=0))
    monkeypatch.setattr(client, "submit_entrypoint", lambda cluster, **given: submitted.update(given))

    def lines(*log):
        def give(cluster, submission_id, on_line, say):
            for line in log:
                on_line(line)
            return client.Ended("SUCCEEDED", client.ExitCode.DONE)

        monkeypatch.setattr(follow, "follow", give)

    lines("decoding 100 rows", REPORT_MARK + json.dumps(report(1).as_dict()))
    code, out, err = check("--address", "http://head:8265")
    assert code == 2
    assert "cat.jpg" in out
    assert "decoding 100 rows" in err
    assert submitted["command"].endswith("-m diffsynth_ray.launch.data_check --job job.json")

    lines(REPORT_MARK + json.dumps({"error": "m.csv: the file is empty", "hint": None}))
    assert check("--address", "http://head:8265")[::2] == (2, "submitted " + submitted["submission_id"] + " to "
        "http://head:8265\nerror: m.csv: the file is empty\n")  # fmt: skip

    lines("killed")
    code, _, err = check("--address", "http://head:8265")
    assert code == 3
    assert "ended without a report" in err


def test_report_lines_are_told_from_others():
    assert parse_report("decoded 3 of 5 rows") is None
    with pytest.raises(DataError, match="empty"):
        parse_report(REPORT_MARK + '{"error": "the file is empty", "hint": null}')


def test_causes_are_grouped_without_names_and_numbers():
    kinds = {
        data_check._kind("/a/1.png: no such file", "/a/1.png"),
        data_check._kind("/a/2.png: no such file", "/a/2.png"),
    }
    assert kinds == {"no such file"}
    cause = "/a/1.png: a source of 200x9 pixels gets the target size 200x9"
    assert data_check._kind(cause, "/a/1.png") == "a source of NxN pixels gets the target size NxN"


def test_a_file_that_crashes_its_process_is_found_alone(monkeypatch):
    """Ray's tasks as plain calls: one that decodes row 7 ends its process."""
    rows = [data_check.MicroBatch(0, 16, 16, 1, (row,), (0,)) for row in range(20)]

    class Index:
        metadata = rows

        def path(self, row):
            return f"{row}.mp4"

    class Task:
        @staticmethod
        def remote(reference, micro_batches):
            return tuple(micro.rows[0] for micro in micro_batches)

    def get(task):
        if 7 in task:
            raise data_check.ray.exceptions.WorkerCrashedError
        return {3: "damaged"} if 3 in task else {}

    monkeypatch.setattr(data_check, "_problems_of", Task)
    monkeypatch.setattr(data_check, "_tasks", lambda index: iter([rows[:16], rows[16:]]))
    monkeypatch.setattr(data_check.ray, "put", lambda index: None)
    monkeypatch.setattr(data_check.ray, "cluster_resources", lambda: {"CPU": 1})
    monkeypatch.setattr(data_check.ray, "wait", lambda tasks, timeout: (tasks[:1], tasks[1:]))
    monkeypatch.setattr(data_check.ray, "get", get)
    assert data_check._decode_all(Index(), lambda line: None) == {
        3: "damaged",
        7: "7.mp4: decoding it crashes the process",
    }


def test_bad_rows_are_counted_under_no_size(monkeypatch, tmp_path, photos):
    """One that cannot be opened borrows the size of another row; one that is damaged further inside has its own."""
    shutil.copytree(photos, tmp_path, dirs_exist_ok=True)
    (tmp_path / "job.toml").write_text(JOB.format(photos=tmp_path, output=tmp_path / "out"))
    resolved = resolve(load_job(str(tmp_path / "job.toml"), ["dataset.max_pixels=16384"]), Resources(cpus=2, gpus=0))

    def decode_all(index, say):
        micros = [micro for task in data_check._tasks(index) for micro in task]
        return {micro.rows[0]: cause for micro in micros if (cause := index.problem(micro))}

    monkeypatch.setattr(data_check, "_decode_all", decode_all)
    whole = data_check.check_data(resolved, print)
    assert [bucket["rows"] for bucket in whole.buckets] == [1, 1, 3]
    (tmp_path / "astronaut.jpg").write_bytes(b"no picture")
    (tmp_path / "coffee.jpg").write_bytes((tmp_path / "coffee.jpg").read_bytes()[:5000])
    damaged = data_check.check_data(resolved, print)
    assert (whole.num_bad, damaged.num_bad) == (0, 2)
    assert damaged.buckets == [whole.buckets[1], whole.buckets[2] | {"rows": 2}]
    assert "size (height x width x frames) and rows that can be used" in damaged.lines()
