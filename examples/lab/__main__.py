"""The lab's one command line: `python -m lab COMMAND ...`, in the folder examples/."""

from __future__ import annotations

import argparse
import importlib

COMMANDS = {
    "train": "train a model, with CGC or without it, or both side by side",
    "evaluate": "put trained models side by side: accuracy, heatmaps, insertion and deletion, random weights",
    "visualize": "draw the heatmaps of a trained model for images of your own",
    "study": "make the trainings of a study, each once, and report them",
    "explanations": "train with CGC on each explanation, and measure what becomes of its own CGC loss",
    "teacher": "let a small student follow a teacher's predictions, and its heatmaps too",
    "dimensions": "train the recipes for volumes, clips and signals with CGC and without it",
    "summarize": "print mean and range over several runs of train --compare",
    "benchmark": "measure what a training step with CGC costs",
    "notebook": "run the notebook of this folder from top to bottom",
}


def main(argv: list[str] | None = None) -> None:
    """Hand the options on to the command that is named."""
    parser = argparse.ArgumentParser(
        prog="python -m lab",
        usage="%(prog)s COMMAND ...",
        description="commands:\n" + "\n".join(f"  {name:12} {about}" for name, about in COMMANDS.items()),
        epilog="python -m lab COMMAND --help lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    # Each command imports what it alone needs, such as Jupyter or scipy.
    importlib.import_module(f"lab.{args.command}").main(args.options)


if __name__ == "__main__":
    main()
