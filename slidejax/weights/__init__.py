"""Weights: patterns, number formats, the packed form."""
