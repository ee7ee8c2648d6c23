"""The command line: ``foveate VERB ...``. A verb's module is imported only when the verb is chosen.

Exit codes: 0 done, 2 a mistake that the user can mend (one line on standard error), 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from foveate import __version__
from foveate.errors import ConfigError, FoveateError

VERBS = {
    "inspect": "show where an image's leaves go, or check a data set",
    "plan": "tokens, FLOPs and bytes of each stage, before anything runs",
    "fit": "train a segmenter or a classifier from a YAML file",
    "predict": "write masks, or labels with heatmaps, for images",
    "embed": "write the features of every patch, one file per slide",
    "evaluate": "score a run at full resolution",
    "bench": "run a benchmark of the source checkout",
    "demo": "train on synthetic images and draw the result, in minutes",
}

_USAGE = """usage: foveate [--version] [--debug] VERB ...

High-resolution image transformers that spend their tokens where the image has something to say.

{verbs}

foveate VERB --help explains a verb; --debug shows the traceback of an error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors that a user can mend become one line on standard error.

    Args:
        argv: the words after ``foveate``; those of the process by default.

    Returns:
        0 when done, 2 after an error, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words)
    except KeyboardInterrupt as stop:
        text = one_line(stop) if str(stop) else "what was written before is complete"
        sys.stderr.write(f"foveate: interrupted: {text}\n")
        return 130
    except BrokenPipeError:  # whoever read our output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (FoveateError, OSError, MemoryError) as error:
        if debug:
            raise
        sys.stderr.write(f"foveate: error: {one_line(error)}\n")
        return 2
    except SystemExit as stop:  # argparse after --help
        return int(stop.code or 0)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        lines = "\n".join(f"  {name:<10}{text}" for name, text in VERBS.items())
        sys.stdout.write(_USAGE.format(verbs=lines))
        return 0
    if words[0] in ("--version", "-V"):
        sys.stdout.write(f"foveate {__version__}\n")
        return 0
    verb, *rest = words
    if verb not in VERBS:
        from foveate.cli.parser import closest

        kind = "flag" if verb.startswith("-") else "verb"
        hint = closest(verb, VERBS)
        raise ConfigError(f"unknown {kind} {verb!r}{hint}; the verbs are {', '.join(VERBS)}")
    run = import_module(f"foveate.cli.{verb}").run
    return int(run(rest))


def one_line(error: BaseException) -> str:
    """An error as one line: user errors as they are, file errors with their cause and path first."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        text = f"{error.strerror}{where}"
    elif isinstance(error, MemoryError):
        text = f"out of memory {error}; use fewer leaves, a smaller batch, or look at foveate plan first"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())
