"""A switch on models that people already have: a dense ViT segmenter becomes its sparse form, with its weights."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar, cast

from torch import Tensor, nn

from foveate.errors import ConfigError
from foveate.models.segmentation import SegmentationModel, build_model
from foveate.models.sparsifier import Sparsifier
from foveate.nn.encoder import Encoder
from foveate.nn.pruner import KeepRatio, keep_counts

STACKS = ("blocks", "layers", "layer", "resblocks")
PREFIXES = ("cls_token", "dist_token", "distillation_token", "reg_token", "register_tokens")

Model = TypeVar("Model", bound=nn.Module)


def sparsify(
    model: Model,
    prune_after: Sequence[int] | int = (2, 5, 8),
    keep_ratio: KeepRatio | list[float] = 0.25,
    *,
    completion: str = "cross",
    estimator: str = "threshold",
    scorer: str = "light",
    decoder: str | None = None,
    blocks: str | None = None,
    num_prefix: int | None = None,
) -> Model:
    """Give a dense model prune points: behind some blocks its tokens are scored and only the best go on.

    A `SegmentationModel` with our encoder is built anew, with a copy of every weight; the given one stays dense. Any
    other model is switched where it is: its blocks, found by their attributes and no library imported, run on kept
    tokens only, and around each of them the sequence has its full length again, so that its own forward, hidden states,
    skips, hooks and decoder work as before. Weights keep their names, new ones begin with ``sparsifier.``, and
    ``model.sparsifier`` (a `foveate.models.sparsifier.Sparsifier`) changes the budget, shows scores and undoes.
    Right after the switch scores are random: fine-tune, with a loss on the scores (docs/pruning.md).

    Args:
        model: a model around a stack of transformer blocks over ``[images, tokens, width]``, such as ours, MONAI's
            UNETR, timm's and transformers' ViTs, or ``torch.nn.TransformerEncoder``.
        prune_after: blocks behind which tokens leave, ascending from 0, the last block not among them; or one of them.
        keep_ratio: in (0, 1]; one share, applied again at every prune point, or the share of all tokens left after
            each; never fewer than 16 tokens. At 1 the output is the dense one.
        completion: how pruned tokens catch up behind the last block: "cross" (attend to the kept ones), "none" or
            "block" (a block over all tokens); "mask" for ours only.
        estimator: gradient of the choice, see `foveate.nn.pruner.TokenPruner`.
        scorer: "light" or "published", see `foveate.nn.scorer.TokenScorer`.
        decoder: for ours: another decoder, such as "sparse"; it takes over the weights that fit.
        blocks: for others: dotted path of the stack, where there are several.
        num_prefix: for others: class and register tokens in front; None: as the model's attributes say.

    Returns:
        The sparse model.

    Raises:
        ConfigError: no stack of blocks, or several; a prune point beyond them; windows; a model that prunes already.
        BudgetError: an impossible ``keep_ratio``.

    Source: Zhou et al., IPMI 2023, arXiv 2303.06522, over any ViT. **Differs**: theirs is an encoder of its own.
    """
    prune_after = (prune_after,) if isinstance(prune_after, int) else tuple(prune_after)
    keep_ratio = tuple(keep_ratio) if isinstance(keep_ratio, list) else keep_ratio
    keep_counts(1, keep_ratio, max(len(prune_after), 1))
    if hasattr(model, "sparsifier"):
        raise ConfigError(
            f"{type(model).__name__} is sparse already; set model.sparsifier.pruning, or call model.sparsifier.remove()"
        )
    if isinstance(model, SegmentationModel) and isinstance(model.encoder, Encoder):
        settings = {"prune_after": prune_after, "keep_ratio": keep_ratio, "completion": completion}
        return cast(Model, _ours(model, {**settings, "estimator": estimator, "scorer": scorer}, decoder))
    if decoder is not None:
        raise ConfigError(f"decoder={decoder!r}: {type(model).__name__} keeps its own decoder; leave it out")
    path, stack = _find(model, blocks)
    points = list(prune_after)
    if not points or points != sorted(set(points)) or any(not 0 <= point < len(stack) - 1 for point in points):
        raise ConfigError(
            f"prune_after={prune_after} must ascend within 0..{len(stack) - 2}, before the last of the {len(stack)} "
            f"blocks in {path!r}; (2, 5, 8) suits 12 blocks"
        )
    for name, value, known in (
        ("completion", completion, ("cross", "none", "block")),
        ("scorer", scorer, ("light", "published")),
    ):
        if value not in known:
            raise ConfigError(f"{name}={value!r} is none of {', '.join(known)}; choose one")
    first = stack[0]
    like = next(value for value in first.parameters() if value.is_floating_point())
    width = _width(path, first)
    made = Sparsifier(
        model,
        stack,
        width=width,
        num_heads=_num_heads(first, width),
        num_prefix=_num_prefix(model, path) if num_prefix is None else num_prefix,
        prune_after=prune_after,
        keep_ratio=keep_ratio,
        completion=completion,
        estimator=estimator,
        scorer=scorer,
        batch_first=bool(getattr(getattr(first, "self_attn", None), "batch_first", True)),
    )
    made.to(like.device, like.dtype).train(model.training)
    return model


def _ours(model: SegmentationModel, settings: dict[str, object], decoder: str | None) -> SegmentationModel:
    config = model.config
    if config.prune_after:
        raise ConfigError(
            f"the model prunes behind {config.prune_after} already; call it with Pruning(keep_ratio=...) for another "
            "budget, or start from the dense model"
        )
    made = build_model(replace(config, **settings, decoder=decoder or config.decoder))  # type: ignore[arg-type]
    theirs, state = model.state_dict(), made.state_dict()
    state.update({name: x for name, x in theirs.items() if name in state and x.shape == state[name].shape})
    made.load_state_dict(state)
    like = next(model.parameters())
    return made.to(like.device, like.dtype).train(model.training)


def _find(model: nn.Module, path: str | None) -> tuple[str, list[nn.Module]]:
    """The stack of transformer blocks and its dotted path."""
    name = type(model).__name__
    if path is not None:
        try:
            found = list(model.get_submodule(path).children())
        except AttributeError:
            found = []
        if len(found) < 2:
            known = ", ".join(repr(one) for one, _ in _stacks(model)) or "none"
            raise ConfigError(f"blocks={path!r} is no stack of blocks in {name}; stacks that look like one: {known}")
        stacks = [(path, found)]
    else:
        stacks = list(_stacks(model))
    if not stacks:
        raise ConfigError(
            f"{name} has no stack of transformer blocks that sparsify() finds; give its path, such as "
            "blocks='backbone.blocks'"
        )
    for where, blocks in stacks:
        if any(_windowed(block) for block in blocks):
            raise ConfigError(
                f"{where!r} of {name} attends within windows or by relative place, which needs the whole grid; "
                "sparsify() takes models with plain global attention"
            )
    if len(stacks) > 1:
        raise ConfigError(
            f"{name} has several stacks of blocks: {', '.join(repr(one) for one, _ in stacks)}; choose with blocks="
        )
    return stacks[0]


def _stacks(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Every list of two modules or more that has a usual name and whose members attend."""
    for path, module in model.named_modules():
        blocks = list(module.children())
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(blocks) > 1:
            usual = path.rpartition(".")[2].rstrip("0123456789") in STACKS
            if usual and all(_attends(block) for block in blocks):
                yield path, blocks


def _attends(block: nn.Module) -> bool:
    return any("attn" in name or "attention" in name for name, _ in block.named_children())


def _windowed(block: nn.Module) -> bool:
    for module in block.modules():
        for name in ("window_size", "shift_size"):
            size = getattr(module, name, None)
            if isinstance(size, int | tuple | list) and any(size if isinstance(size, tuple | list) else (size,)):
                return True
    return False


def _width(path: str, block: nn.Module) -> int:
    for module in block.children():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 1:
            return len(weight)
    raise ConfigError(f"the blocks in {path!r} have no norm of their own that tells the width; give another path")


def _num_heads(block: nn.Module, width: int) -> int:
    for module in block.modules():
        for name in ("num_heads", "num_attention_heads"):
            heads = getattr(module, name, None)
            if isinstance(heads, int) and heads > 0 and width % heads == 0:
                return heads
    return width // 64 if width % 64 == 0 else 1


def _num_prefix(model: nn.Module, path: str) -> int:
    """Class and register tokens, from the attributes of whatever owns the stack, innermost first."""
    while path:
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
        number = getattr(owner, "num_prefix_tokens", None)
        if isinstance(number, int):
            return number
        homes = (owner, getattr(owner, "embeddings", None))
        tokens = [getattr(home, name, None) for home in homes for name in PREFIXES]
        found = sum(token.shape[-2] for token in tokens if isinstance(token, Tensor))
        if found:
            return found
    return 0
