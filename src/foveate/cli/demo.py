"""``foveate demo``: train the adaptive and the uniform model on synthetic images and draw the result."""

from pathlib import Path

from foveate.cli.parser import VerbParser, say
from foveate.errors import ConfigError


def run(words: list[str]) -> int:
    """Run the demonstration and print its table and the paths of what it wrote."""
    parser = VerbParser("demo", "Train the same ViT on adaptive and on uniform leaves for the same CPU minutes.")
    parser.add_argument("--minutes", type=float, help="training minutes for each of the two models (default: 1.5)")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("demo"), help="where to write (default: demo)")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: shows that it runs")
    args = parser.parse(words)
    if args.minutes is not None and not 0 < args.minutes <= 24 * 60:
        raise ConfigError(f"--minutes={args.minutes} must be above 0 and at most a day; try --minutes 2")

    from foveate.tasks.demo import run_demo

    result = run_demo(args.out, minutes=args.minutes, quick=args.quick, say=say)
    say(result.to_text())
    return 0
