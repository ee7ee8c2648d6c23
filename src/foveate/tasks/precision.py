"""Which numbers a model computes with: bfloat16 where the device is made for it, float32 elsewhere."""

import torch

AUTO = "auto"


def resolve_precision(asked: str, device: torch.device) -> str:
    """What ``auto`` means on a device; what was asked for otherwise.

    On a processor with AMX tiles products of bfloat16 matrices are several times as fast as those of float32; on one
    without they are often slower, so there it is float32. The same machine always gets the same answer.

    Args:
        asked: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        device: where the model is.
    """
    if asked != AUTO:
        return asked
    return "bf16" if is_made_for_bf16(device) else "fp32"


def is_made_for_bf16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 in hardware: CUDA from Ampere on, processors with AMX.

    Args:
        device: of any kind; what is neither CUDA nor a CPU is not believed to.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and _has_amx() and torch.backends.mkldnn.is_available()


def _has_amx() -> bool:
    """What torch reports of the processor; an older torch has a private function alone."""
    said: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(said["amx_bf16"] if "amx_bf16" in said else torch.cpu._is_amx_tile_supported())
