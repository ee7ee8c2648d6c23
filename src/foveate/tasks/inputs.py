"""What ``predict`` was asked about: files, folders, globs, manifests, and the folders that are one image."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from foveate.errors import ConfigError
from foveate.tasks.files import is_image, siblings, stem_of
from foveate.tasks.items import Item, find_items
from foveate.tasks.settings import DataConfig

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".npy")
_SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".qptiff")
_VOLUMES = (".nii", ".nii.gz")


def find_inputs(inputs: Sequence[str | Path]) -> list[Item]:
    """Expand files, folders, globs and manifests into images, in the order given and each once.

    Args:
        inputs: Paths. A folder stands for the images, slides and volumes in it, but a zarr folder and a folder of
            DICOM files are one image; a CSV/JSONL manifest for the rows in it, with their ``mpp`` and ``spacing``.

    Raises:
        ConfigError: One of them names nothing.
    """
    items: dict[Path, Item] = {}
    for given in inputs:
        found = sorted(_expand(Path(given)), key=lambda item: item.image)
        if not found:
            raise ConfigError(f"{given}: names no image; give an image file, a folder of images, a glob or a manifest")
        for item in found:
            items.setdefault(item.image, item)
    return list(items.values())


def with_modalities(items: Sequence[Item], modalities: Sequence[str] | None) -> list[Item]:
    """Put the files of each image together, found beside that of the first modality; all others are passed over.

    Args:
        items: what was found.
        modalities: ``data.modalities`` of the model.

    Raises:
        ConfigError: there is no file of the first modality, or one of another is missing.
    """
    if not modalities:
        return list(items)
    first = [item for item in items if stem_of(item.image).endswith(modalities[0])]
    if not first:
        raise ConfigError(
            f"{items[0].image} is no file of the modality {modalities[0]!r}: give that one, or the folder of all"
        )
    found = []
    for item in first:
        case, more = siblings(item.image, modalities)
        found.append(replace(item, more=more, case=case))
    return found


def _expand(path: Path) -> Iterator[Item]:
    if path.suffix.lower() in {".csv", ".jsonl"} and path.is_file():
        yield from find_items(DataConfig(root=str(path.parent), manifest=path.name, masks=None))
        return
    files: Iterator[Path] = iter(())
    if path.is_dir() and not is_image(path):
        files = (file for file in path.iterdir() if is_image(file) and (file.is_dir() or _is_known(file)))
    elif path.exists():
        files = iter([path])
    elif any(sign in path.name for sign in "*?["):
        files = (file for file in path.parent.glob(path.name) if is_image(file))
    for file in files:
        yield Item(file.name, file, None, file.name)


def _is_known(file: Path) -> bool:
    return file.name.lower().endswith(_PICTURES + _SLIDES + _VOLUMES)
