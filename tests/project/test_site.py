"""The site's navigation. Building the site, which checks its links, is `make docs`."""

import importlib.util
import io
import re
import sys
import zipfile
from types import SimpleNamespace
from unittest import mock

import pytest
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


@pytest.fixture
def hooks(monkeypatch):
    """docs/_hooks.py, where mkdocs need not be installed."""
    for name in ("mkdocs.config.defaults", "mkdocs.structure.files", "mkdocs.structure.pages"):
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_that_pages_link_to_are_part_of_the_site(hooks, monkeypatch):
    """Files as they are, and folders of runs as an archive."""
    added = {}
    generated = SimpleNamespace(generated=lambda config, uri, **source: added.update({uri: source}))
    monkeypatch.setattr(hooks, "File", generated)
    docs = ROOT / CONFIG["docs_dir"]
    config = {"docs_dir": str(docs)}
    texts = {path.relative_to(docs).as_posix(): path.read_text() for path in docs.rglob("*.md")}
    pages = [SimpleNamespace(content_string=text) for text in texts.values()]
    files = mock.MagicMock(documentation_pages=lambda: pages)
    hooks.on_files(files, config)
    linked = set()
    for uri, text in texts.items():
        page = SimpleNamespace(file=SimpleNamespace(src_uri=uri))
        site = hooks.on_page_markdown(text, page, config)
        assert "bench/results/" not in "".join(re.findall(r"\]\(.*?\)", site))
        linked.update(re.findall(r"\]\((?:\.\./)*(results/.*?)\)", site))
    assert linked == added.keys()
    runs = added["results/pays-epyc-avx2-1-thread/held-out-half.zip"]["content"]
    with zipfile.ZipFile(io.BytesIO(runs)) as archive:
        assert "held-out-half/dense-100.json" in archive.namelist()
    pages.append(SimpleNamespace(content_string="[runs](../bench/results/of-none.json)"))
    with pytest.raises(FileNotFoundError, match=r"of-none\.json, which is not there"):
        hooks.on_files(files, config)
