"""What the site takes from outside of docs/: the benchmarks' pictures, how to contribute, and what has changed.

In the repository a page reaches them by `../`, so that its links work where it is read as a file, too.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the files, under their paths in the repository."""
    for path in (*(ROOT / page for page in PAGES), *sorted((ROOT / "benchmarks" / "results").glob("*.png"))):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """On the site, docs/ and the repository's root are one folder."""
    return markdown.replace("](docs/" if page.file.src_uri in PAGES else "](../", "](")
