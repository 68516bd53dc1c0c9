"""The measured table of implementations (`slidejax.ops.tuning`), and what is read off it (`slidejax.ops.choice`)."""

from slidejax.ops.choice import forms, lookup, time_of
from slidejax.ops.tuning import Variant, entries, record, table_path

__all__ = ["Variant", "entries", "forms", "lookup", "record", "table_path", "time_of"]
