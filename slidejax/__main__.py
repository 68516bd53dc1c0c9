"""`python -m slidejax`: the command line."""

import sys

from slidejax.commands.main import main

sys.exit(main())
