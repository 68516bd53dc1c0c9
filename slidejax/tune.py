"""The measured table of implementations (`slidejax.ops.tuning`) and the choice by it."""

from slidejax.ops.choice import forms, lookup, time_of
from slidejax.ops.tuning import Variant, entries, record, table_path

__all__ = ["Variant", "entries", "forms", "lookup", "record", "table_path", "time_of"]
