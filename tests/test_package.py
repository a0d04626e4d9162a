"""The wheel: it holds the whole package, and what it installs runs away from this folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("pyro_vae", "pyproject.toml", "README.md", "LICENSE")


def test_the_wheel_is_complete_and_runs(tmp_path: Path) -> None:
    """Built from a copy, installed without its dependencies, which are this interpreter's."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("pyro_vae/")}
    files = [p.relative_to(ROOT) for p in (ROOT / "pyro_vae").rglob("*") if p.is_file()]
    assert held == {p.as_posix() for p in files if "__pycache__" not in p.parts}
    assert "pyro_vae/py.typed" in held

    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel)
    found = python("-c", "import pyro_vae; print(pyro_vae.__file__)", cwd=tmp_path, path=site)
    assert Path(found.strip()) == site / "pyro_vae" / "__init__.py"
    usage = python(site / "bin" / "pyro-vae", "--help", cwd=tmp_path, path=site)
    assert usage.startswith("Usage: pyro-vae ")


def python(*arguments: str | Path, cwd: Path | None = None, path: Path | None = None) -> str:
    """What this interpreter prints, in that folder, with `path` before its own packages."""
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    ran = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout
