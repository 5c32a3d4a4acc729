"""Hooks of mkdocs: results that pages link to, under bench/results, are part of the site.

On GitHub a page links to them where they are, ``../bench/results/...``. The site has no folder
above docs/, so there they lie in ``results/``. A folder of runs is one archive there.
"""

import io
import re
import zipfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"\]\((?:\.\./)+bench/results/([^)]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the results that some page links to."""
    texts = [page.content_string for page in files.documentation_pages()]
    for name in sorted({name for text in texts for name in LINK.findall(text)}):
        path = _results(config) / name
        if path.is_dir():
            files.append(File.generated(config, f"results/{name}.zip", content=_archive(path)))
        elif path.is_file():
            files.append(File.generated(config, f"results/{name}", abs_src_path=str(path)))
        else:
            raise FileNotFoundError(f"a page links to {path}, which is not there")
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Link to the site's copy."""
    up = "../" * page.file.src_uri.count("/")

    def link(found: re.Match[str]) -> str:
        name = found[1]
        ending = ".zip" if (_results(config) / name).is_dir() else ""
        return f"]({up}results/{name}{ending})"

    return LINK.sub(link, markdown)


def _results(config: MkDocsConfig) -> Path:
    return Path(config["docs_dir"]).parent / "bench/results"


def _archive(folder: Path) -> bytes:
    """The same bytes for the same files."""
    to = io.BytesIO()
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            entry = zipfile.ZipInfo(f"{folder.name}/{path.name}")  # no time of its own
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return to.getvalue()
