"""Tensors from files, in memory of their own or straight to where they are wanted."""

import pytest
import torch
from safetensors.torch import save_file

from diffsynth_ray.models.weight_source import FileWeights, SafetensorsFile


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"wide": torch.arange(6.0).reshape(2, 3), "narrow": torch.arange(6.0).reshape(2, 3).bfloat16()}, path)
    return path


def weights(path, memory_tensors=None):
    keys = {"wide": (path, "wide"), "narrow": (path, "narrow")}
    return FileWeights(keys, {}, memory_tensors=memory_tensors or (lambda key, tensor: {key: tensor}), dtype=torch.float32)


def test_a_tensor_is_read_into_memory_of_its_kind(file):
    into = torch.full((2, 3), torch.nan)
    found = weights(file).read("wide", into)
    assert found.data_ptr() == into.data_ptr()
    assert torch.equal(into, torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    "into",
    [
        torch.full((2, 3), -1.0),  # another number format in the file
        torch.full((7,), -1.0, dtype=torch.bfloat16),
        torch.full((3, 2), -1.0, dtype=torch.bfloat16).T,
    ],
)
def test_other_memory_is_left_alone(file, into):
    found = weights(file).read("narrow", into)
    assert torch.equal(found, torch.arange(6.0).reshape(2, 3))
    assert found.dtype == torch.float32
    assert (into == -1).all()


def test_a_layout_that_differs_in_memory_is_no_alias(file):
    into = torch.empty(2, 3)
    found = weights(file, lambda key, tensor: {key: tensor.flip(0)[:, :2].T, "rest": tensor}).read("wide", into)
    assert found.untyped_storage().data_ptr() != into.untyped_storage().data_ptr()
    turned = weights(file, lambda key, tensor: {key: tensor.reshape(3, 2).T}).read("wide", into)
    expected = torch.arange(6.0).reshape(3, 2).T
    assert torch.equal(into.copy_(turned), expected)


def test_a_file_that_ends_early_is_an_error(file):
    reader = SafetensorsFile(file)
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 4)
    with pytest.raises(OSError, match="ends inside"):
        [reader.read(key, torch.empty(2, 3)) for key in ("wide", "narrow")]
