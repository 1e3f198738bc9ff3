"""A family in a package of its own, as pip would install it: a module and a dist-info on the path."""

import sys

import pytest
import torch

from diffsynth_ray.errors import ModelError
from diffsynth_ray.models import family as family_module
from diffsynth_ray.models.family import family_names, get_family

MODULE = """
from diffsynth_ray.models.qwen_image import QwenImage

class MyImage(QwenImage):
    name = "my_image"

NO_FAMILY = 3
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    def install_package(entries):
        (tmp_path / "my_family.py").write_text(MODULE)
        info = tmp_path / "my_family-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-family\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[diffsynth_ray.families]\n" + "\n".join(entries) + "\n")
        for name in family_names():  # a module registers its family once: not in the copy below, which goes with the test
            get_family(name)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(family_module, "_FAMILIES", dict(family_module._FAMILIES))
        monkeypatch.delitem(sys.modules, "my_family", raising=False)

    return install_package


def test_an_installed_package_brings_a_family(install):
    install(["my_image = my_family:MyImage"])
    assert "my_image" in family_names()
    tiny = get_family("my_image").build_tiny(0, components=["dit"], dtype=torch.float32)
    assert (tiny.name, type(tiny).__module__) == ("my_image", "my_family")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("my_image = my_family:Nothing", "package my-family cannot be imported"),
        ("my_image = my_family_2:MyImage", "package my-family cannot be imported"),
        ("my_image = my_family:NO_FAMILY", "is no ModelFamily of that name"),
        ("other = my_family:MyImage", "is no ModelFamily of that name"),
    ],
)
def test_a_package_that_is_wrong_is_named(install, entry, message):
    install([entry])
    with pytest.raises(ModelError, match=message):
        get_family(entry.partition(" ")[0])


def test_a_family_that_nobody_has():
    with pytest.raises(ModelError, match="known: flux, flux2, qwen_image, wan, z_image"):
        get_family("sd15")
