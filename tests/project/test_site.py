"""The site's navigation. Building the site, which checks its links, is `make docs`."""

import yaml

from tests.support import ROOT

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages(nav):
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        else:
            for below in entry.values():
                yield from [below] if isinstance(below, str) else pages(below)


def test_every_page_is_in_the_navigation_once():
    docs = ROOT / CONFIG["docs_dir"]
    written = [path.relative_to(docs).as_posix() for path in docs.rglob("*.md")]
    assert sorted(pages(CONFIG["nav"])) == sorted(written)


def test_the_site_is_built_strictly_and_outside_of_the_docs():
    assert CONFIG["strict"] is True
    assert CONFIG["site_dir"] == "build/site"
    assert all((ROOT / hook).is_file() for hook in CONFIG["hooks"])
