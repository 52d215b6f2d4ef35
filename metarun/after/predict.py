"""``metarun-predict``: a learner adapted to the examples in a file, and its predictions for those in another."""

import argparse
import csv
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

from metarun.after.learner import load
from metarun.contracts import Converter, Examples
from metarun.errors import UserError
from metarun.system.files import write_text
from metarun.system.terminal import printable


def examples_in(converter: Converter, path: Path) -> Examples:
    """Read the examples in a file or a folder.

    Raises:
        UserError: there are none that the converter can read.
    """
    if not path.exists():
        raise UserError(f"There is no {path}; name a file or a folder with examples.")
    try:
        return converter.read(path)
    except ValueError as error:
        raise UserError(f"{str(error).rstrip('.')}.") from error


def table_of(names: Any, answers: Any, chances: Any, classes: Any, truth: Any) -> str:
    """Return predictions as CSV: name, prediction (one column per number), probabilities, and the truth if known."""
    answers = np.asarray(answers)
    several = answers.ndim > 1 and answers.shape[1] > 1
    columns = answers.reshape(len(answers), -1)
    header = ["example", *([f"prediction_{i + 1}" for i in range(columns.shape[1])] if several else ["prediction"])]
    header += [f"p({label})" for label in classes] if classes is not None else []
    header += ["target"] if truth is not None else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for i, name in enumerate(names):
        row = [name, *columns[i].tolist(), *(chances[i].tolist() if chances is not None else [])]
        writer.writerow([*row, truth[i]] if truth is not None else row)
    return text.getvalue()


def predict(
    run: Path,
    support: Path,
    query: Path,
    out: Path,
    steps: int | None = None,
    device: str = "auto",
    trust: bool = False,
    config_dir: Path | None = None,
) -> str:
    """Adapt to the examples in ``support``, write predictions for those in ``query`` to ``out``; return a sentence.

    Raises:
        UserError: anything that the user can fix.
    """
    learner = load(run, device, trust, config_dir)
    converter, names = learner.learned.converter, learner.learned.names
    if converter is None or learner.spec.offers("policy"):
        raise UserError(
            f"algo={names['algo']} on task={names['task']} reads no files; adapt it in Python (docs/learner.md)."
        )
    shown, asked = examples_in(converter, support), examples_in(converter, query)
    if shown.y is None:
        raise UserError(f"{support} has no targets; give each example a label or a number to learn from.")
    try:
        adapted = learner.adapt(shown.x, shown.y, steps)
        answers = adapted.predict(asked.x)
        chances = adapted.predict_proba(asked.x) if adapted.classes_ is not None else None
    except ValueError as error:
        raise UserError(f"{str(error).rstrip('.')}.") from error
    write_text(out, table_of(asked.names, answers, chances, adapted.classes_, asked.y))
    said = f"{len(asked.names)} predictions from {len(shown.names)} examples: {out}"
    if asked.y is None:
        return said
    truth = np.asarray(asked.y)
    if adapted.classes_ is not None:
        right = float(np.mean([found == true for found, true in zip(answers.tolist(), truth.tolist(), strict=True)]))
        return f"{said}; accuracy on their own labels {100 * right:.2f} %"
    return f"{said}; mean squared error on their own targets {float(np.square(answers - truth).mean()):.4g}"


def main() -> None:
    """Entry point of ``metarun-predict``."""
    parser = argparse.ArgumentParser(
        prog="metarun-predict",
        description="Adapt the learner of a finished run to a few examples, and predict others.",
    )
    parser.add_argument("run", type=Path, metavar="DIR", help="directory of a run, or a copy of its best.pt")
    parser.add_argument("--support", type=Path, required=True, metavar="PATH", help="file or folder to learn from")
    parser.add_argument("--query", type=Path, required=True, metavar="PATH", help="file or folder to predict")
    parser.add_argument("--out", type=Path, default=Path("predictions.csv"), metavar="FILE", help="(predictions.csv)")
    parser.add_argument("--steps", type=int, metavar="N", help="adaptation steps (as in the run's tests)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="your own configuration, as for metarun")
    parser.add_argument("--trust", action="store_true", help="let the checkpoint name code: for runs of your own")
    given = parser.parse_args()
    # As with the command, _target_ can name modules in the current folder.
    sys.path.append(str(Path.cwd()))
    try:
        print(
            printable(
                predict(
                    *(given.run, given.support, given.query, given.out, given.steps),
                    *(given.device, given.trust, given.config_dir),
                )
            )
        )
    except UserError as error:
        sys.exit(printable(f"metarun-predict: {error}"))
    except OSError as error:
        sys.exit(printable(f"metarun-predict: {error.filename} cannot be used ({error.strerror or error})."))
