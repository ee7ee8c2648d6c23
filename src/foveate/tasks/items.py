"""Which files there are, which mask belongs to which image, and which split each group goes to."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foveate.errors import ConfigError
from foveate.tasks.files import (
    SPLITS,
    find_files,
    mask_of,
    read_manifest,
    siblings,
    stem_of,
)
from foveate.tasks.settings import DataConfig, SplitConfig

__all__ = ["SPLITS", "Item", "assign", "find_items", "group_of", "split_items", "stem_of"]


@dataclass(frozen=True)
class Item:
    """One image of the data set.

    Args:
        name: the image's path below the root, without its ending, and without the modality; unique.
        image: file of the image.
        mask: file of the mask, or ``None``.
        group: what must stay on one side of the split.
        split: ``train``, ``val`` or ``test`` where the manifest says so, else ``None``.
        mpp: um per pixel where the manifest says so; wins over what the file says.
        spacing: mm per axis where the manifest says so; wins over what the settings and the file say.
        more: files of the further channels, where an image lies in several.
        case: what is common to the names of those files, without their ending; ``None``: the file's own stem.
    """

    name: str
    image: Path
    mask: Path | None
    group: str
    split: str | None = None
    mpp: float | None = None
    spacing: tuple[float, ...] | None = None
    more: tuple[Path, ...] = ()
    case: str | None = None

    @property
    def stem(self) -> str:
        """What names the image: its file without the ending, and without the modality."""
        return stem_of(self.image) if self.case is None else self.case

    @property
    def file(self) -> Path:
        """What outputs are named after: the image's file, as if its name had no modality."""
        return self.image if self.case is None else self.image.with_name(self.case + self._ending)

    @property
    def _ending(self) -> str:
        return self.image.name[len(stem_of(self.image)) :]


def find_items(data: DataConfig) -> tuple[Item, ...]:
    """All images of the data set with their masks, in the order of their names.

    Args:
        data: where to look, and by which rule a mask is found.

    Raises:
        ConfigError: no image, no mask or more than one mask is found, or a rule leaves the root.
        FormatError: the manifest is unreadable, or names a file outside the root.
    """
    root = Path(data.root)
    if not root.is_dir():
        raise ConfigError(f"data.root={data.root!r} is not a folder: give the folder with the images (--data.root=DIR)")
    rows = read_manifest(root, data) if data.manifest else [{"image": path} for path in find_files(root, data)]
    items = [_item(root, data, row) for row in rows]
    double = next((name for name, count in Counter(item.name for item in items).items() if count > 1), None)
    if double is not None:
        raise ConfigError(f"{double!r} is named twice in {data.manifest or data.images!r}: name every image once")
    return tuple(sorted(items, key=lambda item: item.name))


def split_items(items: Sequence[Item], data: DataConfig) -> dict[str, tuple[Item, ...]]:
    """Share the images out by whole groups, before anything is varied.

    The manifest's split column wins; a group it leaves open joins the group's other members, and the rest is dealt by
    a seeded hash of the group's name: most groups for training, at least one for every share above 0 while there are
    groups. Adding images of a new group seldom moves an old one, and the order of files never matters.

    Args:
        items: all images.
        data: the shares and the seed.

    Returns:
        ``train``, ``val`` and ``test``, each in the order of ``items``; no group is in two of them.

    Raises:
        ConfigError: a group is in two splits by the manifest, or nothing is left for training.
    """
    chosen: dict[str, str] = {}
    for item in items:
        if item.split is None:
            continue
        other = chosen.setdefault(item.group, item.split)
        if other != item.split:
            raise ConfigError(
                f"group {item.group!r} is in the splits {other!r} and {item.split!r}: put each group into one split"
            )
    open_groups = sorted({item.group for item in items} - chosen.keys())
    chosen |= _deal(open_groups, data.split)
    result = {split: tuple(i for i in items if chosen[i.group] == split) for split in SPLITS}
    if items and not result["train"]:
        raise ConfigError(f"0 of {len(items)} images are for training: name some 'train' in the split column")
    return result


def _deal(groups: Sequence[str], split: SplitConfig) -> dict[str, str]:
    def rank(group: str) -> bytes:
        return hashlib.sha256(f"{split.seed}/{group}".encode()).digest()

    order = sorted(groups, key=rank)
    shares = {"val": split.val, "test": split.test}
    counts = {name: round(share * len(order)) for name, share in shares.items()}
    for place, name in enumerate((name for name in shares if shares[name] > 0), 2):
        if len(order) >= place:  # the first group trains, the second validates, the third tests
            counts[name] = max(counts[name], 1)
    while order and sum(counts.values()) >= len(order):
        counts[max(counts, key=lambda name: (counts[name], name == "test"))] -= 1
    names = ["test"] * counts["test"] + ["val"] * counts["val"]
    names += ["train"] * (len(order) - len(names))
    return dict(zip(order, names, strict=True))


def _item(root: Path, data: DataConfig, row: Mapping[str, Any]) -> Item:
    image: Path = row["image"]
    case, more = None, row.get("more", ())
    if data.modalities:
        case, more = siblings(image, data.modalities)
    stem = case or stem_of(image)
    name = image.relative_to(root).with_name(stem).as_posix()
    mask = row.get("mask")
    if mask is None and data.masks is not None:
        mask = mask_of(root, data.masks, image, stem)
    group = row.get("group") or group_of(stem, data.split)
    return Item(name, image, mask, str(group), row.get("split"), row.get("mpp"), row.get("spacing"), more, case)


def group_of(stem: str, split: SplitConfig) -> str:
    """The group of a file: its stem, or what ``group_regex`` finds in it.

    Raises:
        ConfigError: the expression does not match this file.
    """
    if split.by == "file" or split.group_regex is None:
        return stem
    found = re.search(split.group_regex, stem)
    if found is None:
        raise ConfigError(
            f"data.split.group_regex={split.group_regex!r} finds nothing in {stem!r}: make it match every file"
        )
    return next((part for part in found.groups() if part is not None), found.group(0))


def assign(items: Sequence[Item], split: str) -> tuple[Item, ...]:
    """The same items, all marked as belonging to one split."""
    return tuple(replace(item, split=split) for item in items)
