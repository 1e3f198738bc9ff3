"""Every kind of bad input through the command line: exit code 2 and a message that says where, what and what to do."""

import numpy
import pytest
from safetensors.numpy import save_file

from diffsynth_ray.cli import app

JOB = """
[dataset]
base_path = "{photos}"
metadata_path = "{photos}/metadata.csv"
max_pixels = 4096
[model]
family = "qwen_image"
tiny = true
[lora]
base_model = "dit"
[output]
path = "{output}"
"""


@pytest.fixture
def run(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.setenv("DSRAY_STATE_DIR", str(tmp_path / "state"))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "job.toml"
    path.write_text(JOB.format(photos=photos, output=tmp_path / "out"))

    def command(*overrides, command="submit"):
        arguments = [command, str(path)]
        for override in overrides:
            arguments += ["--set", override]
        code = app.main(arguments)
        return code, capsys.readouterr().err

    return command


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.learning_rat=1e-4", ["training.learning_rat", "did you mean training.learning_rate?"]),
        ('dataset.batch_size="four"', ["dataset.batch_size", '"four"', "valid integer"]),
        ("training.learning_rate=true", ["training.learning_rate", "got true"]),
        ("dataset.repeat=0", ["dataset.repeat", "greater than or equal to 1"]),
        ("dataset.metadata_path=/nowhere/metadata.csv", ["/nowhere/metadata.csv"]),
        ("dataset.base_path=/nowhere", ["/nowhere", "not a directory"]),
        ('dataset.data_file_keys=["picture"]', ["picture", "image"]),
        ("training.ema_decay=1.0", ["training.ema_decay", "less than 1"]),
        ('validation.inputs=["a.png"]', ["validation.inputs", "needs validation.prompts", "model.extra_inputs"]),
        ("distributed.num_workers=64", ["distributed.num_workers", "CPU", "at most"]),
        ("lora.base_model=", ["lora.base_model"]),
        ("training.optimizer=no_such_package.Adam", ["training.optimizer", "no package 'no_such_package' is installed here"]),
        ("training.optimizer=torch.optim.Adamw", ["training.optimizer", "did you mean torch.optim.AdamW?"]),
        ("model.family=qwen_imag", ["model.family", "did you mean 'qwen_image'?"]),
        ("lora.base_model=dti", ["lora.base_model", "no component 'dti'; it has dit", "did you mean 'dit'?"]),
        ('training.trainable_models=["unet"]', ["training.trainable_models", "no component 'unet'; it has dit"]),
        (
            'model.extra_inputs=["edit_imag"]',
            ["model.extra_inputs", "no extra input 'edit_imag'", "did you mean 'edit_image'"],
        ),
        ("model.options={zero_cond = true}", ["model.options", "no option 'zero_cond'", "it has zero_cond_t"]),
        ("dataset.data_file_keys=image,video", ["dataset.data_file_keys", 'an array is needed, as in ["image", "video"]']),
        ("validation.size=512,768", ["validation.size", "an array is needed, as in [512, 768]"]),
        ('model.id_with_origin_paths=["Qwen/Qwen-Image"]', ["model.id_with_origin_paths", "a colon", "as in"]),
    ],
)
def test_bad_input_is_exit_2_with_its_place_and_cure(run, override, expected):
    code, message = run(override)
    assert code == 2, message
    for text in expected:
        assert text in message
    assert "Traceback" not in message


def test_weights_that_do_not_exist_are_all_named(run):
    paths = 'model.paths=["/a/dit.safetensors", ["/b/1.safetensors"]]'
    code, message = run("model.tiny=false", paths, "model.tokenizer_path=/c")
    assert code == 2
    for path in ("/a/dit.safetensors", "/b/1.safetensors", "/c"):
        assert path in message


def test_an_output_path_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, message = run(f"output.path={tmp_path}/file/out")
    assert code == 2
    assert "output.path" in message
    assert "cannot be written" in message


def test_metadata_with_a_missing_photograph_names_row_and_file(run, tmp_path, photos):
    (tmp_path / "rows.csv").write_text("image,prompt\ncat.jpg,a cat\nunicorn.jpg,a unicorn\n")
    code, message = run(f"dataset.metadata_path={tmp_path}/rows.csv")
    assert code == 2
    assert "unicorn.jpg" in message
    assert "3" in message  # the line of the file


@pytest.mark.parametrize("command", ["plan", "submit"])
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (['model.paths=["{tiny}/vae/diffusion_pytorch_model.safetensors", "{tmp}/wan.safetensors"]'],
         ["wan.safetensors", "this is a dit of family wan, the job says qwen_image"]),
        (['model.paths=[["{dit}1-of-00002.safetensors", "{tmp}/wan.safetensors"]]'], ["model.paths", "2-of-00002"]),
        (['model.paths=[["{tiny}/vae/diffusion_pytorch_model.safetensors", "{dit}1-of-00002.safetensors",'
          ' "{dit}2-of-00002.safetensors"]]'], ["not shards of one component"]),
        (['model.paths=[["{dit}1-of-00002.safetensors", "{dit}2-of-00002.safetensors"]]',
          'lora.target_modules=["to_k", "to_kay"]'], ["lora.target_modules", "'to_kay'", "did you mean"]),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_told_before_a_cluster_starts(
    run, tmp_path, repository, monkeypatch, command, overrides, expected
):
    from diffsynth_ray.launch import client

    def no_cluster(*_, **__):
        raise AssertionError("a cluster is started")

    monkeypatch.setattr(client, "open_cluster", no_cluster)
    keys = ("blocks.0.self_attn.q.weight", "blocks.0.cross_attn.q.weight", "head.modulation")
    save_file({key: numpy.zeros((2, 2), numpy.float32) for key in keys}, tmp_path / "wan.safetensors")
    tiny = repository / "tests" / "assets" / "qwen_image_tiny"
    dit = tiny / "transformer" / "diffusion_pytorch_model-0000"
    filled = [override.format(tiny=tiny, tmp=tmp_path, dit=dit) for override in overrides]
    code, message = run("model.tiny=false", f"model.tokenizer_path={tiny}/tokenizer", *filled, command=command)
    assert code == 2, message
    for text in expected:
        assert text in message
    assert "Traceback" not in message
