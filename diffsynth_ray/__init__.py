"""Ray-distributed training of image and video diffusion models. Command: ``dsray``."""

__version__ = "0.1.0"
