"""Bits of programs that XLA optimises, as it does for users. `conftest.py` turns that off."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BITS = [
    "tests/ops/implementations/test_reference.py",
    "tests/ops/test_residual.py::test_equals_the_formula_bit_for_bit",
    "tests/ops/test_against_numpy.py::test_random_cases",
    "tests/weights/test_numerics.py::test_no_maximum_hides_nan",
]
OPTIMISED = "--xla_backend_optimization_level=3"
if "--xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):  # jaxlib has this flag
    OPTIMISED += " --xla_cpu_use_fusion_emitters=true"


def test_bits_are_the_same_in_optimised_programs():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *BITS],
        env={**os.environ, "XLA_FLAGS": OPTIMISED},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
