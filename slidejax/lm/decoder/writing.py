"""How a decoder writes text: its tokenizer, its programs, `generate` and `stream`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from slidejax.lm.decoder.apply import apply
from slidejax.lm.decoder.cache import check_cache_dtype, init_cache
from slidejax.lm.decoder.config import DecoderConfig
from slidejax.lm.decoder.fuse import serving
from slidejax.lm.generation.generate import encode_prompt, generate
from slidejax.lm.generation.programs import Programs
from slidejax.lm.generation.stream import Stream
from slidejax.lm.memory import available, shown_bytes
from slidejax.lm.text import files
from slidejax.lm.text.tokenizer import Tokenizer
from slidejax.ops.meshes import automatic, on_mesh
from slidejax.variants.prepared import weights_of

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Writes", "check_prompt", "programs"]


@functools.lru_cache(maxsize=32)
def programs(config: DecoderConfig, cache_dtype: str) -> Programs:
    """The compiled programs of a configuration, shared by all decoders that have it.

    Args:
      config: the configuration.
      cache_dtype: as in `init_cache`.
    """

    def cache(batch: int, length: int) -> Any:
        return init_cache(config, batch, length, cache_dtype, windows=True)

    def step(params: Any, ids: Any, positions: Any, cache: Any) -> Any:
        return apply(config, params, ids, positions, cache, last=True)

    def start(params: Any, ids: Any, positions: Any, cache: Any) -> Any:
        return apply(config, params, ids, positions, cache, last=True, whole=True)

    return Programs(cache, step, start=start)


@functools.lru_cache(maxsize=8)
def _tokenizer(contents: tuple[tuple[str, bytes], ...], ends: tuple[int, ...]) -> Tokenizer | None:
    """The tokenizer out of files, shared by all decoders that have the same ones."""
    return files.from_files(dict(contents), "", ends)


class _Writer:
    """A decoder as `generate` takes it, with the dtype of its cache."""

    def __init__(self, model: Any, cache_dtype: Any):
        self.tokenizer: Tokenizer | None = model.tokenizer
        self.vocab_size, self.context = model.config.vocab_size, model.config.max_positions
        self.ends = model.config.eos_token_ids if self.tokenizer is None else self.tokenizer.ends
        self._model = model
        dtype = model.dtype if cache_dtype is None else check_cache_dtype(cache_dtype)
        self.programs = programs(model.config, dtype.name)

    @property
    def params(self) -> Any:
        return _served(self._model)


def _served(model: Any) -> Any:
    """A model's parameters as loops on this device read them.

    They are those of `serving` where these pay, made once and kept with the model. On a CPU a loop
    would otherwise unpack and convert every weight in each of its calls. On a GPU it would run more
    and smaller products, one by one.
    """
    params, extra = model.params, model._extra
    leaves = jax.tree.leaves(params)
    of, made = extra.served
    if len(of) == len(leaves) and all(a is b for a, b in zip(of, leaves, strict=True)):
        return made
    extra.served = [], None  # of other parameters
    if not _serving_pays(model.dtype, params):
        return params
    params = automatic(params)
    with on_mesh(params):
        made = serving(params)
    extra.served = leaves, made
    return made


def _serving_pays(dtype: Any, params: Any) -> bool:
    """Whether loops run on parameters of `serving` that are kept beside a model's own."""
    backend = jax.default_backend()
    if backend == "cpu":
        return dtype != jnp.float32 or bool(weights_of(params))
    arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    # Over several devices the outputs of q, k and v together would be dealt out in another way.
    if backend != "gpu" or any(array.sharding.num_devices > 1 for array in arrays):
        return False
    layers = sum(leaf.nbytes for leaf in jax.tree.leaves(params["model"]["layers"]))
    needed = layers * 3 // 2  # copies, prepared forms, and room to make them
    there = available(next(iter(arrays[0].devices())) if arrays else None)
    if there is None or needed <= there:
        return True
    warnings.warn(
        f"generate runs on the model's parameters as they are, which is slower: those that serve "
        f"best need {shown_bytes(needed)} beside them, and {shown_bytes(there)} are free. "
        "Keep slidejax.lm.decoder.serving(model.params) alone, and give it as params=",
        stacklevel=2,
    )
    return False


def check_prompt(
    model: Any,
    prompt: Any,
    max_new_tokens: int,
    name: str = "prompt",
    limit: str = "max_new_tokens",
) -> None:
    """Raises the error of `generate` for a prompt that a decoder cannot continue.

    Args:
      model: the decoder, perhaps with shapes in place of its parameters.
      prompt, max_new_tokens: as for `generate`.
      name, limit: what the caller calls these two, for the error.

    >>> from slidejax.lm.decoder.examples import tiny
    >>> check_prompt(tiny(), [1, 2, 3], 1000)
    Traceback (most recent call last):
    ValueError: prompt has 3 tokens; with max_new_tokens 1000 they exceed the model's context of 128
    """
    encode_prompt(_Writer(model, None), prompt, max_new_tokens, name, limit)


class Writes:
    """The methods of a decoder that take or give text."""

    if TYPE_CHECKING:
        config: DecoderConfig

        @property
        def files(self) -> dict[str, bytes]: ...
        @property
        def dtype(self) -> np.dtype: ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer among the model's files, or None if there is none.

        Raises:
          ValueError: its files are damaged.
          NotImplementedError: it is of a kind that cannot be read, which is named.
        """
        return _tokenizer(tuple(sorted(self.files.items())), self.config.eos_token_ids)

    def generate(
        self,
        prompts: Any,
        *,
        max_new_tokens: int | None = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: str | Iterable[str] | None = None,
        seed: int = 0,
        ends: Iterable[int] | None = None,
        cache_dtype: Any = None,
        params: Any = None,
        progress: Callable[[int], None] | None = None,
    ) -> Any:
        """Continues prompts, all in one batch; see `slidejax.lm.generation.generate`.

        Args:
          prompts: a list of texts or lists of token ids, of any lengths; or one of them.
          max_new_tokens: how many tokens to write at most; None: until the context is full.
          temperature: 0 takes the likeliest token each time; above 0 draws.
          top_k: draw among the k likeliest tokens; 0 is all.
          top_p: draw among the likeliest tokens that have this probability together; 1 is all.
          stop: texts that end the text and are not part of it.
          seed: of the draws.
          ends: the tokens that end a text; None: those of the tokenizer and its files; empty: none.
          cache_dtype: bfloat16, float16, float32, or int8, which halves the memory of a bfloat16
            cache; None: the decoder's own.
          params: other parameters of the same structure, such as prepared ones.
          progress: called with the number of tokens written, of the longest row.

        Returns:
          A list of `slidejax.lm.Completion`, or one for a single prompt.

        Raises:
          ValueError: an argument is out of range, a prompt is empty, has tokens that the model has
            not, or does not fit its context; or the model computes nan.
          TypeError: a prompt is neither text nor token ids.

        >>> from slidejax.lm.decoder.examples import tiny
        >>> made = tiny().generate([[3, 4, 5], [6]], max_new_tokens=4)
        >>> [len(completion.tokens) for completion in made]
        [4, 4]
        """
        return generate(
            _Writer(self, cache_dtype),
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            seed=seed,
            ends=ends,
            params=params,
            progress=progress,
        )

    def stream(self, prompt: Any, *, cache_dtype: Any = None, **options: Any) -> Stream:
        """The pieces of text after a prompt, as they become certain.

        Args:
          prompt: text or token ids.
          cache_dtype: as for `generate`.
          **options: the other arguments of `generate`, but for `ends` and `progress`.

        Returns:
          An iterator of texts, which also says how long the first token took
          (`slidejax.lm.generation.Stream`).

        Raises:
          ValueError, TypeError: as `generate`; and the model has no tokenizer.

        >>> from slidejax.lm.decoder.examples import tiny
        >>> from slidejax.lm.text.examples import byte_tokenizer
        >>> made = tiny(vocab_size=260)
        >>> model = type(made)(made.config, made.params, files=byte_tokenizer().files())
        >>> pieces = model.stream("Hello", max_new_tokens=8)
        >>> "".join(pieces) == model.generate("Hello", max_new_tokens=8).text
        True
        >>> pieces.prompt_tokens, len(pieces.tokens), pieces.finish
        (6, 8, 'length')
        """
        return Stream(_Writer(self, cache_dtype), prompt, **options)
