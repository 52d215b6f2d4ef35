"""``metarun-report``: one HTML page on runs, to read on a screen, on a phone or on paper.

The page needs no other file. It has what ``metarun-compare`` prints, in words and in tables that sort, and curves over
steps, seconds and adaptation, the scores of single episodes and seeds, and the configurations in which runs differ.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import metarun
from metarun.errors import UserError
from metarun.results.compare import Comparison, compared
from metarun.results.comparison import printing
from metarun.results.page import html
from metarun.system.files import write_text
from metarun.system.terminal import printable


def page_of(comparison: Comparison, out: Path) -> str:
    """Return the page."""
    # matplotlib takes half a second to import, and errors should not wait for it.
    from metarun.results.page.sections import ranks, section

    settings = comparison.settings
    runs = sum(len(one.runs) for one in settings)
    title = f"{runs} run{'s' * (runs != 1)} in {len(settings)} setting{'s' * (len(settings) != 1)}"
    contents = [
        (f"setting{number}", one.title, printing.sentence(one.families, one.table, one.metric))
        for number, one in enumerate(settings)
    ]
    intervals = (
        "Intervals are 95 % confidence intervals: for several seeds over seeds and episodes together, which is what a "
        "claim about a method needs; for one seed over the test episodes of that model. Click on a heading to sort."
    )
    parts = [
        html.heading(1, title),
        html.paragraph(f"metarun {metarun.__version__}. {intervals}", "pale"),
        html.contents(contents) if len(settings) > 1 else "",
        *ranks(comparison),
        *(part for number, one in enumerate(settings) for part in section(one, number, out)),
    ]
    if comparison.notes:
        parts += [html.heading(2, "What was left out", "notes"), html.list_of(comparison.notes)]
    return html.page(f"metarun: {title}", [part for part in parts if part])


def report(paths: Sequence[Path], out: Path, reference: str | None = None, filters: Sequence[str] = ()) -> None:
    """Write the page.

    Args:
        paths: directories above runs, or result tables.
        out: the file.
        reference: name of an algorithm, from which every row shows its difference.
        filters: KEY=VALUE that runs must have.

    Raises:
        UserError: nothing to report, or an argument that fits no run.
    """
    write_text(out, page_of(compared(paths, reference, filters), out.resolve()))


def main() -> None:
    """Entry point of ``metarun-report``."""
    parser = argparse.ArgumentParser(
        prog="metarun-report", description="Write one HTML page on runs, which needs no other file."
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="directories of runs, or result CSVs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (report.html in the first directory)")
    parser.add_argument("--against", metavar="ALGO", help="also show each row's difference from this algorithm's")
    parser.add_argument(
        "--filter", action="append", default=[], metavar="KEY=VALUE", help="only runs with this (repeatable; a,b: or)"
    )
    given = parser.parse_args()
    out = given.out or next((path for path in given.paths if path.is_dir()), Path()) / "report.html"
    if out.is_dir():
        out /= "report.html"
    try:
        report(given.paths, out, given.against, given.filter)
        print(f"report: {out}")
    except UserError as error:
        sys.exit(printable(f"metarun-report: {error}"))
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        sys.exit(
            f"metarun-report: {out} cannot be written ({error.strerror or error}); choose another file with --out."
        )
