"""Hooks of mkdocs: results that pages link to, under bench/results, are part of the site.

On GitHub a page links to them where they are, ``../bench/results/...``. The site has no folder
above docs/, so there they lie in ``results/``.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"\]\((?:\.\./)+bench/results/([^)]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the results that some page links to."""
    results = Path(config["docs_dir"]).parent / "bench/results"
    texts = [page.content_string for page in files.documentation_pages()]
    for name in sorted({name for text in texts for name in LINK.findall(text)}):
        path = results / name
        if not path.is_file():
            raise FileNotFoundError(f"a page links to {path}, which is not there")
        files.append(File.generated(config, f"results/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Link to the site's copy."""
    up = "../" * page.file.src_uri.count("/")
    return LINK.sub(rf"]({up}results/\1)", markdown)
