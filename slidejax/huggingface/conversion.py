"""Converting Hugging Face Flax models.

The class, `__call__` and `.generate` stay, also in `jax.jit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from slidejax.huggingface.family import HIDDEN_LAYERS, functional
from slidejax.prune.model import convert as functional_conversion
from slidejax.prune.model.methods import Method
from slidejax.rules import Prune, Report

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel

__all__ = ["HIDDEN_LAYERS", "calibrated", "convert", "planned"]


def convert(
    flax_model: FlaxPreTrainedModel,
    rules,
    method: str | Method | Prune = "magnitude",
    calibration: Any = None,
    *,
    params: Mapping | None = None,
    report: Report | None = None,
) -> FlaxPreTrainedModel:
    """Prunes and packs the linear layers of a Hugging Face Flax model.

    Args:
      flax_model: a model of any Flax class of transformers. It stays as it is.
      rules: see `slidejax.rules`, with paths such as `model/layers/0/mlp/up_proj/kernel`. A single
        pattern or `Rule` is for all linear layers but the output embedding (`HIDDEN_LAYERS`).
      method: "magnitude", "wanda", "sparsegpt", a `slidejax.prune.Method`, or a function
        (`slidejax.rules.Prune`).
      calibration: for "wanda" and "sparsegpt": token ids `[sequences, length]`, or a
        `slidejax.prune.Calibration`.
      params: the parameters of a model that was made with `_do_init=False`. The result holds the
        packed ones.
      report: an empty `slidejax.Report`, which is filled in.

    Returns:
      A model of the same class: `__call__`, `.generate` and `jax.jit` of both run with packed
      weights. `save_pretrained` writes a directory that `slidejax.checkpoint` and the command line
      read; `from_pretrained` of transformers cannot read it.

    Raises:
      ValueError: for bad rules, an unknown method, calibration that is missing or not used, or
        parameters that are not the model's.
      TypeError: if it is not a Flax model of transformers.

    Example, 6:8 with int8 values, and the last block as it was::

        model = FlaxLlamaForCausalLM.from_pretrained(path)
        rules = [(r"model/layers/29/.*", None), (sj.huggingface.HIDDEN_LAYERS, "6:8")]
        model = sj.huggingface.convert(model, rules)
        tokens = model.generate(input_ids).sequences
    """
    model = functional(flax_model, params)
    return functional_conversion.convert(model, rules, method, calibration, report)


def planned(flax_model: FlaxPreTrainedModel, rules) -> Report:
    """The report that `convert` would give; nothing is computed."""
    return functional(flax_model).planned(rules)


def calibrated(
    flax_model: FlaxPreTrainedModel,
    method: str | Method,
    tokens: Any,
    *,
    params: Mapping | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Prune:
    """Runs a model over calibration tokens once, for any number of conversions.

    Every layer is pruned with the inputs that it has in the original model. This is quicker than
    `convert` with calibration, and less accurate.

    Args:
      flax_model: the original model.
      method: "wanda", "sparsegpt", or a calibrated `slidejax.prune.Method`.
      tokens: token ids `[sequences, length]`.
      params: as in `convert`.
      progress: called with the number of sequences that are done, and of all.

    Returns:
      A function that `convert` takes as `method`.

    Raises:
      ValueError: if the tokens are not a matrix of integers, or the method is not calibrated.
    """
    model = functional(flax_model, params)
    return functional_conversion.calibrated(model, method, tokens, progress=progress)
