"""Timing linear layers side by side: those of plain JAX, and those of slidejax.

The module `run` serves `slidejax bench`, and `tuning` serves `slidejax tune`.
"""
