"""Pruning all layers of a model, calibrated."""
