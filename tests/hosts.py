"""Segmenters of other people, tiny, that a dense ViT carries: images in, logits of every pixel out."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, DEPTH, HEADS, SIDE, PATCH = 32, 4, 2, 32, 4


class Grid(nn.Module):
    """A backbone and one linear map from tokens to pixels.

    Args:
        backbone: the dense ViT.
        tokens: its patch tokens for a batch of images, ``[B, L, D]``.
    """

    def __init__(self, backbone: nn.Module, tokens: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.backbone, self.tokens = backbone, tokens
        self.head = nn.Linear(WIDTH, 2 * PATCH**2)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.tokens(self.backbone, x)).transpose(1, 2).unflatten(2, (SIDE // PATCH, -1))
        return nn.functional.pixel_shuffle(logits, PATCH)


class Plain(nn.Module):
    """Patches, positions, ``torch.nn.TransformerEncoder``."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.place = nn.Parameter(torch.randn((SIDE // PATCH) ** 2, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, norm_first=True, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        out: Tensor = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return out


def monai_unetr(num_dims: int) -> nn.Module:
    from monai.networks.nets import UNETR

    size = {2: 96, 3: 48}[num_dims]
    return UNETR(
        in_channels=1, out_channels=2, img_size=(size,) * num_dims, feature_size=4, hidden_size=WIDTH, mlp_dim=64,
        num_heads=HEADS, spatial_dims=num_dims,
    )  # fmt: skip


def timm_vit(timm: ModuleType, **changes: Any) -> nn.Module:
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0, **changes
    )
    return Grid(vit, lambda net, x: net.forward_features(x)[:, net.num_prefix_tokens :])


def timm_eva(timm: ModuleType, **changes: Any) -> nn.Module:
    vit = timm.models.eva.Eva(
        img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0,
        use_rot_pos_emb=True, **changes,
    )  # fmt: skip
    return Grid(vit, lambda net, x: net.forward_features(x)[:, net.num_prefix_tokens :])


def hugging(kind: str) -> nn.Module:
    import transformers

    numbers = {
        "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 64,
        "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    if kind == "vit":
        net = transformers.ViTModel(transformers.ViTConfig(**numbers), add_pooling_layer=False)
        return Grid(net, lambda net, x: net(x).last_hidden_state[:, 1:])
    if kind == "dinov2":
        net = transformers.Dinov2Model(transformers.Dinov2Config(**numbers, mlp_ratio=2))
        return Grid(net, lambda net, x: net(x).last_hidden_state[:, 1:])
    if kind == "dinov3":
        net = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**numbers, num_register_tokens=2))
        return Grid(net, lambda net, x: net(x).last_hidden_state[:, 3:])
    return Dpt(transformers, numbers)


class Dpt(nn.Module):
    """transformers' own segmenter, its logits alone."""

    def __init__(self, transformers: ModuleType, numbers: dict[str, int]) -> None:
        super().__init__()
        config = transformers.DPTConfig(
            **numbers, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
            num_labels=2, use_auxiliary_head=False, readout_type="ignore",
        )  # fmt: skip
        self.net = transformers.DPTForSemanticSegmentation(config)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x).logits
        return out


NAMES = [
    "unetr2d", "unetr3d", "timm", "timm_registers", "eva", "eva_mixed", "vit", "dinov2", "dinov3", "dpt", "torch",
    "torch_sequence_first",
]  # fmt: skip


def host(name: str, timm: ModuleType) -> tuple[nn.Module, Tensor]:
    """A dense segmenter with random weights, in evaluation, and two images."""
    torch.manual_seed(0)
    made = {
        "unetr2d": lambda: monai_unetr(2),
        "unetr3d": lambda: monai_unetr(3),
        "timm": lambda: timm_vit(timm),
        "timm_registers": lambda: timm_vit(timm, reg_tokens=2, init_values=0.5),
        "eva": lambda: timm_eva(timm),
        "eva_mixed": lambda: timm_eva(timm, rope_type="mixed"),
        "torch": lambda: Grid(Plain(), lambda net, x: net(x)),
        "torch_sequence_first": lambda: Grid(Plain(batch_first=False), lambda net, x: net(x)),
    }
    model = made[name]() if name in made else hugging(name)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(std=0.15)
    shape = {"unetr2d": (1, 96, 96), "unetr3d": (1, 48, 48, 48)}.get(name, (3, SIDE, SIDE))
    return model.eval(), torch.randn(2, *shape)
