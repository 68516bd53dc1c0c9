"""The wheel that `python -m build` makes, and the decisions of the build backend.

The CUDA library is built by the installation that runs the tests, where there is nvcc.
"""

import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import slidejax

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def backend():
    pytest.importorskip("scikit_build_core")
    spec = importlib.util.spec_from_file_location(
        "build_backend", ROOT / "cuda" / "build" / "build_backend.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    # as on a machine with neither CUDA nor a C++ compiler: all that is on PATH is Python
    environment = {
        **os.environ,
        "SLIDEJAX_CUDA": "0",
        "PATH": str(Path(sys.executable).parent),
        "CXX": "",
        "CC": "",
    }
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_a_flax_that_loses_the_names_of_axes_is_not_installed():
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (flax,) = [
        one for one in map(requirements.Requirement, project["dependencies"]) if one.name == "flax"
    ]
    assert "0.12.4" in flax.specifier and "0.12.3" not in flax.specifier


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "slidejax").rglob("*.py")}
    assert wheel.name.endswith("py3-none-any.whl") and sources <= names
    assert {
        "slidejax/py.typed",
        "slidejax/data/tuning/nvidia-h100.json",
        "slidejax/data/tuning/nvidia-h200.json",
    } <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"slidejax"}
    about = f"slidejax-{slidejax.__version__}.dist-info"
    assert f"{about}/licenses/LICENSE" in names
    metadata = zipfile.ZipFile(wheel).read(f"{about}/METADATA").decode()
    assert (
        "License-Expression: Apache-2.0" in metadata and "Author: slidejax developers" in metadata
    )


def test_the_wheel_works_elsewhere(wheel, tmp_path):
    target = tmp_path / "site"
    # Installing a pure wheel does nothing else, but for the scripts.
    zipfile.ZipFile(wheel).extractall(target)
    # a source tree that is installed for development would come first otherwise
    code = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        f"sys.path.insert(0, {str(target)!r})\n"
        "import slidejax, jax.numpy as jnp\n"
        "from slidejax.commands.main import main\n"
        "w = slidejax.pack(jnp.ones((8, 4)), '6:8', dtype='int8')\n"
        "print(slidejax.__file__, slidejax.linear(jnp.ones((1, 8)), w).tolist(), flush=True)\n"
        "main(['info'])"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, rest = done.stdout.split("\n", 1)
    assert first == f"{target / 'slidejax' / '__init__.py'} [[6.0, 6.0, 6.0, 6.0]]"
    assert "installed without its CUDA library" in rest


def test_asking_for_cuda_without_nvcc_fails_clearly(backend, monkeypatch):
    monkeypatch.setattr(backend, "find_nvcc", lambda: None)
    monkeypatch.setenv("SLIDEJAX_CUDA", "1")
    with pytest.raises(SystemExit, match="SLIDEJAX_CUDA=1, but there is no nvcc"):
        backend.cuda_compiler()
    monkeypatch.setenv("SLIDEJAX_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0, 1 or unset, got 'yes'"):
        backend.cuda_compiler()


def test_without_nvcc_the_wheel_is_pure(backend, monkeypatch, capsys):
    monkeypatch.delenv("SLIDEJAX_CUDA", raising=False)
    monkeypatch.setattr(backend, "find_nvcc", lambda: None)
    assert (
        backend.cuda_compiler() is None
        and "installing the pure JAX library" in capsys.readouterr().err
    )
    monkeypatch.setattr(backend, "find_nvcc", lambda: "/opt/cuda/bin/nvcc")
    monkeypatch.setattr(backend, "find_cxx", lambda: None)
    assert backend.cuda_compiler() is None and "no C++ compiler" in capsys.readouterr().err
    monkeypatch.setattr(backend, "find_cxx", lambda: "/usr/bin/c++")
    assert backend.cuda_compiler() == "/opt/cuda/bin/nvcc"
    monkeypatch.setenv("SLIDEJAX_CUDA", "0")
    assert backend.cuda_compiler() is None
