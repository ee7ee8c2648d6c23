"""Patches to vectors, each patch by itself: small networks of our own, ResNets, stored features, other libraries'.

Legend: R patches, C channels, P side, F features, D width, L tokens of a patch.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from foveate.errors import ConfigError, FormatError, MissingExtraError, ShapeError
from foveate.nn.attention import Packing
from foveate.nn.encoder import Block
from foveate.nn.resnet import DEPTHS, ResNet
from foveate.nn.weights import read_state

NORMS = ("group", "batch")
_FEATURE_ROWS = 256  # normed at a time, so that what the norm gives stays in the cache
_NAMES = ("cnn", "vit", *(f"resnet{depth}" for depth in DEPTHS), "features", "timm:NAME")


def group_norm(chans: int) -> nn.Module:
    """A norm that knows one patch alone: groups of 16 channels."""
    return nn.GroupNorm(max(1, chans // 16), chans)


class PatchEncoder(nn.Module):
    """A network on single patches, parts of which may be frozen, and a linear map to the width of the model.

    Args:
        net: ``[R, C, P, P]`` or ``[R, F]`` to ``[R, net.width]``; its ``parts()`` are what can be frozen, from the
            input to the output.
        width: D; None: that of ``net``, without a linear map.
        mean: taken from every channel first; none: nothing is.
        std: what every channel is divided by then.
    """

    def __init__(
        self, net: nn.Module, width: int | None = None, mean: Sequence[float] = (), std: Sequence[float] = ()
    ) -> None:
        super().__init__()
        inner = int(getattr(net, "width"))  # noqa: B009
        if len(mean) != len(std):
            raise ConfigError(f"mean={tuple(mean)} and std={tuple(std)}: give both, one number per channel")
        self.net = net
        self.width = inner if width is None else width
        self.proj = nn.Identity() if self.width == inner else nn.Linear(inner, self.width)
        self.num_frozen = 0
        """Parts that are frozen, from the input on; see ``freeze``."""
        self._mean, self._std = tuple(mean), tuple(std)

    def forward(self, x: Float[Tensor, "R *rest"]) -> Float[Tensor, "R D"]:
        """One vector per patch."""
        if self._mean:
            per_channel = (-1, *(1,) * (x.ndim - 2))
            x = (x - x.new_tensor(self._mean).view(per_channel)) / x.new_tensor(self._std).view(per_channel)
        out: Tensor = self.proj(self.net(x))
        return out

    def parts(self) -> list[nn.Module]:
        """What can be frozen, from the input to the output."""
        found: list[nn.Module] = self.net.parts()  # type: ignore[operator]
        return found

    def train(self, mode: bool = True) -> "PatchEncoder":
        """As usual, but frozen parts stay in evaluation mode, so that their statistics and dropout stay still."""
        super().train(mode)
        for part in self.parts()[: self.num_frozen]:
            part.eval()
        return self


def freeze(encoder: PatchEncoder, last_blocks: int | None = 0) -> PatchEncoder:
    """Stop the training of an encoder, all but its end. The linear map behind the network is always trained.

    Args:
        encoder: changed in place, and returned.
        last_blocks: how many of the last parts are trained; 0: the network is frozen; None: everything is trained.

    Raises:
        ConfigError: a negative number.

    **Differs** from the released code, which puts every module into training mode behind each selection: frozen batch
    norms keep their statistics here.
    """
    parts = encoder.parts()
    if last_blocks is not None and last_blocks < 0:
        raise ConfigError(f"last_blocks={last_blocks} is negative; 0 freezes all, None trains all")
    frozen = 0 if last_blocks is None else max(0, len(parts) - last_blocks)
    encoder.num_frozen = frozen
    encoder.net.requires_grad_(frozen < len(parts))
    for part in parts[:frozen]:
        part.requires_grad_(False)
    encoder.train(encoder.training)
    return encoder


def uses_batch_statistics(encoder: nn.Module) -> bool:
    """Whether a vector depends on the other patches of the call, as long as the encoder is in its present mode."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training for part in encoder.modules())


class SmallCNN(nn.Module):
    """Three convolutions, each with norm, ReLU and a maximum over 2 x 2, then the mean over the patch."""

    def __init__(
        self, in_chans: int, norm: Callable[[int], nn.Module], channels: Sequence[int] = (32, 64, 128)
    ) -> None:
        super().__init__()
        sides = zip((in_chans, *channels[:-1]), channels, strict=True)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(low, high, 3, padding=1, bias=False),
                    norm(high),
                    nn.ReLU(),
                    nn.MaxPool2d(2, ceil_mode=True),
                )
                for low, high in sides
            )
        )
        self.width = channels[-1]

    def forward(self, x: Float[Tensor, "R C P P"]) -> Float[Tensor, "R F"]:
        """Features of every patch."""
        return torch.mean(self.blocks(x), dim=(2, 3))

    def parts(self) -> list[nn.Module]:
        """The three blocks."""
        return list(self.blocks.children())


class SmallViT(nn.Module):
    """A ViT within a patch: cells of the patch are its tokens, their mean is the patch.

    Args:
        in_chans: C.
        patch_size: P.
        cell: side of a cell; divides P.
        width: F.
        depth: number of blocks.
        num_heads: divides F.
    """

    def __init__(self, in_chans: int, patch_size: int, cell: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        if patch_size % cell:
            raise ConfigError(f"cell={cell} must divide patch_size={patch_size}; change one of them")
        self.width, self.patch_size = width, patch_size
        self.num_tokens = (patch_size // cell) ** 2
        self.patch_embed = nn.Conv2d(in_chans, width, cell, stride=cell)
        self.pos_embed = nn.Parameter(torch.empty(self.num_tokens, width).normal_(std=0.02))
        self.blocks = nn.ModuleList(Block(width, num_heads, 4.0, None) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Float[Tensor, "R C P P"]) -> Float[Tensor, "R F"]:
        """Features of every patch.

        Raises:
            ShapeError: patches of another side.
        """
        if x.shape[2:] != (self.patch_size, self.patch_size):
            raise ShapeError(
                f"patches of {tuple(x.shape[2:])} for an encoder of patch_size={self.patch_size}; cut patches of "
                "that side or change patch_size"
            )
        tokens = (self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed).flatten(0, 1)
        packing = Packing((self.num_tokens,) * len(x), x.device)
        for block in self.blocks:
            tokens = block(tokens, packing)
        out: Tensor = self.norm(tokens).unflatten(0, (len(x), self.num_tokens)).mean(1)
        return out

    def parts(self) -> list[nn.Module]:
        """The projection, then the blocks."""
        return [self.patch_embed, *self.blocks]


class FeatureProjector(nn.Module):
    """Stored features to the width of the model: norm, linear map, norm, ReLU.

    Args:
        in_chans: F.
        width: D.
        norm: ``batch`` (published) or ``group``, which stands for a layer norm here and knows one vector alone.
    """

    def __init__(self, in_chans: int, width: int, norm: str = "group") -> None:
        super().__init__()
        self.in_chans, self.width = in_chans, width
        last = nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width)
        self.layers = nn.Sequential(
            nn.LayerNorm(in_chans, elementwise_affine=False), nn.Linear(in_chans, width), last, nn.ReLU()
        )

    def forward(self, x: Float[Tensor, "R *rest"]) -> Float[Tensor, "R D"]:
        """Project every vector.

        Raises:
            ShapeError: features of another width.
        """
        wanted = self.in_chans
        if x.ndim != 2 or x.shape[1] != wanted:
            raise ShapeError(
                f"patches of {tuple(x.shape[1:])} for a model of {wanted} features; give features [N, {wanted}]"
            )
        *_, last, relu = self.layers
        rows = [self.mapped(part) for part in x.split(_FEATURE_ROWS)]
        out: Tensor = relu(last(rows[0] if len(rows) == 1 else torch.cat(rows)))
        return out

    def mapped(self, x: Shaped[Tensor, "R F"]) -> Float[Tensor, "R D"]:
        """The first norm and the linear map."""
        norm, linear, *_ = self.layers
        assert isinstance(linear, nn.Linear)
        out: Tensor = linear(norm(x.to(linear.weight.dtype)))
        return out

    def parts(self) -> list[nn.Module]:
        """One: all of it."""
        return [self.layers]


class ForeignNet(nn.Module):
    """Any module that takes patches to one vector each: timm's, transformers', your own.

    Args:
        module: gives ``[R, F]``, or transformers' output, of which the pooled state or the first token is taken.
        width: F; None: the module's ``num_features`` or ``config.hidden_size``.

    Raises:
        ConfigError: the module does not say its width.
    """

    def __init__(self, module: nn.Module, width: int | None = None) -> None:
        super().__init__()
        self.module = module
        told = width or getattr(module, "num_features", None)
        told = told or getattr(getattr(module, "config", None), "hidden_size", None)
        if not isinstance(told, int):
            raise ConfigError(f"{type(module).__name__} does not say how many features it gives; give width")
        self.width = told

    def forward(self, x: Float[Tensor, "R C P P"]) -> Float[Tensor, "R F"]:
        """Features of every patch."""
        out: Any = self.module(x)
        if isinstance(out, Tensor):
            return out
        pooled = getattr(out, "pooler_output", None)
        found: Tensor = out.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
        return found

    def parts(self) -> list[nn.Module]:
        """Its children, lists and sequences of them taken apart."""
        parts: list[nn.Module] = []
        for child in self.module.children():
            parts.extend(child.children() if isinstance(child, nn.Sequential | nn.ModuleList) else [child])
        return parts


def create_patch_encoder(
    name: str,
    in_chans: int = 3,
    *,
    width: int | None = None,
    patch_size: int = 64,
    norm: str = "group",
    stages: int = 4,
    depth: int = 12,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> PatchEncoder:
    """Build an encoder of patches with fresh weights.

    Args:
        name: ``cnn``, ``vit``, ``resnet18``, ``resnet34``, ``resnet50``, ``features``, or ``timm:NAME``.
        in_chans: C, or F for ``features``.
        width: D of the result; default the network's own (``features``: 128).
        patch_size: P, which ``vit`` alone must know.
        norm: ``group`` (knows one patch alone) or ``batch`` (published). With ``batch``, the patches are ranked with
            running statistics but trained with those of the batch; the running ones come from chosen patches alone.
        stages: residual stages of a ResNet.
        depth: blocks of ``vit``.
        mean: taken from every channel first.
        std: what every channel is divided by then.

    Raises:
        ConfigError: an unknown name or norm, or numbers that do not fit.
        MissingExtraError: timm is asked for and not installed.
    """
    if norm not in NORMS:
        raise ConfigError(f"norm={norm!r} is none of {', '.join(NORMS)}; choose one")
    if not 1 <= stages <= 4:
        raise ConfigError(f"stages={stages}: a ResNet has 1 to 4; 2 suits patches of about 50 pixels")
    make = group_norm if norm == "group" else nn.BatchNorm2d
    net: nn.Module
    if name == "cnn":
        net = SmallCNN(in_chans, make)
    elif name == "vit":
        net = SmallViT(in_chans, patch_size, max(patch_size // 8, 1), 192, depth, 3)
    elif name.startswith("resnet") and name[6:].isdigit() and int(name[6:]) in DEPTHS:
        net = ResNet(int(name[6:]), in_chans, stages, make)
    elif name == "features":
        net = FeatureProjector(in_chans, width or 128, norm)
    elif name.startswith("timm:"):
        net = ForeignNet(_timm(name[5:], in_chans))
    else:
        raise ConfigError(f"encoder={name!r} is none of {', '.join(_NAMES)}; choose one")
    return PatchEncoder(net, width, mean, std)


def _timm(name: str, in_chans: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise MissingExtraError(f"encoder='timm:{name}' needs timm: pip install foveate[timm]") from None
    try:
        module: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, in_chans=in_chans)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"timm builds no {name!r} ({' '.join(str(error).split())[:120]}); see timm.list_models()"
        ) from None
    return module


def load_patch_weights(encoder: PatchEncoder, path: str | Path) -> None:
    """Fill the network of an encoder from a checkpoint, such as torchvision's ResNet-18.

    Classifier and stages that the network has not got are left out; a first convolution of colour images is summed for
    grey ones.

    Args:
        encoder: filled in place; its linear map keeps its fresh weights.
        path: ``.safetensors``, or a file of tensors that ``torch.load(weights_only=True)`` reads.

    Raises:
        FormatError: the file is unreadable, or tensors are missing or of another size.
    """
    path = Path(path)
    net = encoder.net.module if isinstance(encoder.net, ForeignNet) else encoder.net
    ours, theirs = net.state_dict(), read_state(path)
    state = {}
    for name, value in ours.items():
        found = theirs.get(name)
        if found is not None and found.ndim == 4 and value.shape[1] == 1 < found.shape[1]:
            found = found.sum(1, keepdim=True)
        if found is not None and found.shape == value.shape:
            state[name] = found
    lacks = [name for name in ours if name not in state and not name.endswith("num_batches_tracked")]
    if lacks:
        more = f" and {len(lacks) - 3} more" if len(lacks) > 3 else ""
        raise FormatError(
            f"{path}: does not fit the encoder: no tensor of that name and size for {', '.join(lacks[:3])}{more}; "
            "choose the encoder and norm of the checkpoint"
        )
    net.load_state_dict({**ours, **state})
