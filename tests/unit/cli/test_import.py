"""`dsray import` as a command: where it writes, what it says, its exit code."""

import errno
import json
import os
from pathlib import Path

import pytest

from diffsynth_ray.cli import app
from diffsynth_ray.config.load import load_job
from diffsynth_ray.errors import ExitCode

SCRIPTS = Path(__file__).parents[2] / "assets" / "scripts"
LOCAL = """
accelerate launch examples/qwen_image/model_training/train.py --dataset_base_path data --dataset_metadata_path data/m.csv \\
  --model_paths '["dit.safetensors", "te.safetensors", "vae.safetensors"]' --tokenizer_path tok \\
  --lora_base_model dit --output_path "out/{name}"
"""


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DSRAY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        code = app.main(["import", *(str(each) for each in arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.sh"
    path.write_text(LOCAL.replace("{name}", "cats"))
    return path


def test_a_job_that_this_version_takes(run, script, tmp_path):
    code, out, err = run(script, "-o", "job.toml")
    assert (code, out) == (ExitCode.DONE, "job.toml\n"), err
    job = load_job("job.toml")
    assert (job.name, job.lora.base_model, job.model.paths[0]) == ("job", "dit", "dit.safetensors")
    assert "dsray plan job.toml" in err
    assert "no --lora_target_modules" in err


def test_without_an_output_the_job_goes_to_stdout(run, script, tmp_path):
    code, out, _ = run(script)
    assert code == 0
    (tmp_path / "x.toml").write_text(out)
    assert load_job("x.toml").name == "cats"


def test_several_jobs_need_a_folder(run, script):
    script.write_text(LOCAL.replace("{name}", "a") + LOCAL.replace("{name}", "b"))
    for arguments in ((script,), (script, "-o", "job.toml")):
        code, out, err = run(*arguments)
        assert (code, out) == (ExitCode.USAGE, "")
        assert "2 jobs" in err
        assert "-o" in err
    code, out, err = run(script, "-o", "jobs")
    assert (code, out) == (0, "jobs/1-a.toml\njobs/2-b.toml\n")
    assert "dsray submit jobs/1-a.toml jobs/2-b.toml" in err
    assert [load_job(path).name for path in out.split()] == ["1-a", "2-b"]


def test_nothing_is_overwritten_unasked(run, script, tmp_path):
    (tmp_path / "job.toml").write_text("mine")
    code, _, err = run(script, "-o", "job.toml")
    assert code == ExitCode.USAGE
    assert "--force" in err
    assert (tmp_path / "job.toml").read_text() == "mine"
    assert run(script, "-o", "job.toml", "--force")[0] == 0
    (tmp_path / "file").write_text("")
    assert "file is a file, not a folder" in run(script, "-o", "file/jobs")[2]


def test_a_full_disk_leaves_the_job_that_was_there(run, script, tmp_path, monkeypatch):
    (tmp_path / "job.toml").write_text("mine")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    code, out, err = run(script, "-o", "job.toml", "--force")
    assert (code, out) == (ExitCode.USAGE, "")
    assert "job.toml cannot be written: No space left on device" in err
    assert {path.name: path.read_text() for path in tmp_path.glob("*job*")} == {"job.toml": "mine"}


def test_a_file_name_that_no_job_can_have(run, script):
    assert run(script, "-o", "my job.toml")[0] == 0
    assert load_job("my job.toml").name == "cats"


def test_a_missing_family_is_named_and_the_job_written_all_the_same(run):
    code, out, err = run(SCRIPTS / "ltx2_audio.sh", "-o", "job.toml")
    assert (code, out) == (ExitCode.USAGE, "job.toml\n")
    assert "family ltx2 is not built" in err
    assert "dsray plan" not in err


def test_components_and_columns_that_the_family_does_not_have(run, script):
    script.write_text(script.read_text().replace("--lora_base_model dit", "--trainable_models vace --extra_inputs vace_video"))
    code, _, err = run(script, "-o", "job.toml")
    assert code == ExitCode.USAGE
    assert "family qwen_image has no component 'vace', it has dit" in err
    assert "vace_video" in err


def test_a_vace_script_is_taken(run, script):
    script.write_text(
        "accelerate launch examples/wanvideo/model_training/train.py --dataset_base_path data "
        '--dataset_metadata_path data/m.csv --data_file_keys "video,vace_video,vace_reference_image" --height 480 --width 832 '
        '--model_id_with_origin_paths "Wan-AI/Wan2.1-VACE-1.3B:diffusion_pytorch_model*.safetensors,'
        'Wan-AI/Wan2.1-VACE-1.3B:Wan2.1_VAE.pth" --remove_prefix_in_ckpt "pipe.vace." --lora_base_model vace --lora_rank 32 '
        '--lora_target_modules "q,k,v,o,ffn.0,ffn.2" --extra_inputs "vace_video,vace_reference_image" --output_path out\n'
    )
    code, _, err = run(script, "-o", "job.toml")
    assert code == ExitCode.DONE, err
    job = load_job("job.toml")
    assert (job.lora.base_model, job.model.extra_inputs) == ("vace", ["vace_video", "vace_reference_image"])
    assert job.dataset.data_file_keys == ["video", "vace_video", "vace_reference_image"]


def test_json_is_one_object(run, script):
    code, out, _ = run(SCRIPTS / "orphans.sh", "-o", "jobs", "--json")
    shown = json.loads(out)
    assert (code, shown["exit_code"], shown["jobs"]) == (2, 2, [])
    assert [each["place"] for each in shown["refused"]] == ["line 1", "line 3"]
    code, out, _ = run(script, "-o", "job.toml", "--json")
    (job,) = json.loads(out)["jobs"]
    assert (code, job["path"], job["family"], job["lines"], job["refused"]) == (0, "job.toml", "qwen_image", [2], [])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no such file"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
        (b"echo hello", "no training command"),
        (b"accelerate launch train.py --dataset_base_path 'x", "not closed"),
    ],
)
def test_bad_scripts(run, script, content, told):
    script.unlink()
    if content is not None:
        script.write_bytes(content)
    code, out, err = run(script, "-o", "job.toml")
    assert (code, out) == (ExitCode.USAGE, "")
    assert told in err


def test_a_folder_is_no_script(run, tmp_path):
    code, _, err = run(tmp_path, "-o", "job.toml")
    assert code == ExitCode.USAGE
    assert "cannot be read" in err


def test_a_bad_configuration_is_exit_2_and_nothing_is_written(run, script, tmp_path):
    (tmp_path / "c.yaml").write_text("num_processes: many")
    code, _, err = run(script, "--config_file", "c.yaml", "-o", "job.toml")
    assert code == ExitCode.USAGE
    assert "num_processes" in err
    assert not (tmp_path / "job.toml").exists()


def test_a_job_on_stdout_is_checked_too(run, tmp_path):
    path = tmp_path / "train.sh"
    path.write_text(LOCAL.replace("{name}", "cats").rstrip() + " --num_epochs 0 --height 512\n")
    code, out, err = run(path)
    assert (code, 'name = "cats"' in out) == (ExitCode.USAGE, True)
    assert "refused by this version: training.num_epochs: got 0" in err
    code, out, _ = run(path, "--json")
    (job,) = json.loads(out)["jobs"]
    assert (code, job["refused"][0]["key"], 'name = "cats"' in job["text"]) == (ExitCode.USAGE, "training.num_epochs", True)
