"""No token, key or password of a launch script gets into a job file, which people share."""

import pytest

from diffsynth_ray.cli import app

TRAINING = "accelerate launch examples/qwen_image/model_training/train.py --dataset_base_path data --lora_base_model dit"
MODEL = """ --model_paths '["a.safetensors"]' --output_path ./out"""


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        ("wandb login hunter2\n", "", "wandb login ***"),
        ("wandb login --relogin hunter2\n", "", "wandb login --relogin ***"),
        ("swanlab login -k hunter2\n", "", "swanlab login -k ***"),
        ("huggingface-cli login --token hunter2\n", "", "login --token ***"),
        ("modelscope download --model a/b --token=hunter2\n", "", "--token=***"),
        ("git clone https://me:hunter2@example.org/x\n", "", "https://***@example.org/x"),
        ("wget --header='Authorization: Bearer hunter2' https://example.org/x\n", "", "--header=***"),
        ("curl -H 'Authorization: Bearer hunter2' 'https://example.org/x?sig=1&X-Amz-Signature=hunter2'\n", "", "-H ***"),
        ("curl 'https://example.org/x?a=1&access_token=hunter2&b=2'\n", "", "access_token=***&b=2"),
        ("export PROXY=http://me:hunter2@example.org\n", "", "PROXY=http://***@example.org"),
        ("env WANDB_API_KEY=hunter2 nohup ", "", "WANDB_API_KEY is not copied"),
        ("# accelerate launch --api_key hunter2 train.py\n", "", "accelerate launch --api_key ***"),
        ("", " --api_key hunter2", "--api_key ***"),
    ],
)
def test_what_is_shown_of_a_secret(before, after, shown, tmp_path, capsys):
    script, job = tmp_path / "train.sh", tmp_path / "job.toml"
    script.write_text(before + TRAINING + MODEL + after + "\n")
    assert app.main(["import", str(script), "-o", str(job)]) == 0
    written, (out, err) = job.read_text(), capsys.readouterr()
    assert shown in " ".join(written.replace("\n#", " ").split())
    assert "hunter2" not in written + out + err


def test_variables_that_env_sets_count(tmp_path):
    script, job = tmp_path / "train.sh", tmp_path / "job.toml"
    script.write_text(f"env DIFFSYNTH_MODEL_BASE_PATH=/models {TRAINING}{MODEL}\n")
    assert app.main(["import", str(script), "-o", str(job)]) == 0
    assert 'base_path = "/models"' in job.read_text()
