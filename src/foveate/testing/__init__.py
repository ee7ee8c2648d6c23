"""Seeded synthetic data with exact masks: images that are held, and slides that are too large for that."""

from foveate.testing.images import synthetic_image, write_dataset
from foveate.testing.slides import write_slide

__all__ = ["synthetic_image", "write_dataset", "write_slide"]
