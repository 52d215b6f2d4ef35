"""Make pages of the documents at the top of the repository, so that the site needs no copies of them."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

TOP = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "SECURITY.md": "SECURITY.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the documents, with links as they are within the site."""
    for name, page in PAGES.items():
        text = (TOP / name).read_text().replace("](docs/", "](").replace("](README.md", "](index.md")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **others: Any) -> str:
    """Point links from ``docs/`` to the top of the repository at the pages."""
    for name, page in PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    return markdown
