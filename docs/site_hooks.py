# SPDX-License-Identifier: Apache-2.0
"""MkDocs hooks: pages, pictures and examples that stand outside of `docs/`.

A page outside of `docs/`, such as CONTRIBUTING.md, is written once, for readers of the repository;
its links are relative to its place there. These hooks add it to the site and turn its links, and
links of the pages in `docs/` that leave the folder, into links of the site. A link to a file that
the site does not have becomes plain text, or leads to `repo_url` if mkdocs.yml sets one.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Path in the repository: path in the site.
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "csrc/README.md": "native.md",
    "benchmarks/README.md": "benchmarks_method.md",
    "examples/README.md": "examples.md",
}
PAGES |= {
    f"recipes/{path.parent.name}/README.md": f"recipes/{path.parent.name}.md"
    for path in sorted((ROOT / "recipes").glob("*/README.md"))
}
PICTURES = {
    f"benchmarks/results/{path.name}": f"images/{path.name}"
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.png"))
}
SCRIPTS = {
    str(path.relative_to(ROOT)): str(path.relative_to(ROOT))
    for path in sorted((ROOT / "examples").rglob("*"))
    if path.suffix in (".py", ".yaml", ".ipynb")
}
MOVED = PAGES | PICTURES | SCRIPTS
PLACES = {site: repository for repository, site in PAGES.items()}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
CODE = re.compile(r"^(```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Adds what stands outside of `docs/`."""
    for repository, site in PAGES.items():
        path = ROOT / repository
        files.append(File.generated(config, site, content=path.read_text()))
    for repository, site in (PICTURES | SCRIPTS).items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / repository)))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files, **_: Any) -> str:
    """Rewrites the links of a page, outside of its code blocks."""
    site = page.file.src_uri
    repository = PLACES.get(site, posixpath.join("docs", site))

    def rewritten(match: re.Match[str]) -> str:
        return link(match, repository, site, config.repo_url)

    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(rewritten, part) for part in parts[::2]]
    return "".join(parts)


def link(match: re.Match[str], repository: str, site: str, repo_url: str | None) -> str:
    """The link `match` of the page `repository`, as it stands on the page `site`."""
    mark, text, target = match.groups()
    path, hash_, anchor = target.partition("#")
    if not path or "://" in path or path.startswith("mailto:"):
        return match[0]
    meant = posixpath.normpath(posixpath.join(posixpath.dirname(repository), path))
    inside = MOVED.get(meant) or (meant[5:] if meant.startswith("docs/") else None)
    if inside is not None:
        place = posixpath.relpath(inside, posixpath.dirname(site) or ".")
        return f"{mark}[{text}]({place}{hash_}{anchor})"
    if repo_url:
        return f"{mark}[{text}]({repo_url.rstrip('/')}/blob/main/{meant})"
    return text
