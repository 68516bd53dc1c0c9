"""Pruning: choosing which weights of every group are kept. One file a method; each returns a bool mask `[in, out]`."""

from slidejax.prune.magnitude import magnitude

__all__ = ["magnitude"]
