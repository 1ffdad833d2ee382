"""The walls between the packages: two clusters share a dataset, not code or dependencies."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imports(package: str) -> dict[Path, set[str]]:
    """Top-level names that each file of `package` imports when it runs, inside functions too."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        names = set()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        only_types = {
            node
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            if node in only_types:
                continue
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
        found[path.relative_to(ROOT)] = names
    return found


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("shared", {"teacher", "student", "torch", "vllm", "deepspeed"}),
        ("teacher", {"student", "deepspeed"}),
        ("student", {"teacher"}),
    ],
)
def test_packages_do_not_reach_over_the_wall(package: str, forbidden: set[str]) -> None:
    reached = {str(path): names & forbidden for path, names in imports(package).items() if names & forbidden}
    assert not reached


@pytest.mark.parametrize("package", ["teacher", "student"])
def test_one_folder_a_package_imports_vllm_by_name(package: str) -> None:
    assert len({path.parent for path, names in imports(package).items() if "vllm" in names}) <= 1


@pytest.mark.parametrize("module", ["shared.commands.cli", "teacher.cli", "student.cli"])
def test_a_command_line_starts_without_the_heavy_libraries(module: str) -> None:
    """`--help` must not wait for torch, and the teacher's cluster has no DeepSpeed to import."""
    heavy = "{'torch', 'transformers', 'vllm', 'deepspeed', 'numba'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert printed.stdout.strip() == "[]"
