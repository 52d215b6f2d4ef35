"""The pages on algorithms say what the algorithms are."""

from pathlib import Path

from metarun.command.catalogue import pages

DOCS = Path(__file__).parents[1] / "docs"


def test_the_pages_of_algorithms_are_up_to_date():
    for name, content in pages().items():
        assert (DOCS / name).read_text() == content, "run: python -m metarun.command.catalogue docs"
