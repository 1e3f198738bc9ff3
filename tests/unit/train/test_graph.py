"""From a batch to what the model is given."""

import pytest
import torch

from diffsynth_ray.errors import ModelError
from diffsynth_ray.train.graph import extra_inputs


def test_a_clips_own_first_and_last_frame_stand_in_for_columns_that_are_not_there():
    pixels = torch.arange(2 * 5 * 3).reshape(2, 5, 1, 1, 3)
    given = {"vace_video": ("a", "b")}
    found = extra_inputs(given, pixels, ["input_image", "end_image", "vace_video"])
    assert found["vace_video"] == ("a", "b")
    for sample in range(2):
        ((first,), (last,)) = found["input_image"][sample], found["end_image"][sample]
        assert torch.equal(first, pixels[sample, :1])
        assert torch.equal(last, pixels[sample, 4:])
    with pytest.raises(ModelError, match="no column edit_image"):
        extra_inputs(given, pixels, ["input_image", "edit_image"])
