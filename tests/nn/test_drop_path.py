"""Stochastic depth drops whole images, keeps the mean, and is nothing in evaluation or at rate 0."""

import pytest
import torch

from foveate.errors import ConfigError
from foveate.nn.attention import Packing
from foveate.nn.drop_path import DropPath
from foveate.nn.encoder import Encoder, EncoderConfig

PACKING = Packing((3, 5, 2) * 200)


def test_whole_images_are_dropped_and_the_mean_stays() -> None:
    torch.manual_seed(0)
    x = torch.ones(sum(PACKING.lengths), 4)
    out = DropPath(0.25)(x, PACKING)
    images = out.split(list(PACKING.lengths))
    assert all(len(image.unique()) == 1 for image in images)
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert sum(float(image[0, 0]) for image in images) / len(images) == pytest.approx(1, abs=0.06)


def test_nothing_is_dropped_in_evaluation_or_at_rate_0() -> None:
    x = torch.randn(sum(PACKING.lengths), 4)
    assert DropPath(0.0)(x, PACKING) is x
    assert DropPath(0.9).eval()(x, PACKING) is x
    with pytest.raises(ConfigError, match=r"drop_path=1\.0 is outside 0 up to below 1; 0\.1 is usual"):
        DropPath(1.0)


def test_rates_rise_evenly_over_the_blocks() -> None:
    encoder = Encoder(EncoderConfig(width=32, depth=4, num_heads=2, drop_path=0.2))
    assert [block.drop_path.rate for block in encoder.blocks] == pytest.approx([0, 0.2 / 3, 0.4 / 3, 0.2])
    assert set(encoder.state_dict()) == set(Encoder(EncoderConfig(width=32, depth=4, num_heads=2)).state_dict())
