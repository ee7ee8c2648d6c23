"""What becomes of an image that cannot be read: it is left out, and said in one line."""

import sys

from foveate.errors import FormatError, MissingExtraError
from foveate.tasks.items import Item

UNREADABLE = (FormatError, MissingExtraError, OSError, MemoryError)
"""What one bad file raises; the others go on without it."""


def skipped_line(item: Item, error: BaseException) -> str:
    """Which image could not be used and why, in one line."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if str(item.image) in line else f"{item.image}: {line}"


def to_stderr(line: str) -> None:
    """Say a line where it does not mix with results."""
    sys.stderr.write(line + "\n")
