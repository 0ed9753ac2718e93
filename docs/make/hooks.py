"""Give the site what lies beside docs/: README as its first page, and whatever pages link to."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# Pages of the site that lie elsewhere in the checkout.
PAGES = {
    "README.md": "index.md",
    "DESIGN.md": "design.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "kernels/block_sparse/README.md": "kernel.md",
}
_MODELS = "models/*"  # of the navigation in mkdocs.yml
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put every page of docs/ into the navigation: those of models below theirs, others first."""
    named = set(re.findall(r"[\w/.-]+\.md", str(config.nav)))
    docs = ROOT / "docs"
    missing = sorted({p.relative_to(docs).as_posix() for p in docs.rglob("*.md")} - named)
    models = [uri for uri in missing if uri.startswith("models/")]
    config.nav = _expanded(config.nav, models)
    config.nav[1]["Start"][2:2] = [uri for uri in missing if uri not in models]
    return config


def _expanded(nav: Any, models: list[str]) -> Any:
    if isinstance(nav, dict):
        return {title: _expanded(below, models) for title, below in nav.items()}
    if isinstance(nav, list):
        return [
            one
            for below in nav
            for one in (models if below == _MODELS else [_expanded(below, models)])
        ]
    return nav


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from elsewhere, and the files that pages link to, as they are."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text()))
    for file in list(files.documentation_pages()):
        for target in _LINK.findall(file.content_string):
            path = _path(file.src_uri, target)
            if _uri(path).startswith("files/") and not files.get_file_from_path(_uri(path)):
                raw = File.generated(config, _uri(path), abs_src_path=str(ROOT / path))
                files.append(raw)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the checkout into links between pages of the site."""

    def rewritten(link: re.Match[str]) -> str:
        path = _path(page.file.src_uri, link[1])
        if not (ROOT / path).is_file():
            return link[1]  # what is wrong, mkdocs names
        return posixpath.relpath(_uri(path), posixpath.dirname(page.file.src_uri))

    return _LINK.sub(rewritten, markdown)


def _path(uri: str, target: str) -> str:
    """Return the path from the root of the checkout that a link of a page means."""
    elsewhere = {uri: path for path, uri in PAGES.items()}
    page = elsewhere.get(uri, f"docs/{uri}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def _uri(path: str) -> str:
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path, f"files/{path}")
