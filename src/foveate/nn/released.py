"""Weights of the released code of token sparsification, and of its dense baseline, into a model of ours.

Parameters are found by their names and shapes. What the released code stores beside its weights is checked or left out:
the fixed code of place must be the one that is computed here, and the ones of its token mask and the shortcut
convolutions that its library made without ever using them mean nothing.

Source: Zhou et al., IPMI 2023, arXiv 2303.06522: its encoder with prune points, its assembly of all layers (with maps
in and out), and its UNETR decoders for patches of 16 and 8.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from foveate.errors import ConfigError, FormatError
from foveate.geometry.leaves import uniform_leaves
from foveate.geometry.patches import Patches
from foveate.nn.published import PublishedAssembler, sine_positions
from foveate.nn.unetr import DenseDecoder
from foveate.nn.weights import LACKS, SIZE, UNKNOWN, check_fit, read_state

_PLACES, _LAYER_CODE = "completion_net.completion.pos_embed", r"completion_net\.completion\.layer_tokens\.(\d+)"
_NOT_WEIGHTS = re.compile(r"encoder\.policy|decoder\.encoder\d\.blocks\.\d+\.1\.conv3\.conv\.weight")
_RENAMED = (
    (r"^encoder\.mid_norm_list\.", "assembler.norms."),
    (r"^completion_net\.pre_linear_list\.", "assembler.maps."),
    (r"^completion_net\.blocks\.", "assembler.blocks."),
    (r"^completion_net\.out_norm\.", "assembler.norm."),
    (r"^completion_net\.out_linear\.", "assembler.out."),
    (r"^decoder\.encoder1\.", "decoder.picture."),
)
_SCORER = {"in_mlp.0": "norm", "in_mlp.1": "embed", "out_mlp.0": "head.0", "out_mlp.2": "head.1", "out_mlp.4": "head.2"}


def is_released(state: Mapping[str, Tensor]) -> bool:
    """Whether tensors have the names of the released model, dense or sparse, and not those of an encoder alone."""
    return any(name.removeprefix("module.").startswith("decoder.decoder2.") for name in state)


def load_released(model: nn.Module, source: Path | Mapping[str, Tensor], path: Path | str = "released weights") -> None:
    """Fill a whole model from weights of the released code.

    Args:
        model: of ``create_model("scd_unetr_...", exact=True)``, with ``prune_after=()`` for the dense baseline; its
            ``pos_grid`` must be that of the weights. Filled in place.
        source: a ``.safetensors`` file, a ``.pth`` or ``.tar`` of tensors only (``weights_only=True``), or tensors.
        path: named in errors where ``source`` is no file.

    Raises:
        ConfigError: the model has another decoder or another way to complete tokens.
        FormatError: the file is unreadable, or tensors are missing, unknown or of another size; the message names them.
    """
    if isinstance(source, Path):
        return load_released(model, read_state(source), source)
    decoder, assembler = model.decoder, model.assembler
    if not isinstance(decoder, DenseDecoder) or not isinstance(assembler, PublishedAssembler | None):
        raise ConfigError(
            "released weights fit neither another decoder than unetr and unetr_pooled nor another completion than "
            "published; build the model with exact=True"
        )
    state = {name.removeprefix("module."): value for name, value in source.items()}
    places = state.pop(_PLACES, None)
    state = translate(state, sorted(model.encoder.pruners, key=int), len(decoder.ups))  # type: ignore[union-attr,arg-type]
    ours = model.state_dict()
    remedy = (
        "set patch_size, pos_grid, in_chans, num_classes, width, depth, prune_after, completion_size and decoder to "
    )
    complaint = f"{path}: does not fit the model"
    check_fit(state, ours, complaint, remedy + "those of the weights", (SIZE, LACKS, UNKNOWN))
    if places is not None and assembler is not None:
        _check_places(places, assembler.inner, decoder, path)
    model.load_state_dict({name: state[name].to(value.dtype) for name, value in ours.items()})


def translate(state: Mapping[str, Tensor], points: list[str], num_ups: int) -> dict[str, Tensor]:
    """Released names to ours.

    Args:
        state: tensors by released names.
        points: prune points, as the encoder names them, in order.
        num_ups: stages of the decoder.
    """
    named, codes = {}, dict[int, Tensor]()
    for name, value in state.items():
        if _NOT_WEIGHTS.fullmatch(name):
            continue
        if code := re.fullmatch(_LAYER_CODE, name):
            codes[int(code[1])] = value.reshape(-1)
            continue
        for pattern, ours in _RENAMED:
            name = re.sub(pattern, ours, name)
        if scorer := re.fullmatch(r"encoder\.score_predictor_list\.(\d+)\.(\w+\.\d)\.(\w+)", name):
            point = points[int(scorer[1])] if int(scorer[1]) < len(points) else scorer[1]
            name = f"encoder.pruners.{point}.scorer.{_SCORER.get(scorer[2], scorer[2])}.{scorer[3]}"
        if stage := re.fullmatch(r"decoder\.(encoder|decoder)(\d)\.(.+)", name):
            place = num_ups - int(stage[2]) + (stage[1] == "decoder")
            if place >= 0:
                name = f"decoder.{'skips' if stage[1] == 'encoder' else 'ups'}.{place}.{stage[3]}"
        named[name] = value
    if len({code.shape for code in codes.values()}) == 1:
        named["assembler.codes"] = torch.stack([codes[index] for index in sorted(codes)])
    return named


def _check_places(places: Tensor, width: int, decoder: DenseDecoder, path: Path | str) -> None:
    """The stored code of place, zero for the class token, must be the computed one."""
    num_dims, side = decoder.num_dims, round((places.shape[1] - 1) ** (1 / decoder.num_dims))
    leaves = uniform_leaves((side * decoder.patch_size,) * num_dims, decoder.patch_size)
    pixels = torch.empty(len(leaves), 1, *(decoder.patch_size,) * num_dims)
    code = sine_positions(Patches(pixels, (leaves,)), width)
    expected = torch.cat([code.new_zeros(1, width), code])[None]
    if places.shape != expected.shape or not torch.allclose(places.float(), expected, atol=1e-4):
        raise FormatError(
            f"{path}: {_PLACES} {tuple(places.shape)} is not the code of place of a grid of {side}^{num_dims} cells "
            f"and width {width}; such weights were made by other code"
        )
