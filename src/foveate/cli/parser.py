"""An argparse parser whose mistakes are one-line errors that name the closest flag."""

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from foveate.errors import ConfigError


class VerbParser(argparse.ArgumentParser):
    """Parser of one verb; raises ``ConfigError`` where argparse would print its usage and leave."""

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(prog=f"foveate {verb}", description=description, allow_abbrev=False)

    def add_keep_ratio(self) -> None:
        """The flag of the verbs that make masks with a model that may prune."""
        self.add_argument(
            "--keep-ratio",
            metavar="X",
            type=number,
            help="share of the tokens that go on at every prune point (default: as in training)",
        )

    def error(self, message: str) -> NoReturn:
        """Turn argparse's complaint into the library's one-line error."""
        raise ConfigError(f"{message}; see {self.prog} --help")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse all words; an unknown one is an error that names the closest flag."""
        args, overrides = self.parse_with_overrides(words)
        if overrides:
            self.refuse(f"--{overrides[0]}")
        return args

    def parse_with_overrides(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parse the known words and return the ``--section.key=value`` ones, in order, as ``section.key=value``."""
        overrides: list[str] = []
        others: list[str] = []
        rest = iter(words)
        for word in rest:  # before argparse, to which a word with a space in it is no flag
            name, equals, value = word.partition("=")
            if not name.startswith("--") or name in self._option_string_actions:
                others.append(word)
                continue
            if "." not in name:  # before argparse complains that the misspelled flag is missing
                self.refuse(word)
            if not equals:
                value = next(rest, "")
                if not value or value.startswith("--"):
                    raise ConfigError(f"{name} has no value; write {name}=VALUE")
            overrides.append(f"{name[2:]}={value}")
        args, unknown = self.parse_known_args(others)
        if unknown:
            self.refuse(unknown[0])
        return args, overrides

    def refuse(self, word: str) -> NoReturn:
        """Raise the error about a word that the verb does not know."""
        flag = word.split("=")[0]
        if not flag.startswith("-"):
            raise ConfigError(f"unexpected argument {word!r}; see {self.prog} --help")
        hint = closest(flag, self._option_string_actions)
        raise ConfigError(f"unknown flag {flag!r}{hint}; see {self.prog} --help")


def closest(word: str, known: Iterable[str]) -> str:
    """``", did you mean --out?"`` when one of the known words is near, else nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {matches[0]}?" if matches else ""


def say(text: str) -> None:
    """Write a line of a verb's answer to standard output."""
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")


def parse_shape(text: str) -> tuple[int, ...]:
    """``"4096x4096"`` or ``"128x128x96"`` as a spatial shape.

    Raises:
        ConfigError: not two or three positive whole numbers joined by x.
    """
    parts = text.lower().replace(",", "x").split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts) or len(parts) not in (2, 3):
        raise ConfigError(f"{text!r} is neither a file nor a shape; give a path, or a shape such as 4096x4096")
    return tuple(int(part) for part in parts)


def count(text: str) -> int:
    """A whole number as an argument; its limits are checked where it is used."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def number(text: str) -> float:
    """A number as an argument; its limits are checked where it is used."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
