"""Hugging Face Flax models with sparse weights: same class, same `__call__` and `.generate`, also under `jax.jit`.

A `FlaxPreTrainedModel` calls `module.apply` for everything it does. The converted model holds an instance of a subclass
of its module's class whose `apply` runs under `slidejax.linen.interceptor`; nothing else changes.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax

from slidejax import linen
from slidejax.rules import Prune, Report, Rule
from slidejax.variants.prepared import prepare
from slidejax.weights.pattern import Pattern

if TYPE_CHECKING:
    from transformers import FlaxPreTrainedModel

__all__ = ["HIDDEN_LAYERS", "calibrated", "convert", "fuse_projections", "planned", "with_params"]

# All linear layers but output embeddings: the heads of language models, often tied to the input embedding.
HIDDEN_LAYERS = r"(?!(?:.*/)?(?:lm_head|predictions/decoder)(?:/kernel)?$).*"


def convert(
    flax_model: FlaxPreTrainedModel,
    rules,
    method: str | Prune = "magnitude",
    calibration: Any = None,
    *,
    params: Mapping | None = None,
    report: Report | None = None,
) -> FlaxPreTrainedModel:
    """Prunes and packs the linear layers of a Hugging Face Flax model.

    Args:
      flax_model: of any Flax class of transformers; it stays as it is.
      rules: see `slidejax.rules`, with paths such as `model/layers/0/mlp/up_proj/kernel`. A single pattern or `Rule` is
        for all linear layers but the output embedding (`HIDDEN_LAYERS`).
      method: "magnitude", "wanda", "sparsegpt" (`slidejax.prune`), or a function: see `slidejax.rules.Prune`.
      calibration: for "wanda" and "sparsegpt": token ids `[sequences, length]`, or a `slidejax.prune.Calibration`.
      params: the parameters of a model made with `_do_init=False`; the result holds the packed ones.
      report: an empty `slidejax.Report`, filled in.

    Returns:
      A model of the same class: `__call__`, `.generate` and `jax.jit` of both run sparse. `save_pretrained` writes what
      `slidejax.checkpoint` and the command line read; `from_pretrained` of transformers cannot.

    Raises:
      ValueError: for bad rules, an unknown method, calibration that the method does not use, or parameters that are not
        the model's.
      TypeError: if it is not a Flax model of transformers.

    Example, 6:8 with int8 values, the last layer dense::

        model = FlaxLlamaForCausalLM.from_pretrained(path)
        model = sj.huggingface.convert(model, [(r"model/layers/29/.*", None), (sj.huggingface.HIDDEN_LAYERS, "6:8")])
        tokens = model.generate(input_ids).sequences
    """
    _check_model(flax_model)
    _check_method(method, calibration)
    run, params, pack = functional(flax_model, params)
    prune = method if callable(method) else None
    if not callable(method) and method != "magnitude":
        from slidejax.prune.model.calibration import Calibration, calibrate, planned

        how = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
        plan = planned(lambda params, **options: pack(params, rules, **options).params, params)
        params, prune = calibrate(run, params, how.as_batches(), plan, method, how, report)
    return pack(params, rules, report=report, prune=prune)


def functional(
    flax_model: FlaxPreTrainedModel, params: Mapping | None = None
) -> tuple[Callable[[Any, Any], Any], Mapping, Callable[..., FlaxPreTrainedModel]]:
    """A model as a function of its parameters, for calibration.

    Returns:
      `(run, params, pack)`: `run(params, ids)` calls the model, `pack(params, rules, **options)` is `slidejax.linen.convert`
      for it.
    """
    _check_model(flax_model)
    rngs, args, kwargs = _init_arguments(flax_model)

    def pack(params, rules, **options):
        if isinstance(rules, (str, Pattern, Rule)):
            rules = [(HIDDEN_LAYERS, rules)]
        return with_params(
            flax_model,
            linen.convert(params, rules, flax_model.module, *args, rngs=rngs, **options, **kwargs),
        )

    return _runner(flax_model), _params_of(flax_model) if params is None else params, pack


def planned(flax_model: FlaxPreTrainedModel, rules) -> Report:
    """What `convert` would report; nothing is computed."""
    report = Report()
    jax.eval_shape(
        lambda params: convert(flax_model, rules, params=params, report=report).params,
        flax_model.params,
    )
    return report


def with_params(flax_model: FlaxPreTrainedModel, params: Mapping) -> FlaxPreTrainedModel:
    """A copy of a model that holds and runs other parameters, among them `SlideWeight`s.

    Args:
      flax_model: of any Flax class of transformers; it stays as it is.
      params: in its structure, such as `slidejax.checkpoint` loads them. On a GPU their prepared forms are made
        (`slidejax.prepare`).

    Raises:
      ValueError: if parameters are missing.
      TypeError: if it is not a Flax model of transformers.
    """
    _check_model(flax_model)
    model = copy.copy(flax_model)
    # what a user may edit; the module keeps the configuration that it was built with
    model._config = copy.deepcopy(flax_model.config)
    model.generation_config = copy.deepcopy(flax_model.generation_config)
    if not getattr(type(flax_model.module), "_slidejax_sparse", False):
        model._module = _with_methods(flax_model.module, apply=_apply, _slidejax_sparse=True)
    model._is_initialized = True
    model.params = prepare(params) if jax.default_backend() == "gpu" else params
    model.save_pretrained = types.MethodType(_save_pretrained, model)
    return model


def fuse_projections(flax_model: FlaxPreTrainedModel) -> FlaxPreTrainedModel:
    """A copy of a converted model that computes q, k and v as one product, and gate and up (`slidejax.linen.fuse_projections`): the same
    results from fewer and larger kernels.

    Args:
      flax_model: from `convert`; it stays as it is.

    Raises:
      TypeError: if it is not a Flax model of transformers.
    """
    _check_model(flax_model)
    return with_params(flax_model, linen.fuse_projections(flax_model.params))


def _check_model(flax_model) -> None:
    from transformers import FlaxPreTrainedModel

    if not isinstance(flax_model, FlaxPreTrainedModel):
        raise TypeError(
            f"flax_model must be a Flax model of transformers, got {type(flax_model).__name__} "
            f"(slidejax.linen.convert and slidejax.nnx.convert take other modules)"
        )


def _params_of(flax_model) -> Mapping:
    if not flax_model._is_initialized:
        raise ValueError(
            f"this {type(flax_model).__name__} was made with _do_init=False and holds no parameters: give params="
        )
    return flax_model.params


def _check_method(method, calibration) -> None:
    from slidejax.prune.model.calibration import CALIBRATED

    if not callable(method) and method not in ("magnitude", *CALIBRATED):
        raise ValueError(
            f"method must be a function or one of magnitude, {', '.join(CALIBRATED)}, got {method!r}"
        )
    if (callable(method) or method == "magnitude") and calibration is not None:
        raise ValueError(f"method {method!r} uses no calibration")
    if not callable(method) and method in CALIBRATED and calibration is None:
        raise ValueError(
            f"method {method!r} needs calibration: token ids [sequences, length] or a slidejax.prune.Calibration"
        )


def _runner(flax_model) -> Callable[[Any, Any], Any]:
    return lambda params, ids: flax_model(ids, params=params)


def calibrated(
    flax_model: FlaxPreTrainedModel,
    method: str,
    tokens: Any,
    *,
    params: Mapping | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Prune:
    """Runs a dense model over calibration tokens, once for any number of conversions: every layer is pruned with the
    inputs of the dense model, which is quicker and less good than what `convert` does.

    Args:
      flax_model: the dense model.
      method: "wanda" or "sparsegpt".
      tokens: token ids `[sequences, length]`.
      params: as in `convert`.
      progress: called with the numbers of sequences done and of all.

    Returns:
      What `convert` takes as `method`.

    Raises:
      ValueError: if tokens are not a matrix of integers.
    """
    from slidejax.prune.model.calibration import Calibration, check_method, collect, pruner

    check_method(method)
    _check_method(method, tokens)
    params = _params_of(flax_model) if params is None else params
    batches = Calibration(tokens).as_batches()
    tell = None if progress is None else lambda done: progress(done * len(batches[0]), len(tokens))
    return pruner(
        method, collect(_runner(flax_model), params, batches, tell, diagonal=method == "wanda")
    )


def _with_methods(module: nn.Module, **namespace) -> nn.Module:
    """The same module as an instance of a subclass with other methods; the class keeps its name."""
    base = type(module)
    namespace = {
        name: nn.nowrap(value) if callable(value) else value for name, value in namespace.items()
    }
    subclass = type(
        base.__name__,
        (base,),
        {
            **namespace,
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "_slidejax_base": base,
        },
    )
    fields = [
        field.name
        for field in dataclasses.fields(module)
        if field.init and field.name not in ("parent", "name")
    ]
    return subclass(**{name: getattr(module, name) for name in fields})


def _apply(self, *args, **kwargs):
    with nn.intercept_methods(linen.interceptor):
        return self._slidejax_base.apply(self, *args, **kwargs)


class _Called(Exception):
    """Carries the arguments of `module.init` out of `init_weights`."""


def _init_arguments(flax_model) -> tuple[Any, tuple, dict]:
    """The arguments with which the model itself calls `module.init`: right for every architecture."""

    def init(self, rngs, *args, **kwargs):
        raise _Called(rngs, args, kwargs)

    probe = copy.copy(flax_model)
    probe._module = _with_methods(flax_model.module, init=init)
    try:
        probe.init_weights(jax.random.PRNGKey(0), flax_model.input_shape)
    except _Called as call:
        rngs, args, kwargs = call.args
        return rngs, args, kwargs
    raise ValueError(
        f"{type(flax_model).__name__}.init_weights does not call module.init: its layers cannot be traced"
    )


def _save_pretrained(self, save_directory, params=None, **kwargs) -> None:
    """Writes the model, packed weights and all, as `slidejax convert` does (`slidejax.checkpoint`)."""
    if kwargs:
        raise ValueError(
            f"save_pretrained of a sparse model takes no {', '.join(kwargs)}: see slidejax.checkpoint.save"
        )
    from slidejax.huggingface.files import write_pretrained

    write_pretrained(save_directory, self if params is None else with_params(self, params))
