"""``foveate evaluate RUN``: score a run, masks at full resolution, labels with intervals."""

import argparse
from pathlib import Path

from foveate.cli.parser import VerbParser, say
from foveate.errors import ConfigError, FormatError


def run(words: list[str]) -> int:
    """Score a run on one split and print the table; images that cannot be scored are an error after it."""
    parser = VerbParser("evaluate", "Score a run in pixel space at full resolution, beside the tree's own ceiling.")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("--split", default="test", help="which split: train, val or test (default: test)")
    parser.add_argument("--data-root", metavar="DIR", help="where the data is, when it has moved since training")
    parser.add_keep_ratio()
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), help="in which masks are made (default: the run's, auto)"
    )
    args = parser.parse(words)

    from foveate.tasks.fit import task_of_run

    failed, scored = (_labels if task_of_run(args.run) == "recognition" else _masks)(args)
    if failed:
        raise FormatError(
            f"{len(failed)} of {len(failed) + scored} images have no score (first: {failed[0]}); "
            "mend or leave out these files"
        )
    return 0


def _masks(args: argparse.Namespace) -> tuple[tuple[str, ...], int]:
    """Score a segmentation run; return what failed, and how many images were scored."""
    from foveate.tasks.evaluate import evaluate
    from foveate.tasks.predict import load_model
    from foveate.tasks.report import Gallery, run_report

    _, config = load_model(args.run)
    gallery = Gallery(config.data.class_names, groups=config.data.groups)
    evaluation = evaluate(
        args.run,
        split=args.split,
        data_root=args.data_root,
        keep_ratio=args.keep_ratio,
        precision=args.precision,
        on_image=gallery,
    )
    page = args.run / "evaluation" / f"{evaluation.split}.html"
    run_report(evaluation, gallery).save(page)
    say(str(evaluation))
    say(f"report: {page}")
    return evaluation.failed, len(evaluation.rows)


def _labels(args: argparse.Namespace) -> tuple[tuple[str, ...], int]:
    """The same for a recognition run."""
    for name in ("keep_ratio", "precision"):
        if (value := getattr(args, name)) is not None:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option}={value} is for masks, and {args.run} says labels; leave it out")
    from foveate.tasks.recognition_evaluate import evaluate_labels

    evaluation = evaluate_labels(args.run, split=args.split, data_root=args.data_root)
    say(str(evaluation))
    say(f"report: {args.run / 'evaluation' / f'{args.split}.html'}")
    return evaluation.failed, len(evaluation.rows)
