"""The page of algorithms says what the algorithms are."""

from pathlib import Path

from metarun.command.catalogue import catalogue


def test_the_page_of_algorithms_is_up_to_date():
    page = Path(__file__).parents[1] / "docs" / "algorithms.md"
    assert page.read_text() == catalogue(), "run: python -m metarun.command.catalogue > docs/algorithms.md"
