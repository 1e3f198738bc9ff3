from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.launch.node_checks import write_probe
from diffsynth_ray.launch.visibility import find_invisible, named_paths, shared_folders


def test_every_path_that_workers_read_is_asked_for(repository, monkeypatch) -> None:
    monkeypatch.chdir(repository)
    overrides = [
        'model.paths=["/a.safetensors", ["/b1.safetensors", "/b2.safetensors"]]',
        "model.tokenizer_path=/tokenizer",
        'lora.preset_path=["/p1.safetensors", "/p2.safetensors"]',
    ]
    named = named_paths(resolve(load_job("jobs/qwen_lora.toml", overrides), Resources(cpus=64, gpus=8)))
    keys = [key for key, _ in named]
    assert keys.count("model.paths") == 3
    assert keys.count("lora.preset_path") == 2
    assert set(keys) == {"model.paths", "dataset.base_path", "model.tokenizer_path", "lora.preset_path"}


def test_what_is_not_seen_is_named_with_its_key(tmp_path) -> None:
    (tmp_path / "here").mkdir()
    probe = write_probe(str(tmp_path / "out"))
    probes = {"output.path": probe, "split.cache_path": f"{probe}-of-another"}
    assert find_invisible([("dataset.base_path", str(tmp_path / "here"))], {"output.path": probe}) == []
    gone = find_invisible([("dataset.base_path", "/gone"), ("lora.checkpoint", str(tmp_path / "here"))], probes)
    assert gone == [
        "dataset.base_path: /gone is not there or cannot be read",
        f"split.cache_path: what the driver wrote to {tmp_path} is not seen",
    ]


def test_the_cache_of_split_training_must_be_shared_too(repository, monkeypatch) -> None:
    monkeypatch.chdir(repository)

    def folders(*overrides):
        return dict(shared_folders(resolve(load_job("jobs/qwen_lora.toml", list(overrides)), Resources(cpus=64, gpus=8))))

    assert set(folders()) == {"output.path"}
    assert folders("split.enabled=true", "split.cache_path=/cache")["split.cache_path"] == "/cache"
    assert set(folders("split.enabled=true", "split.cache_path=s3://bucket/cache")) == {"output.path"}
