"""Tasks that a model is asked to do: `humaneval` lets it write programs, and `sandbox` runs them.

`paired` says how sure a share of solved problems is, and the difference of two.
"""
