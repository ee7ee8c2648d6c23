"""Settings from and to files: YAML with dotted overrides in, complete YAML out.

The settings themselves, with what each means, are in :mod:`foveate.tasks.settings`.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from foveate.errors import ConfigError
from foveate.tasks.settings import (
    DataConfig,
    FitConfig,
    ModelSpec,
    SplitConfig,
    TrainConfig,
    TreeConfig,
    parse_bytes,
)

__all__ = [
    "DataConfig",
    "FitConfig",
    "ModelSpec",
    "SplitConfig",
    "TrainConfig",
    "TreeConfig",
    "config_from_dict",
    "config_to_dict",
    "load_as",
    "load_config",
    "parse_bytes",
    "read_settings",
    "save_config",
    "task_of",
]

Config = TypeVar("Config")
SEGMENTATION = "segmentation"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> FitConfig:
    """Read one YAML file about segmentation, put the overrides on top, and check everything.

    Args:
        path: YAML file; what it leaves out keeps its default.
        overrides: settings such as ``train.lr=1e-4`` (a leading ``--`` is allowed), the last one wins. Values are
            YAML, so ``false`` is false and ``null`` is none.

    Returns:
        The settings, complete and consistent.

    Raises:
        ConfigError: the file is missing or not YAML, or a setting is unknown, of the wrong type or contradictory.
    """
    return load_as(FitConfig, path, overrides)


def load_as(kind: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The same for the settings of any task.

    Args:
        kind: the settings' class, such as `FitConfig`.
        path: as in `load_config`.
        overrides: as in `load_config`.

    Raises:
        ConfigError: as in `load_config`, or the file is about another task.
    """
    given = read_settings(path, overrides)
    wanted = getattr(kind, "task", SEGMENTATION)
    if task_of(given) != wanted:
        raise ConfigError(f"{path} is about {task_of(given)}, not {wanted}: give another file, or set task: {wanted}")
    return config_from_dict(given if hasattr(kind, "task") else _without_task(given), kind)


def task_of(settings: Mapping[str, Any]) -> str:
    """What a file of settings is about: its ``task``, or ``segmentation`` where it does not say.

    Args:
        settings: from `read_settings`.
    """
    return str(settings.get("task", SEGMENTATION))


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> Mapping[str, Any]:
    """What a YAML file says, with the overrides on top; nothing is checked yet.

    Args:
        path: as in `load_config`.
        overrides: as in `load_config`.

    Raises:
        ConfigError: the file is missing or not YAML, or an override has no value.
    """
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a settings file: give an existing YAML file ({error})") from None
    try:
        given = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        place = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML: mend it ({place})") from None
    if not isinstance(given, Mapping):
        raise ConfigError(f"{path} holds {given!r}, not settings: write NAME: VALUE lines")
    for option in overrides:
        key, equals, value = option.removeprefix("--").partition("=")
        if not equals or not key:
            raise ConfigError(f"{option} has no value: write {key or 'NAME'}=VALUE")
        given = _merge(given, _nested(key, _value(value)))
    return given


@typing.overload
def config_from_dict(values: Mapping[str, Any]) -> FitConfig: ...


@typing.overload
def config_from_dict(values: Mapping[str, Any], kind: type[Config]) -> Config: ...


def config_from_dict(values: Mapping[str, Any], kind: type[Any] = FitConfig) -> Any:
    """The settings that a nested dictionary describes, such as :func:`config_to_dict` returns.

    Args:
        values: nested settings; what is left out keeps its default.
        kind: the settings' class.

    Raises:
        ConfigError: a setting is unknown, of the wrong type or contradictory.
    """
    from jsonargparse import ArgumentParser

    _check_keys(kind, kind, values, "")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        complete = parser.parse_object(_plain(_filled(kind, values)))
    except Exception as error:  # noqa: BLE001 - jsonargparse has no common base; all of them are mistakes in settings
        raise ConfigError(_one_line(error)) from None
    return _build(kind, complete.as_dict())


def config_to_dict(config: Any) -> dict[str, Any]:
    """The settings as plain nested dictionaries, lists and scalars, in the order of the fields."""
    plain = _plain(dataclasses.asdict(config))
    assert isinstance(plain, dict)
    return plain


def save_config(config: Any, path: str | Path) -> None:
    """Write the complete settings as YAML that :func:`load_config` reads back equal."""
    import yaml

    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def _without_task(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != "task"}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _nested(key: str, value: Any) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return {head: _nested(rest, value) if rest else value}


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both and isinstance(old, Mapping) else value
    return merged


def _value(text: str) -> Any:
    """A list as YAML reads it; everything else stays text until its setting's type is known (``#ff0000``, ``02``)."""
    import yaml

    if not text.startswith("["):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _fields(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _check_keys(root: type, kind: type, given: object, where: str) -> None:
    """Refuse a name that no setting has, with the closest one that exists."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where or 'the settings'}={given!r} is not a group of settings: write NAME: VALUE lines")
    known = _fields(kind)
    for key, value in given.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in known:
            close = _closest(root, name)
            hint = f"did you mean {close}?" if close else f"known are {', '.join(known)}"
            raise ConfigError(f"{name} is not a setting: {hint}")
        if dataclasses.is_dataclass(known[key]) and isinstance(known[key], type):
            _check_keys(root, known[key], value, name)
        named = _named(known[key])
        for inner, group in value.items() if named and isinstance(value, Mapping) else ():
            _check_keys(root, named or kind, group, f"{name}.{inner}")


def _filled(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the defaults in groups that have names of the user's own, which the parser wants complete."""
    filled = dict(given)
    for key, hint in _fields(kind).items():
        if key in given and dataclasses.is_dataclass(hint) and isinstance(hint, type):
            filled[key] = _filled(hint, given[key])
        elif key in given and (named := _named(hint)):
            filled[key] = {name: dataclasses.asdict(named()) | dict(group) for name, group in given[key].items()}
    return filled


def _named(hint: Any) -> type | None:
    """The class of the groups of settings that have names of the user's own: D of ``dict[str, D]``."""
    options = typing.get_args(hint) if typing.get_origin(hint) is dict else ()
    return next((option for option in options if dataclasses.is_dataclass(option) and isinstance(option, type)), None)


def _closest(root: type, name: str) -> str | None:
    names = list(_all_names(root, ""))
    leaf = name.rpartition(".")[2]
    same = [known for known in names if known.rpartition(".")[2] == leaf]
    found = same or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not found:
        near = difflib.get_close_matches(leaf, [known.rpartition(".")[2] for known in names], n=1, cutoff=0.6)
        found = [known for known in names if near and known.rpartition(".")[2] == near[0]]
    return found[0] if found else None


def _all_names(kind: type, where: str) -> Iterator[str]:
    for key, value in _fields(kind).items():
        name = f"{where}.{key}" if where else key
        if dataclasses.is_dataclass(value) and isinstance(value, type):
            yield from _all_names(value, name)
        elif named := _named(value):
            yield from _all_names(named, f"{name}.NAME")
        yield name


def _build(kind: type, values: Mapping[str, Any]) -> Any:
    """Construct a dataclass from a complete nested dictionary, so that its own checks speak unchanged."""
    arguments: dict[str, Any] = {}
    for name, hint in _fields(kind).items():
        value = values[name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            value = _build(hint, value)
        elif named := _named(hint):
            # the default's groups are there already, as values
            value = {key: v if isinstance(v, named) else _build(named, v) for key, v in value.items()}
        elif _is_tuple(hint) and value is not None:
            value = tuple(value)
        arguments[name] = value
    return kind(**arguments)


def _is_tuple(hint: Any) -> bool:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(typing.get_origin(option) is tuple for option in options)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).replace("<class '", "").replace("'>", "").split())
    found = re.search(r'[Kk]ey "([^"]+)":?\s*(.*)', text)
    if not found:
        return f"the settings cannot be read: mend them ({text[:200]})"
    name, rest = found.groups()
    value = re.search(r"(?:Got value|Given value): (.*?)(?:\s*$| Subtypes)", rest)
    kind = re.search(r"Expected an? ([\w.\[\], |]+?)\. Got|Subtypes: \[(.*?)\] Errors", rest)
    wanted = next((group for group in kind.groups() if group), "another type") if kind else "another type"
    shown = value.group(1) if value else "value"
    return f"{name}={shown} has the wrong type: give {wanted.replace('NoneType', 'null')}"
