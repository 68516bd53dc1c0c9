"""Runs a compiler and keeps what it says: python compiler_log.py FILE COMMAND [ARGUMENT ...]

The build runs nvcc through this for the Hopper kernels, so that a test can read the report of ptxas
without compiling them again.
"""

import subprocess
import sys
from pathlib import Path

done = subprocess.run(
    sys.argv[2:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
)
Path(sys.argv[1]).write_text(done.stdout)
if done.returncode:
    sys.stderr.write(done.stdout)
sys.exit(done.returncode)
