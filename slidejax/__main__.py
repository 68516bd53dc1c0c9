"""`python -m slidejax`: the command line."""

import sys

from slidejax.cli import main

sys.exit(main())
