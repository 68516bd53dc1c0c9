"""Pruning: choosing which weights of every group are kept. One file a method, for one kernel each; `calibration` collects
what the calibrated ones need from a model."""

from slidejax.prune.magnitude import magnitude
from slidejax.prune.sparsegpt import layer_error, refit, sparsegpt
from slidejax.prune.wanda import wanda

__all__ = ["layer_error", "magnitude", "refit", "sparsegpt", "wanda"]
