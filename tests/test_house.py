"""The rules of the house: documents name what is there, all of it, and modules import one another in one direction."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("teacher", "student", "shared")
FOLDERS = (*PACKAGES, "configs", "tests")
DOCUMENTS = [ROOT / "README.md", *sorted(path for top in FOLDERS for path in (ROOT / top).rglob("*.md"))]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def code_spans(document: Path) -> set[str]:
    """What stands between backticks, fenced blocks left out."""
    text = re.sub(r"^ *```.*?^ *```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)}


def named_paths(document: Path) -> Iterator[str]:
    """Links, files with a suffix of our sources, files in folders that a run does not write, modules to run."""
    for link in re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8")):
        if "://" not in link:
            yield link
    for span in code_spans(document):
        if re.fullmatch(r"[\w./-]+\.(py|md|j2|svg)|(configs|tests)/[\w./-]+", span):
            yield span
        for module in re.findall(rf"-m ((?:{'|'.join(PACKAGES)}|tests)(?:\.\w+)+)", span):
            yield module.replace(".", "/") + ".py"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(document: Path) -> None:
    named = named_paths(document)
    missing = [name for name in named if not ((document.parent / name).exists() or (ROOT / name).exists())]
    assert not missing


def test_every_source_file_is_named_in_the_nearest_readme() -> None:
    missing = []
    for path in [*MODULES.values(), *(ROOT / "student").rglob("*.j2")]:
        folder = next(parent for parent in path.parents if (parent / "README.md").exists())
        if path.name != "__init__.py" and str(path.relative_to(folder)) not in code_spans(folder / "README.md"):
            missing.append(str(path.relative_to(ROOT)))
    assert not missing


def test_no_document_is_cited_that_is_not_here() -> None:
    """Formulas once stood in a document outside the repository."""
    files = [*DOCUMENTS, *MODULES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "configs").rglob("*.yaml")]
    assert not [path for path in files if "MET" + "HOD" in path.read_text(encoding="utf-8")]


def module_imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports outside of functions, those for the type checker included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from module_imports(node)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        names = set()
        for node in module_imports(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
                continue
            package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
        graph[module] = names & MODULES.keys()
    assert len(graph) > 50
    list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle


def test_the_messages_of_the_troubleshooting_table_are_in_the_code() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| you see |") :].split("\n\n")[0]
    quoted = [span for row in table.splitlines()[2:] for span in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(quoted) > 5
    # A message may be broken over several literals.
    code = "".join(re.sub(r'"\s*f?"', "", path.read_text(encoding="utf-8")) for path in MODULES.values())
    assert not [message for message in quoted if message not in code]
