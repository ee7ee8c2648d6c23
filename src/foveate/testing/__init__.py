"""Seeded synthetic data with exact masks: images and volumes that are held, and slides that are too large for that."""

from foveate.testing.images import synthetic_image, write_dataset
from foveate.testing.organs import marked_volume, organ_volume
from foveate.testing.slides import write_slide

__all__ = ["marked_volume", "organ_volume", "synthetic_image", "write_dataset", "write_slide"]
