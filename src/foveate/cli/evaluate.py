"""``foveate evaluate RUN``: score a run at full resolution."""

from pathlib import Path

from foveate.cli.parser import VerbParser, say


def run(words: list[str]) -> int:
    """Score a run on one split and print the table."""
    parser = VerbParser("evaluate", "Score a run in pixel space at full resolution, beside the tree's own ceiling.")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("--split", default="test", help="which split: train, val or test (default: test)")
    args = parser.parse(words)

    from foveate.tasks.evaluate import evaluate

    say(str(evaluate(args.run, split=args.split)))
    return 0
