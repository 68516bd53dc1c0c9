"""Timing linear layers side by side: those of plain JAX, and those of slidejax.

`run` is `slidejax bench`, `tuning` is `slidejax tune`.
"""
