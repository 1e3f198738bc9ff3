"""The peak of computations in rounds, from a few of them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffsynth_ray.memory import peak as peak_module
from diffsynth_ray.memory.fake_pass import fake_weights
from diffsynth_ray.memory.peak import PeakBytes, peak_in_rounds
from diffsynth_ray.models.family import get_family

MODE = FakeTensorMode(allow_non_fake_inputs=True)


@pytest.fixture
def operators(monkeypatch):
    """Number of operators of every course that was run."""
    counts = []
    plain = peak_module._course

    def counted(call):
        course = plain(call)
        counts.append(len(course))
        return course

    monkeypatch.setattr(peak_module, "_course", counted)
    return counts


def whole_peak(build, num_rounds):
    call = build(num_rounds)
    with PeakBytes() as counter:
        call()
    return counter.peak


def chunked(before, inside, after):
    """Rounds of 1000 values each: so many copies of all values before them, of a round's own in each, of all results after."""

    def build(num_rounds):
        values = torch.zeros(num_rounds, 1000)

        def call():
            copies = [values + 1 for _ in range(before)]
            del copies
            results = []
            for number in range(num_rounds):
                working = [values[number] + 1 for _ in range(inside if number else 1)]
                results.append(working[0] * 2)
                del working
            return [torch.cat(results) for _ in range(after)]

        return call

    return build


@pytest.mark.parametrize("num_rounds", [1, 2, 11, 12, 40, 100])
@pytest.mark.parametrize(
    ("before", "inside", "after"),
    [pytest.param(1, 60, 1, id="rounds, then all before"), pytest.param(0, 60, 3, id="rounds, then all after"), (2, 3, 1)],
)
def test_whatever_is_largest_is_found(before, inside, after, num_rounds):
    build = chunked(before, inside, after)
    with MODE:
        assert peak_in_rounds(build, num_rounds) == whole_peak(build, num_rounds)


def test_what_does_not_go_in_rounds_is_run_as_a_whole():
    def build(num_rounds):
        values = torch.zeros(num_rounds, 1000)
        # One operator more before the rounds for each of them.
        return lambda: [torch.cat([value * 2 for value in [*values]]) for _ in range(3)]

    with MODE:
        assert peak_in_rounds(build, 40) == whole_peak(build, 40)


@pytest.mark.parametrize("variant", ["Wan 2.1", "Wan 2.2"])
def test_a_clip_of_any_length_is_encoded_in_a_dozen_rounds(variant, operators):
    family = get_family("wan")
    config = family.tiny_configs([])["vae"]
    if variant == "Wan 2.2":
        config = config | {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
    wan = family({"vae": family.build_component("vae", config)}, dtype=torch.float32, device="cpu")
    fake_weights(wan.component("vae"), MODE)

    def build(num_rounds):
        pixels = torch.zeros(1, 4 * num_rounds - 3, 32, 64, 3, dtype=torch.uint8)
        return lambda: wan.encode_image(pixels)

    with MODE, torch.no_grad():
        for num_rounds in (11, 12, 13, 26):
            assert peak_in_rounds(build, num_rounds) == whole_peak(build, num_rounds)
        operators.clear()
        peak_in_rounds(build, 11)
        at_most = sum(operators)
        operators.clear()
        peak_in_rounds(build, 1250)
        assert sum(operators) <= at_most + 20
