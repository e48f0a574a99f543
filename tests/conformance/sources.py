"""Where the tests come from: a checkout of transformers' repository, overlaid with the installed version's own files,
and the source distributions of transformers and PEFT. Nothing of it is kept in this repository."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

# Test classes that need several processes or accelerators; their files differ most between versions.
DISTRIBUTED = ("test_fsdp_mixin", "test_tensor_parallel_mixin", "test_expert_parallel_mixin")
MARKERS = ("generate", "training_ci", "tensor_parallel_ci", "fsdp_ci")


def source_distribution(package: str, workdir: Path) -> Path:
    """Return the unpacked source distribution of the installed version of `package`, fetched by pip if need be."""
    version = importlib.metadata.version(package)
    folder = workdir / f"{package}-{version}"
    if folder.is_dir():
        return folder
    archive = workdir / f"{package}-{version}.tar.gz"
    if not archive.exists():
        command = ["pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(workdir)]
        subprocess.run([sys.executable, "-m", *command, f"{package}=={version}"], check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(workdir, filter="data")
    return folder


def transformers_tests(checkout: Path, workdir: Path) -> Path:
    """Return a folder whose `tests/` is that of `checkout`, with the files that the installed version ships instead.

    Raises:
        SystemExit: if `checkout` is no checkout of transformers.
    """
    if not (checkout / "tests" / "causal_lm_tester.py").is_file():
        raise SystemExit(f"{checkout} is no checkout of transformers (it has no tests/causal_lm_tester.py)")
    shipped = source_distribution("transformers", workdir)
    folder = workdir / f"tests-of-{shipped.name}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkout / "tests", folder / "tests")
    for name in ("conftest.py", "utils/test_module"):
        source = checkout / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.exists():
            shutil.copy(source, folder / name)
    for file in (shipped / "tests").glob("*.py"):
        shutil.copy(file, folder / "tests")
    for name in DISTRIBUTED:
        _stub(folder / "tests" / f"{name}.py")
    (folder / "src").mkdir()  # some tests import the package from the source tree
    (folder / "src" / "transformers").symlink_to(_installed("transformers"), target_is_directory=True)
    _write_settings(folder)
    return folder


def peft_tests(workdir: Path) -> Path:
    """Return PEFT's source distribution, in which `tests/test_decoder_models.py` runs."""
    folder = source_distribution("peft", workdir)
    (folder / "tests" / "__init__.py").touch()  # the distribution leaves it out
    if importlib.util.find_spec("diffusers") is None:  # the tests ask whether a model is a pipeline of it: none is
        (folder / "diffusers.py").write_text("class StableDiffusionPipeline:\n    pass\n")
    _write_settings(folder)
    return folder


def _installed(package: str) -> Path:
    return Path(str(importlib.metadata.distribution(package).locate_file(package)))


def _stub(file: Path) -> None:
    """Replace a module by empty classes of the same names."""
    if file.exists():
        names = [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
        file.write_text("\n\n".join(f"class {name}:\n    pass\n" for name in names))


def _write_settings(folder: Path) -> None:
    lines = ["[pytest]", "addopts = -p no:cacheprovider", "markers =", *(f"    {name}" for name in MARKERS)]
    (folder / "pytest.ini").write_text("\n".join(lines) + "\n")
