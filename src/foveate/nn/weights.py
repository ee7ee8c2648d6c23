"""Checkpoints of other people's ViTs into our encoder: timm, DINOv2, pathology models and transformers layouts.

No timm is needed. Names are translated, the position table and the patch projection are resampled where sizes differ.
"""

import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor
from torch.nn import functional

from foveate.errors import FormatError
from foveate.nn.encoder import Encoder

_PREFIXES = (
    "state_dict.",
    "module.",
    "model.",
    "backbone.",
    "encoder.",
    "teacher.",
    "student.",
    "vit.",
    "dinov2.",
    "visual.",
)
_DROPPED = ("head.", "fc_norm.", "classifier.", "pooler.", "pre_logits.", "decoder")
_IGNORED = ("mask_token", "embeddings.mask_token", "decoder_pos_embed")
_RENAMED = (
    (r"^register_tokens$", "reg_token"),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale1\.lambda1$", ".ls1.gamma"),
    (r"\.layer_scale2\.lambda1$", ".ls2.gamma"),
    (r"^layernorm\.", "norm."),
)
_PART = re.compile(r"^(blocks\.\d+)\.attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)\.(weight|bias)$")

# what torch.load raises on damaged files, found by flipping bytes
_DAMAGE = (
    OSError,
    EOFError,
    UnpicklingError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
)


def load_weights(encoder: Encoder, path: Path) -> None:
    """Fill an encoder from a checkpoint file.

    The position table is resampled (bicubic in 2-D, trilinear in 3-D) to the encoder's grid; the patch projection is
    resampled to its patch size so that a constant patch keeps its response, and summed (grey) or repeated and rescaled
    over channels. The code of place and size keeps its zero start. Classifier heads are left out.

    Args:
        encoder: filled in place.
        path: ``.safetensors``, or a ``.pt`` / ``.pth`` of tensors only, which is read with ``weights_only=True``.

    Raises:
        FormatError: the file is unreadable, or tensors are missing, unknown or of another size; the message names them.
    """
    ours = encoder.state_dict()
    state = translate(read_state(path))
    if "pos_embed" in state:
        _fit_positions(state, encoder, path)
    weight = state.get("patch_embed.proj.weight")
    if weight is not None:
        state["patch_embed.proj.weight"] = _resize_patch(weight, ours["patch_embed.proj.weight"], path)
    remedy = "set width, depth, class_token, num_registers, embed_prefix and layer_scale to those of the checkpoint"
    optional = [name for name in ours if name.startswith("geometry_embed.")]
    check_fit({**{name: ours[name] for name in optional}, **state}, ours, f"{path}: does not fit the encoder", remedy)
    encoder.load_state_dict({**ours, **state})


LACKS, UNKNOWN, SIZE = "lacks", "has the unknown", "has of another size"


def check_fit(
    state: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
    complaint: str,
    remedy: str,
    order: Sequence[str] = (LACKS, UNKNOWN, SIZE),
) -> None:
    """Refuse weights that are not those of a model, by the names of up to three tensors.

    Args:
        state: the weights.
        ours: the model's own state.
        complaint: how the message begins.
        remedy: how it ends.
        order: what is said first where several things are wrong.

    Raises:
        FormatError: tensors are missing, unknown or of another size.
    """
    found = {
        LACKS: [name for name in ours if name not in state],
        UNKNOWN: [name for name in state if name not in ours],
        SIZE: [
            f"{name} {tuple(state[name].shape)} for {tuple(value.shape)}"
            for name, value in ours.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    for what in order:
        names = found[what]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise FormatError(f"{complaint}: it {what} {', '.join(names[:3])}{more}; {remedy}")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name.

    Raises:
        FormatError: it is unreadable or holds something other than tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FormatError(f"{path}: there is no such file; give a checkpoint, or the folder of a run or model")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch doubts damaged files in warnings before it refuses them
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, *_DAMAGE) as error:
        reason = " ".join(str(error).split())[:160]
        raise FormatError(
            f"{path}: is no readable checkpoint of tensors ({reason}); convert it to safetensors"
        ) from None
    for key in ("state_dict", "model", "teacher"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FormatError(f"{path}: holds more than named tensors; save the state dict alone")
    return {str(name): value for name, value in state.items()}


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of any known layout to timm's; heads and mask tokens are left out, split q, k, v are joined."""
    named: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for original, value in state.items():
        name = _strip(original)
        if name in _IGNORED or name.startswith(_DROPPED):
            continue
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        found = _PART.match(name)
        if found:
            parts.setdefault(f"{found[1]}.attn.qkv.{found[3]}", {})[found[2][0]] = value
        else:
            named[name] = value
    for name, part in parts.items():
        if set(part) == set("qkv"):
            named[name] = torch.cat([part["q"], part["k"], part["v"]])
    return named


def _strip(name: str) -> str:
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if name.startswith(prefix) and not re.match(r"encoder\.layers?\.", name):
                name, stripped = name[len(prefix) :], True
    return name


def _fit_positions(state: dict[str, Tensor], encoder: Encoder, path: Path) -> None:
    """Resample the table, and move entries of prefix tokens to where the encoder adds them.

    A table may have entries for all prefix tokens (timm), for the class token alone (DINOv2 with registers), or none.
    What the encoder has no entry for is added to the class token itself; what the table lacks is zero. Both are exact.
    """
    config, table_1ED = encoder.config, state["pos_embed"]
    num_dims, grid = config.num_dims, config.pos_grid
    wanted = config.num_prefix if config.embed_prefix else 0
    entries = table_1ED.shape[1]
    for num_prefix in dict.fromkeys((wanted, config.num_prefix, int(config.class_token), 0)):
        side = round((entries - num_prefix) ** (1 / num_dims)) if entries > num_prefix else 0
        if side and side**num_dims == entries - num_prefix:
            break
    else:
        raise FormatError(
            f"{path}: pos_embed has {entries} entries, which are no {num_dims}-D grid behind {config.num_prefix} "
            "prefix tokens; set class_token, num_registers and embed_prefix to those of the checkpoint"
        )
    prefix, table = table_1ED[:, :num_prefix], table_1ED[:, num_prefix:]
    if not wanted:
        rest = prefix
        for name in ("cls_token", "reg_token"):
            count = state[name].shape[1] if name in state else 0
            if 0 < count <= rest.shape[1]:
                state[name], rest = state[name] + rest[:, :count], rest[:, count:]
    if side != grid:
        table = _resample(table, side, grid, num_dims)
    kept = prefix[:, :wanted]
    state["pos_embed"] = torch.cat([kept, table.new_zeros(1, wanted - kept.shape[1], table.shape[2]), table], 1)


def _resample(table_1ED: Tensor, side: int, grid: int, num_dims: int) -> Tensor:
    dense = table_1ED.transpose(1, 2).unflatten(2, (side,) * num_dims).float()
    mode = "bicubic" if num_dims == 2 else "trilinear"
    dense = functional.interpolate(dense, (grid,) * num_dims, mode=mode, align_corners=False, antialias=num_dims == 2)
    return dense.flatten(2).transpose(1, 2).to(table_1ED.dtype)


def _resize_patch(weight: Tensor, ours: Tensor, path: Path) -> Tensor:
    if weight.ndim == 2 and weight.shape[1] == ours[0].numel():
        weight = weight.view(ours.shape)
    if weight.ndim != ours.ndim:
        raise FormatError(
            f"{path}: patch_embed.proj.weight {tuple(weight.shape)} is not {ours.ndim - 2}-D; load it into a model of "
            "its kind"
        )
    if weight.shape[2:] != ours.shape[2:]:
        mode = "bilinear" if ours.ndim == 4 else "trilinear"
        spatial = tuple(range(2, ours.ndim))
        response = weight.float().sum(spatial, keepdim=True)
        dense = functional.interpolate(weight.float(), ours.shape[2:], mode=mode, align_corners=False)
        dense = dense * (weight[0, 0].numel() / dense[0, 0].numel())
        weight = dense + (response - dense.sum(spatial, keepdim=True)) / dense[0, 0].numel()
    theirs, wanted = weight.shape[1], ours.shape[1]
    if theirs != wanted:
        if wanted == 1:
            weight = weight.sum(1, keepdim=True)
        else:
            weight = weight[:, torch.arange(wanted) % theirs] * (theirs / wanted)
    return weight.to(ours.dtype)
