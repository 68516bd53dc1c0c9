"""Parameters to files and back: `save`, `load`; readers of GGUF files and Hugging Face directories beside them.

The packed form is what files hold; an implementation's own (prepared) form is never saved. Files are data: no pickle,
sizes checked before memory is taken, a bad file is one clear error.
"""

from slidejax.checkpoint.store import load, save

__all__ = ["load", "save"]
