import pytest

from diffsynth_ray.config.origins import CONVERTED_REPO, Origin, parse_origin
from diffsynth_ray.errors import ModelError


@pytest.mark.parametrize(
    ("text", "repo", "pattern"),
    [
        ("Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors", "Qwen/Qwen-Image",
         "transformer/diffusion_pytorch_model*.safetensors"),
        ("Wan-AI/Wan2.1-T2V-1.3B:google/umt5-xxl/", "Wan-AI/Wan2.1-T2V-1.3B", "google/umt5-xxl/"),
        ("a/b:", "a/b", ""),
        ("a/b:./c.safetensors", "a/b", "c.safetensors"),
    ],
)  # fmt: skip
def test_an_entry_is_a_repository_and_a_pattern(text: str, repo: str, pattern: str) -> None:
    assert parse_origin(text) == Origin(repo, pattern)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Qwen/Qwen-Image", "a colon"),
        ("", "a colon"),
        ("Qwen-Image:vae/*.safetensors", "'Qwen-Image' is no repository"),
        ("https://modelscope.cn/Qwen/Qwen-Image:vae/", "is no repository"),
        ("Qwen/../x:vae/", "is no repository"),
        ("a/b:c:d", "'a/b:c' is no repository"),  # the last colon counts
        ("a/b:/etc/passwd", "inside the repository"),
        ("a/b:../c/x.safetensors", "inside the repository"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said(text: str, problem: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse_origin(text)
    assert problem in caught.value.message
    assert repr(text) in caught.value.message
    assert "as in" in caught.value.message


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("x*.safetensors", "x-00001-of-00002.safetensors", True),
        ("x*.safetensors", "high/x.safetensors", False),
        ("*.safetensors", "deep/x.safetensors", False),
        ("*/x.safetensors", "high/x.safetensors", True),
        ("tokenizer/", "tokenizer/vocab.json", True),
        ("tokenizer/", "tokenizer/deep/vocab.json", True),
        ("tokenizer/", "tokenizer", False),
        ("tokenizer/", "tokenizer_2/vocab.json", False),
        ("", "any/thing", True),
        ("X.safetensors", "x.safetensors", False),
    ],
)
def test_patterns_match_as_on_disk(pattern: str, path: str, matches: bool) -> None:
    assert Origin("a/b", pattern).matches(path) is matches


def test_wans_pickles_come_as_safetensors_first() -> None:
    vae = parse_origin("Wan-AI/Wan2.1-T2V-14B:Wan2.1_VAE.pth")
    assert vae.alternatives() == (Origin(CONVERTED_REPO, "Wan2.1_VAE.safetensors"), vae)
    other = parse_origin("Qwen/Qwen-Image:vae/model.pth")
    assert other.alternatives() == (other,)
