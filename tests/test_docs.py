"""What the pages of the documentation name exists, and what exists is named where readers look for it."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import composed

from metarun.assemble import algorithm_names
from metarun.command.catalogue import first_that_fits, references

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PLACEHOLDERS = {"NAME": "maml", "ALGO": "maml", "K": "1", "ARMS": "5", "PULLS": "10"}
ELSEWHERE = ("--", "$", "...", "resume=", "hydra/")
"""What makes a command one of another configuration, a part of one, or one for a library that tests lack."""


def commands(page):
    """Return the overrides of each command ``metarun KEY=VALUE ...`` on a page, and whether it is a sweep."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("metarun ")]
    inline = re.findall(r"`(metarun [^`]+=[^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    for command in dict.fromkeys([*lines, *(" ".join(one.split()) for one in inline)]):
        if not any(mark in command for mark in ELSEWHERE):
            words = shlex.split(command, comments=True)[1:]
            yield [one for one in words if one != "-m"], "-m" in words


def values(override, sweep):
    """Return an override, or each of those that a sweep makes of it, with something in place of a placeholder."""
    key, _, value = override.partition("=")
    several = re.split(r",(?![^\[({]*[\])}])", value) if sweep else [value]
    return [f"{key}={PLACEHOLDERS.get(one, one)}" for one in several]


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=lambda page: page.name)
def test_commands_compose(page):
    jobs = set()
    for overrides, sweep in commands(page):
        choices = [values(one, sweep) for one in overrides if not one.startswith(("hydra.", "seed="))]
        first = [own[0] for own in choices]
        jobs |= {(*first[:i], one, *first[i + 1 :]) for i, own in enumerate(choices) for one in own}
    assert jobs
    for job in jobs:
        composed(*job)


@pytest.mark.parametrize(
    ("group", "page"), [("algo", "README.md"), ("task", "docs/data.md"), ("model", "docs/models.md")]
)
def test_a_page_names_every_member_of_a_group(group, page):
    named = set(re.findall(r"`([a-z0-9_]+)`", (ROOT / page).read_text()))
    assert {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")} <= named


def test_the_page_of_learners_names_the_methods_that_take_any_number_of_classes():
    [sentence] = re.findall(
        r"make their head from the examples \((.*?)\)", (ROOT / "docs/learner.md").read_text(), re.S
    )
    tried = references()
    open_ways = {name for name in algorithm_names() if first_that_fits(name, tried)[0].open_ways}
    assert set(re.findall(r"`(\w+)`", sentence)) == open_ways
