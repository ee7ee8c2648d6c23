"""A plain dense ViT in timm's layout, written for the tests: images in, tokens out."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.nn.encoder import EncoderConfig


class PlainVit:
    """Run a state dict of timm's names on a dense image whose side is grid * patch size."""

    def __init__(self, state: dict[str, Tensor], config: EncoderConfig) -> None:
        self.state, self.config = state, config

    def linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Tokens [B, prefix + L, D] behind every block, the last one normed."""
        config, state = self.config, self.state
        conv = functional.conv2d if config.num_dims == 2 else functional.conv3d
        weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
        x = conv(images, weight, bias, stride=config.patch_size).flatten(2).transpose(1, 2)
        tokens = [state[name].expand(len(x), -1, -1) for name in ("cls_token", "reg_token") if name in state]
        if config.embed_prefix:
            x = torch.cat([*tokens, x], 1) + state["pos_embed"]
        else:
            x = torch.cat([*tokens, x + state["pos_embed"]], 1)
        outs = []
        for index in range(config.depth):
            x = x + self.attention(f"blocks.{index}", x)
            hidden = self.linear(f"blocks.{index}.mlp.fc1", self.norm(f"blocks.{index}.norm2", x))
            mlp = self.linear(f"blocks.{index}.mlp.fc2", functional.gelu(hidden))
            x = x + mlp * state.get(f"blocks.{index}.ls2.gamma", torch.ones(()))
            outs.append(x)
        return [*outs[:-1], self.norm("norm", x)]

    def attention(self, name: str, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.config.num_heads
        qkv = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x)).view(batch, length, 3, heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / (width // heads) ** 0.5).softmax(-1)
        out = self.linear(f"{name}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        return out * self.state.get(f"{name}.ls1.gamma", torch.ones(()))


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter but the code of place and size values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "geometry_embed" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + ("norm" in name))
