"""Parameters to files and back: `save` and `load`; beside them a reader of GGUF files.

Files hold the packed form. Prepared forms, which belong to implementations, are never saved. Files
are data: nothing is pickled, sizes are checked before memory is taken, and a bad file is one clear
error.
"""

from slidejax.checkpoint.store import load, save

__all__ = ["load", "save"]
