"""What CI, pre-commit, the Makefile and pyproject.toml say of each other and of the tree."""

import os
import re
import sys

import pytest
import yaml

from tests.support import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WORKFLOWS = {
    path.name: yaml.safe_load(path.read_text())
    for path in sorted((ROOT / ".github/workflows").glob("*.yml"))
}
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MADE = ("build/", "dist/")  # what a workflow itself makes
ON = True  # which is what YAML reads from "on"

each_workflow = pytest.mark.parametrize("workflow", WORKFLOWS.values(), ids=WORKFLOWS.keys())


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def commands(workflow):
    return "\n".join(step["run"] for step in steps(workflow) if "run" in step)


def paths(text):
    """The words that read like a path in this tree, not like one behind a variable."""
    words = re.split(r"[\s\"'=]+", text)
    path = r"\.?[\w-][\w.-]*(/[\w.-]+)+|[\w-]+\.(in|py|toml|txt|yml)"
    return {word for word in words if re.fullmatch(path, word) and not word.startswith(MADE)}


def targets():
    return set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))


def makes(text):
    return set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE))


def recipe(target):
    return re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)[1]


@each_workflow
def test_commands_are_there(workflow):
    assert makes(commands(workflow)) <= targets()
    missing = {path for path in paths(commands(workflow)) if not (ROOT / path).exists()}
    assert not missing
    assert os.access(ROOT / ".ci/run", os.X_OK)


@each_workflow
def test_what_a_workflow_watches_and_uses_is_there(workflow):
    for trigger in workflow[ON].values():
        for pattern in (trigger or {}).get("paths", []):
            assert any(ROOT.glob(pattern)), pattern
    for job in workflow["jobs"].values():
        assert set(job.get("needs", [])) <= workflow["jobs"].keys()
        if "uses" in job:
            assert job["uses"].startswith("./")
            assert "workflow_call" in WORKFLOWS[(ROOT / job["uses"]).name][ON]


@each_workflow
def test_actions_are_pinned_by_their_major_version(workflow):
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used
    assert [name for name in used if not re.search(r"@(release/)?v\d+$", name)] == []


def test_only_a_tag_of_what_passed_is_published():
    allowed = {
        (name, job)
        for name, workflow in WORKFLOWS.items()
        for job, said in workflow["jobs"].items()
        if "id-token" in said.get("permissions", {})
    }
    assert allowed == {("wheels.yml", "publish")}
    jobs = WORKFLOWS["wheels.yml"]["jobs"]
    publish = jobs["publish"]
    assert set(publish["needs"]) == jobs.keys() - {"publish"}
    assert "github.ref_type == 'tag'" in publish["if"]
    assert publish["environment"]


def test_ci_runs_the_tests_the_sanitizers_and_the_site():
    run = commands(WORKFLOWS["cpu.yml"])
    assert {"sanitize", "docs"} <= makes(run)
    assert ".ci/run" in paths(run)
    assert makes((ROOT / ".ci/run").read_text()) == {"test"}


def test_make():
    phony = re.search(r"^\.PHONY: (.*)", MAKEFILE, re.MULTILINE)[1].split()
    assert set(phony) == targets()
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = makes("\n".join(page.read_text() for page in pages))
    assert "test" in named
    assert named <= targets()


def test_pre_commit_makes_the_checks_of_make():
    said = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"] for repo in said["repos"] for hook in repo["hooks"]]
    made = re.findall(r"^\t\$\(BIN\)/([\w-]+(?: [a-z]+)?)", recipe("check"), re.MULTILINE)
    assert made
    assert sorted(made) == sorted(re.match(r"\.venv/bin/([\w-]+(?: [a-z]+)?)", e)[1] for e in hooks)


def test_versions_of_python_agree():
    project = PYPROJECT["project"]
    classified = {
        line.split(" :: ")[-1]
        for line in project["classifiers"]
        if re.search(r"Python :: 3\.\d+$", line)
    }
    built = re.search(r"^cp3\{([\d,]+)\}-", PYPROJECT["tool"]["cibuildwheel"]["build"])[1]
    assert classified == {f"3.{minor}" for minor in built.split(",")}
    assert project["requires-python"] == f">={min(classified)}"
    rows = WORKFLOWS["cpu.yml"]["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert {min(classified), max(classified)} <= {row["python"] for row in rows} <= classified


def names(requirements):
    found = (re.match(r"[\w-]+", line) for line in requirements)
    return {name[0].lower() for name in found if name}


def test_extras_and_pinned_requirements_name_the_same():
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    dev = (ROOT / "requirements-dev.txt").read_text().splitlines()
    docs = (ROOT / "requirements-docs.txt").read_text().splitlines()
    users = [package for name in extras.keys() - {"docs"} for package in extras[name]]
    wanted = names(project["dependencies"] + users) - {"neq"}
    assert names(dev) == wanted
    assert names(extras["docs"]) <= names(docs)
    shared = names(dev) & names(docs)
    pinned = [[line.split()[0] for line in file if names([line]) & shared] for file in (dev, docs)]
    assert pinned[0] == pinned[1] != []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("make docs && make test", {"docs"}),
        ("say `make docs`, `make test`", {"docs", "test"}),
        ("what makes it", set()),
    ],
)
def test_makes(text, found):
    assert makes(text) == found


def test_paths():
    text = "sed s/a/b/ requirements.txt; .ci/run 'a/b.py' \"$TEMP/bin\" dist/x pin==1.0"
    assert paths(text) >= {".ci/run", "a/b.py"}
    assert not paths(text) & {"dist/x", "bin", "pin"}
