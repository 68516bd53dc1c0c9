"""Every example runs and prints what the file beside it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# These compile large programs. XLA optimises them, as it does for users, with --every-case alone;
# of whole models that leaves convert_llama.
QUICKLY = ("recover_llama", "write_text")
EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, request):
    if "transformers" in path.read_text():
        pytest.importorskip("transformers")
    # one process each: examples are read as scripts and must not depend on what another one
    # imported
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if path.stem not in QUICKLY or request.config.getoption("--every-case"):
        environment["XLA_FLAGS"] = ""
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(path.parent.parent), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, path],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == path.with_suffix(".txt").read_text()
