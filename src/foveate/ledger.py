"""A ledger of operations and live bytes, and what it takes to run a model on the meta device, without memory."""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

_GOLDEN = (math.sqrt(5) - 1) / 2
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Stage:
    """One part of a run.

    Args:
        name: of the part.
        flops: floating point operations of its matrix products (a multiplication and an addition are two).
        peak_bytes: most bytes of activations alive during it, those of earlier stages included.
    """

    name: str
    flops: int
    peak_bytes: int


class Ledger(TorchDispatchMode):
    """Counts operations and live bytes of everything that runs inside it, by stage, on any device.

    Args:
        known: tensors that exist already and are not counted.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._flops: dict[str, int] = {}
        self._peaks: dict[str, int] = {}
        self._names = ["encoder"]
        self._fixed = False
        self._held = [tensor.untyped_storage() for tensor in known]
        self._known = {id(storage) for storage in self._held}

    def stages(self) -> tuple[Stage, ...]:
        """What was counted, in order of first use."""
        return tuple(Stage(name, self._flops.get(name, 0), peak) for name, peak in self._peaks.items())

    @contextmanager
    def stage(self, name: str, *, outermost: bool = False) -> Iterator[None]:
        """Book what runs inside under a name; ``outermost`` keeps inner stages from taking over."""
        self.enter(name)
        self._fixed = outermost
        yield
        self._fixed = False
        self.leave()

    def enter(self, name: str) -> None:
        """Begin a stage; stages nest."""
        self._names.append(self._names[-1] if self._fixed else name)

    def leave(self) -> None:
        """End the innermost stage."""
        self._names.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and book it."""
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if any(tensor.is_meta for tensor in tensors) and not all(tensor.is_meta for tensor in tensors):
            args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))  # real indices of tensors without memory
        out = func(*args, **kwargs)
        name = self._names[-1]
        self._flops[name] = self._flops.get(name, 0) + _count(func, args, kwargs, out)
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._book(value)
        self._peaks[name] = max(self._peaks.get(name, 0), self.live)
        return out

    def _book(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
            return
        self._known.add(id(storage))
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, id(storage), storage.nbytes()).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class RealIndices(TorchFunctionMode):
    """Keeps whole numbers real: tables of neighbours decide shapes, so only floating point goes without memory.

    Numbers without memory sort into an order whose beginning is spread evenly, so that the first few of them, chosen as
    tokens, lie apart and have the most neighbours.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to and not args[0].is_floating_point() and _names_meta((*args[1:], *kwargs.values())):
            return args[0]
        if func is Tensor.argsort and args[0].is_meta:
            spread = torch.arange(args[0].shape[-1]) * _GOLDEN % 1.0
            return spread.expand(args[0].shape).argsort(*args[1:], **kwargs)
        whole = func is torch.arange or kwargs.get("dtype") in (torch.bool, torch.int32, torch.int64)
        if whole and _names_meta((kwargs.get("device"),)):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def _names_meta(values: Sequence[Any]) -> bool:
    return any(isinstance(value, str | torch.device) and str(value) == "meta" for value in values)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Send attention without memory to the fused CPU kernel, which knows meta, instead of its L x L decomposition.

    A function mode cannot do it: checkpointed blocks are computed again outside of it. Real tensors are not affected.
    """
    usual = functional.scaled_dot_product_attention

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (_fused if query.is_meta else usual)(query, *args, **kwargs)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = usual


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    missing = 4 - query.ndim
    query, key, value = (x.reshape((1,) * missing + x.shape) if missing > 0 else x for x in (query, key, value))
    out: Tensor = _FLASH(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return out.reshape(out.shape[missing:]) if missing > 0 else out


def _count(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    packet = func._overloadpacket
    if packet in (_FLASH, _FLASH_BACKWARD):
        first = 1 if packet is _FLASH_BACKWARD else 0
        query, key = args[first], args[first + 1]
        pairs = math.prod(query.shape[:-1]) * key.shape[-2] * query.shape[-1]
        return int((10 if packet is _FLASH_BACKWARD else 4) * pairs)
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
