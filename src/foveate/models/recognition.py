"""Recognise bags of patches: a selector, an encoder, learned queries and heads, put together by a frozen configuration.

Legend: B bags, N patches of a bag, T chosen patches of all bags, K outputs of a task, D width or spatial axes.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from foveate.errors import ConfigError
from foveate.geometry.patch_source import PatchSource
from foveate.models.files import WEIGHTS_FILE, load_state, no_model, read_config, save_model
from foveate.nn.aggregator import PLACES, Aggregator, PlaceCode
from foveate.nn.detail_prior import DetailPrior
from foveate.nn.fast_copy import fast_copy
from foveate.nn.heads import Heads, TaskSpec, check_tasks
from foveate.nn.patch_encoder import PatchEncoder, create_patch_encoder, uses_batch_statistics
from foveate.nn.query_attention import QueryAttention
from foveate.nn.selection import Selection, check_keep, relative_centres
from foveate.nn.selector import PatchSelector
from foveate.nn.stream import as_float, block_rows, in_blocks
from foveate.nn.warm_start import WarmStart

Encode = Callable[[Tensor], Tensor]
_LEARNED = 64  # patches that are trained on at a time
_PRECISIONS = ("fp32", "folded", "bf16", "int8")


@dataclass(frozen=True)
class RecognitionConfig:
    """Every number of a recognition model."""

    encoder: str = "cnn"
    """What `create_patch_encoder` builds."""
    in_chans: int = 3
    """Channels of the patches, or features where patches are stored as features."""
    patch_size: int = 64
    norm: str = "group"
    stages: int = 4
    depth: int = 12
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    width: int = 128
    """D of the queries and of a patch's vector."""
    num_heads: int = 8
    head_width: int | None = None
    hidden: int | None = None
    """Width between the aggregator's two linear maps; None: four times ``width``."""
    dropout: float = 0.1
    attention_dropout: float = 0.1
    tasks: tuple[TaskSpec, ...] = (TaskSpec("label"),)
    """What is recognised; each task has a query of its own."""
    position: str = "none"
    """Code of a patch's place: ``none``, ``sine`` or ``learned``."""
    num_dims: int = 2
    keep: int = 64
    """Patches that stay of each bag."""
    chunk: int = 256
    """Patches read at a time."""
    rule: str = "exact"
    rank: str = "mean"
    shuffle: bool = False
    """Whether the buffered rule sees a bag in random order while training."""
    attend: str = "kept"
    """What a prediction rests on: the ``kept`` patches (published), or ``all`` of them, of which the kept ones alone
    carry the gradient."""
    precision: str = "fp32"
    """Of the selection: ``fp32`` (the encoder itself), ``folded`` (a fast copy in float32), ``bf16``, or ``int8``
    (stored features on the CPU: a first look in 8 bits, and one in float32 at the contenders)."""
    workers: int = 0
    """Threads that read ahead while patches are selected."""

    def __post_init__(self) -> None:
        check_tasks(self.tasks)
        check_keep(self.keep)
        for name, known in (
            ("position", PLACES),
            ("attend", ("kept", "all")),
            ("precision", _PRECISIONS),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r} is none of {', '.join(known)}; choose one")
        if self.precision == "int8" and self.encoder != "features":
            raise ConfigError(
                f"precision='int8' with encoder={self.encoder!r}: 8 bits are for stored features; choose bf16"
            )
        if self.precision == "int8" and (self.attend, self.rule) != ("kept", "exact"):
            raise ConfigError(
                f"precision='int8' with attend={self.attend!r} and rule={self.rule!r}: a second look at the contenders "
                "is for attend='kept' with rule='exact'; choose bf16"
            )
        if self.attend == "all" and self.rule != "exact":
            raise ConfigError(f"attend='all' with rule={self.rule!r}: only 'exact' looks at all patches; choose that")
        for name in ("in_chans", "width", "num_heads", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is below 1; give a positive whole number")


@dataclass(frozen=True, eq=False)
class Chosen:
    """The patches of several bags that were selected, laid end to end.

    Args:
        patches: pixels or features.
        lengths: patches of each bag.
        centres: where they lie relative to their image, where the model has a code of place.
        selections: what each bag was selected by.
    """

    patches: Shaped[Tensor, "T *rest"]
    lengths: tuple[int, ...]
    centres: Float[Tensor, "T D"] | None
    selections: tuple[Selection, ...]


def join_patches(patches: Sequence[Shaped[Tensor, "_ *rest"]]) -> Shaped[Tensor, "T *rest"]:
    """Patches of several bags end to end, at least one bag; bytes become floats where there are floats among them."""
    mixed = len({part.dtype for part in patches}) > 1
    return torch.cat([as_float(part) for part in patches] if mixed else list(patches))


class RecognitionModel(nn.Module):
    """Bags in, logits of every task out.

    Args:
        config: what was built; saved beside the weights.
        encoder: takes patches ``[R, C, *P]`` or features ``[R, F]`` to ``[R, config.width]``.
    """

    def __init__(self, config: RecognitionConfig, encoder: PatchEncoder) -> None:
        super().__init__()
        if encoder.width != config.width:
            raise ConfigError(f"an encoder of width {encoder.width} for a model of {config.width}; build both alike")
        self.config = config
        self.encoder = encoder
        if config.precision == "int8":
            _looks(encoder, config.precision)  # what is refused is refused now, and kernels are compiled now
        attention = QueryAttention(
            config.width, config.num_heads, len(config.tasks), config.head_width, config.attention_dropout
        )
        self.aggregator = Aggregator(attention, config.hidden, config.dropout)
        self.place = None if config.position == "none" else PlaceCode(config.position, config.width, config.num_dims)
        self.heads = Heads(config.width, config.tasks)

    def selector(self) -> PatchSelector:
        """The selector that the configuration describes, with the weights as they are now."""
        config = self.config
        encoder, judge = _looks(self.encoder, config.precision)
        return PatchSelector(
            encoder,
            self.aggregator.attention,
            config.keep,
            rule=config.rule,
            rank=config.rank,
            position=self.place,
            shuffle=config.shuffle and self.training,
            workers=config.workers,
            judge=judge,
        )

    def select(
        self, source: PatchSource | Tensor, keep: int | None = None, generator: torch.Generator | None = None
    ) -> Selection:
        """Look at a whole bag and choose its patches.

        Args:
            source: the bag.
            keep: instead of the configured one.
            generator: where the order comes from, where a model in training shuffles.
        """
        return self.selector().select(source, self.config.chunk, generator, keep=keep)

    def choose(
        self,
        bags: Sequence[PatchSource],
        keep: int | None = None,
        generator: torch.Generator | None = None,
        *,
        warm: WarmStart | None = None,
        prior: DetailPrior | None = None,
        by_detail: int = 0,
        names: Sequence[str] = (),
    ) -> Chosen:
        """Select the patches of several bags, and read them.

        A bag of at most ``keep`` patches is taken whole without a look at it.

        Args:
            bags: each of any size; an empty bag has no patches, and its prediction is what the queries say alone.
            keep: instead of the configured one, such as ``KeepSchedule.at`` gives.
            generator: where the order comes from, where a model in training shuffles.
            warm: what is remembered of earlier epochs.
            prior: what is remembered of detail.
            by_detail: how many of ``keep`` are the most detailed patches beside those that attention ranks first.
            names: of the bags, for ``warm`` and ``prior``.

        Raises:
            ConfigError: ``attend="all"`` while the encoder uses statistics of the batch, or with a warm start; bags
                without names where something is remembered of them; all of ``keep`` by detail.

        Cost: memory of the kept patches, of the logits of all bags, and of one selection at a time.
        """
        tally = self.config.attend == "all"
        if tally and self.training and uses_batch_statistics(self.encoder):
            raise ConfigError(
                "attend='all' with an encoder that norms by batch statistics: the patches looked at and the patches "
                "trained on would not be the same; use norm='group', freeze the encoder, or attend='kept'"
            )
        if warm is not None and tally:
            raise ConfigError(
                f"a warm start with attend={self.config.attend!r}: use attend='kept', because patches that are not "
                "looked at cannot be attended"
            )
        if (warm is not None or by_detail) and len(names) != len(bags):
            raise ConfigError(
                f"{len(bags)} bags with {len(names)} names: name each bag, as they are remembered by name"
            )
        ours = check_keep(self.config.keep if keep is None else keep) - by_detail
        if not 0 <= by_detail < ours + by_detail or (by_detail and prior is None):
            raise ConfigError(
                f"by_detail={by_detail} of {ours + by_detail} patches: give a prior, and leave one patch at least to "
                "attention"
            )
        selector, chunk = self.selector(), self.config.chunk
        if warm is None:
            selections = selector.select_all(bags, chunk, generator, keep=ours, shortcut=True, tally=tally)
        else:
            selections = [
                warm.select(selector, name, bag, chunk, keep=ours) for name, bag in zip(names, bags, strict=True)
            ]
        if prior is not None and by_detail:
            selections = [
                prior.add(one, name, bag, by_detail, chunk)
                for one, name, bag in zip(selections, names, bags, strict=True)
            ]
        patches, centres = [], []
        for bag, one in zip(bags, selections, strict=True):
            if len(one.index):
                patches.append(bag.read(one.index))
                if self.place is not None:
                    centres.append(relative_centres(bag)[one.index])
        lengths = tuple(len(one.index) for one in selections)
        pixels = join_patches(patches) if patches else torch.zeros(0, self.config.in_chans)
        return Chosen(pixels, lengths, torch.cat(centres) if centres else None, tuple(selections))

    def forward(
        self, bags: Sequence[PatchSource] | Chosen, keep: int | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Float[Tensor, "B K"]]:
        """Logits of every task by its name.

        In evaluation on the CPU those of a bag do not depend on its company, to the bit.

        Args:
            bags: bags to select from, or patches that ``choose`` has selected.
            keep: see ``choose``.
            generator: see ``choose``.
        """
        chosen = bags if isinstance(bags, Chosen) else self.choose(bags, keep, generator)
        x_TD = self._encode(chosen)
        vectors = x_TD.split(list(chosen.lengths))
        wholes = [one.whole for one in chosen.selections]
        if self.training and len(set(chosen.lengths)) == 1 and not any(wholes):
            return self._say(self.aggregator(torch.stack(vectors)))
        read = [self.aggregator(x_KD, whole) for x_KD, whole in zip(vectors, wholes, strict=True)]
        if self.training:
            return self._say(torch.stack(read))
        alone = [self._say(x_QD[None]) for x_QD in read]
        return {task.name: torch.cat([one[task.name] for one in alone]) for task in self.config.tasks}

    def _say(self, x_BQD: Tensor) -> dict[str, Tensor]:
        said: dict[str, Tensor] = self.heads(x_BQD)
        return said

    def _encode(self, chosen: Chosen) -> Tensor:
        device = self.aggregator.attention.query.device
        if not len(chosen.patches):
            return torch.zeros(0, self.config.width, device=device)
        pixels = chosen.patches.to(device)
        if self.config.encoder != "features" or self.config.mean or not pixels.is_floating_point():
            pixels = as_float(pixels)  # stored features become float32 block by block
        encode: Encode = self.encoder
        x_TD = self._learned(pixels) if self.training else in_blocks(encode, pixels, block_rows(pixels))
        if self.place is not None and chosen.centres is not None:
            code: Tensor = in_blocks(self.place, chosen.centres.to(device), block_rows(pixels))
            x_TD = x_TD + code.to(x_TD)
        return x_TD

    def _learned(self, pixels: Tensor) -> Tensor:
        """Vectors of patches that are trained on; on the CPU in parts that stay in its cache, if no vector depends on
        other patches."""
        whole = pixels.ndim == 2 or pixels.device.type != "cpu" or uses_batch_statistics(self.encoder)
        parts = pixels.split(len(pixels) if whole else _LEARNED)
        return torch.cat([self.encoder(part) for part in parts])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, each aside first and then renamed."""
        save_model(self, "recognition", asdict(self.config), folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "RecognitionModel":
        """Read what ``save_pretrained`` wrote.

        Raises:
            FormatError: a file is missing, damaged, or does not fit the other.
        """
        values = read_config(folder, "recognition", {field.name for field in fields(RecognitionConfig)})
        try:
            values["tasks"] = tuple(TaskSpec(**task) for task in values["tasks"])
            model = build_recognition(RecognitionConfig(**values))
        except (ConfigError, TypeError, KeyError) as error:
            raise no_model(folder, error) from None
        load_state(model, Path(folder) / WEIGHTS_FILE)
        return model


def _looks(encoder: PatchEncoder, precision: str) -> tuple[Encode, Encode | None]:
    """What looks at all patches of a bag, and what looks at the contenders again."""
    if precision == "fp32":
        return encoder, None
    if precision == "int8":
        from foveate.nn.int8_copy import int8_copy  # which compiles kernels

        return int8_copy(encoder), fast_copy(encoder)
    return fast_copy(encoder, torch.bfloat16 if precision == "bf16" else torch.float32), None


def build_recognition(config: RecognitionConfig) -> RecognitionModel:
    """Build a recognition model with fresh weights from a configuration."""
    encoder = create_patch_encoder(
        config.encoder,
        config.in_chans,
        width=config.width,
        patch_size=config.patch_size,
        norm=config.norm,
        stages=config.stages,
        depth=config.depth,
        mean=config.mean,
        std=config.std,
    )
    return RecognitionModel(config, encoder)
