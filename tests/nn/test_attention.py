"""Packed attention: equal to dense attention image by image, and blind to company."""

import pytest
import torch
from torch.nn import functional

from foveate.errors import ConfigError, ShapeError
from foveate.nn.attention import Attention, Packing, attend


def qkv(total: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(total, 2, 8, generator=generator) for _ in range(3)]


def test_pack_equals_dense_mask() -> None:
    lengths = (5, 1, 9)
    q, k, v = qkv(15)
    image = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    same = image[:, None] == image[None, :]
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    dense = functional.scaled_dot_product_attention(*heads, attn_mask=same)[0].transpose(0, 1)
    torch.testing.assert_close(attend(q, k, v, Packing(lengths)), dense, rtol=1e-5, atol=1e-6)


def test_an_image_has_the_same_bits_in_any_company() -> None:
    q, k, v = qkv(300)
    alone = attend(q[100:], k[100:], v[100:], Packing((200,)))
    assert torch.equal(attend(q, k, v, Packing((100, 200)))[100:], alone)


def test_queries_of_one_pack_read_another() -> None:
    q, (_, k, v) = qkv(6)[0], qkv(9, seed=1)
    out = attend(q, k, v, Packing((4, 2)), Packing((9, 0)))
    heads = (x.transpose(0, 1)[None] for x in (q[:4], k, v))
    expected = functional.scaled_dot_product_attention(*heads)[0].transpose(0, 1)
    torch.testing.assert_close(out[:4], expected)
    assert not out[4:].any()  # an image without keys gets nothing
    with pytest.raises(ShapeError, match="queries of 2 images, keys of 1"):
        attend(q, k, v, Packing((4, 2)), Packing((9,)))


def test_padding_is_never_data() -> None:
    """The pack takes no padding at all; a mask over padding gives the same answer."""
    lengths = (5, 1, 9)
    parts = qkv(15)
    padded = [torch.nn.utils.rnn.pad_sequence(list(x.split(list(lengths))), batch_first=True) for x in parts]
    valid = torch.arange(9) < torch.tensor(lengths)[:, None]
    for x in padded:
        x[~valid] = 1e4
    heads = (x.transpose(1, 2) for x in padded)
    out = functional.scaled_dot_product_attention(*heads, attn_mask=valid[:, None, None, :]).transpose(1, 2)
    torch.testing.assert_close(attend(*parts, Packing(lengths)), out[valid], rtol=1e-5, atol=1e-6)


def test_gradient_stays_within_an_image() -> None:
    parts = [x.requires_grad_() for x in qkv(15)]
    attend(*parts, Packing((5, 1, 9)))[:5].square().sum().backward()
    for x in parts:
        assert x.grad is not None
        assert not x.grad[5:].any()
        assert x.grad[:5].any()


def test_packing_offsets() -> None:
    packing = Packing((3, 0, 4))
    assert packing.cu_seqlens.tolist() == [0, 3, 3, 7]
    assert packing.max_length == 4


def test_lengths_must_add_up() -> None:
    q, k, v = qkv(4)
    with pytest.raises(ShapeError, match=r"lengths \(3,\) sum to 3, not to 4 tokens"):
        attend(q, k, v, Packing((3,)))


def test_heads_must_divide_width() -> None:
    with pytest.raises(ConfigError, match="num_heads=3 must divide width=16"):
        Attention(16, 3)
