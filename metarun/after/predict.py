"""``metarun-predict``: a learner adapted to the examples in a file, and its predictions for those in another."""

import argparse
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from metarun.after.learner import Adapted, load
from metarun.after.rows import is_missing
from metarun.contracts import Examples, Reader
from metarun.errors import UserError
from metarun.system.files import write_text
from metarun.system.terminal import printable


def examples_in(converter: Reader, path: Path) -> Examples:
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


def with_targets(shown: Examples) -> Examples:
    """Return the rows of series whose target is known: the last rows of each have none yet."""
    if shown.y is None:
        return shown
    known = [i for i, target in enumerate(shown.y) if not is_missing(target)]
    return Examples(shown.x.iloc[known], [shown.y[i] for i in known], [shown.names[i] for i in known])


def table_of(names: Sequence[str], found: Sequence[Sequence[Mapping[str, Any]]], folder: Path) -> str:
    """Return predictions as CSV.

    Args:
        names: of the examples.
        found: the rows of each example, by column.
        folder: where pictures among the values are written, each to a file of its own; it is made where it is needed.
    """
    rows = []
    for name, of_example in zip(names, found, strict=True):
        for number, row in enumerate(of_example, 1):
            rows.append({"example": name, **row})
            for column, value in row.items():
                if isinstance(value, Image.Image):
                    folder.mkdir(parents=True, exist_ok=True)
                    file = folder / (f"{name}.png" if len(of_example) == 1 else f"{name}_{number}.png")
                    value.save(file)
                    rows[-1][column] = str(file)
    columns = dict.fromkeys(column for row in rows for column in row)
    header = sorted(columns, key=lambda column: column == "target") or ["example"]
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def rows_of(adapted: Adapted, answers: Sequence[Any], chances: Any, truth: Sequence[Any] | None) -> list[Any]:
    """Return the rows of each answer, the first one with probabilities where there are some."""
    own = getattr(adapted.task, "rows", lambda answer, truth: [{"prediction": answer}])
    found = [own(answer, None if truth is None else truth[i]) for i, answer in enumerate(answers)]
    if chances is not None and adapted.classes_ is not None:
        for i, rows in enumerate(found):
            rows[0].update({f"p({label})": chances[i][k] for k, label in enumerate(adapted.classes_)})
    return found


def predict(
    run: Path,
    support: Path,
    query: Path | None,
    out: Path,
    steps: int | None = None,
    device: str = "auto",
    trust: bool = False,
    config_dir: Path | None = None,
    count: int | None = None,
    seed: int = 0,
) -> str:
    """Adapt to the examples in ``support``, and write predictions to ``out``; return a sentence.

    Predictions are those for the examples in ``query``, or ``count`` answers drawn with ``seed``.

    Raises:
        UserError: anything that the user can fix.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file for the predictions with --out.")
    learner = load(run, device, trust, config_dir)
    converter, names = learner.learned.converter, learner.learned.names
    if converter is None or learner.spec.offers("policy"):
        raise UserError(
            f"algo={names['algo']} on task={names['task']} reads no files; adapt it in Python (docs/learner.md)."
        )
    if (query is None) == (count is None):
        raise UserError("Give either --query, what is to be predicted, or --count, how many answers are to be drawn.")
    shown = examples_in(converter, support)
    if getattr(getattr(converter, "recipe", None), "history", None) is not None:
        shown = with_targets(shown)
    if shown.y is None and not hasattr(converter, "task"):
        raise UserError(f"{support} has no targets; give each example a label or a number to learn from.")
    truth, chances, numbers = None, None, [str(i + 1) for i in range(count or 0)]
    try:
        adapted = learner.adapt(shown.x, shown.y, steps)
        if query is None:
            answers = adapted.sample(count, seed)
        else:
            asked = examples_in(converter, query)
            truth, numbers = asked.y, list(asked.names)
            answers = adapted.predict(asked.x)
            chances = adapted.predict_proba(asked.x) if adapted.classes_ is not None else None
        compared = getattr(adapted.task, "compared", None)
        agreement = "" if truth is None or compared is None else f"; {compared(answers, truth)}"
    except ValueError as error:
        raise UserError(f"{str(error).rstrip('.')}.") from error
    write_text(out, table_of(numbers, rows_of(adapted, answers, chances, truth), out.with_name(f"{out.stem}_pictures")))
    return f"{len(numbers)} predictions from {len(shown.names)} examples: {out}{agreement}"


def main() -> None:
    """Entry point of ``metarun-predict``."""
    parser = argparse.ArgumentParser(
        prog="metarun-predict",
        description="Adapt the learner of a finished run to a few examples, and predict others.",
    )
    parser.add_argument("run", type=Path, metavar="DIR", help="directory of a run, or a copy of its best.pt")
    parser.add_argument("--support", type=Path, required=True, metavar="PATH", help="file or folder to learn from")
    parser.add_argument("--query", type=Path, metavar="PATH", help="file or folder to predict")
    parser.add_argument("--count", type=int, metavar="N", help="how many answers to draw where there is no query")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of answers that are drawn (0)")
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
                    *(given.device, given.trust, given.config_dir, given.count, given.seed),
                )
            )
        )
    except UserError as error:
        sys.exit(printable(f"metarun-predict: {error}"))
    except OSError as error:
        sys.exit(printable(f"metarun-predict: {error.filename} cannot be used ({error.strerror or error})."))
