"""`DecoderConfig`: everything about a decoder that is no array.

It is read from Hugging Face's config.json (`slidejax.lm.decoder.huggingface`) or from the metadata
of a GGUF file (`slidejax.lm.decoder.gguf`). It is hashable, so that it can be a static argument of
`jax.jit`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["ACTIVATIONS", "MOST", "MOST_LAYERS", "DecoderConfig", "Rope", "check_config"]

# The most that a file may say: indices are int32, and a damaged number must not fill the memory.
MOST, MOST_LAYERS = 2**31 - 1, 4096

ACTIVATIONS = ("silu", "gelu_tanh")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions of one layer (RoFormer, arXiv 2104.09864).

    Channels i and i + head_dim / 2 are one pair. The pair turns by `position * frequency[i]` with
    `frequency[i] = theta ** (-2 i / head_dim) / divisors[i]`.

    Attributes:
      theta: the base.
      divisors: what scaled positions divide the frequencies by: one number for all (linear
        scaling), or one for each pair (that of Llama 3.1). Empty means 1.
    """

    theta: float
    divisors: tuple[float, ...] = ()

    def frequencies(self, head_dim: int) -> np.ndarray:
        """The frequencies, float32 `[head_dim / 2]`.

        >>> Rope(10000.0).frequencies(4).tolist() == [1.0, np.float32(0.01)]
        True
        """
        exponents: Any = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequencies: Any = np.float32(1) / np.float32(self.theta) ** exponents
        if self.divisors:
            frequencies = frequencies / np.asarray(self.divisors, np.float32)
        return frequencies.astype(np.float32)

    @classmethod
    def llama3(
        cls, theta: float, head_dim: int, factor: float, low: float, high: float, original: int
    ) -> Rope:
        """The scaling of Llama 3.1.

        Pairs that turn more than `high` times within the `original` positions keep their frequency.
        Those that turn less than `low` times are divided by `factor`. Between them the frequency is
        interpolated.

        >>> rope = Rope.llama3(500000.0, 8, factor=8.0, low=1.0, high=4.0, original=8192)
        >>> rope.divisors[0], rope.divisors[-1]
        (1.0, 8.0)
        """
        plain = cls(theta).frequencies(head_dim).astype(np.float64)
        turns = original * plain / (2 * math.pi)
        share = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return cls(theta, tuple((1 / (share + (1 - share) / factor)).tolist()))


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes and the arithmetic of a decoder of the Llama kind.

    Attributes:
      model_type: Hugging Face's name of the architecture, such as "llama".
      vocab_size: the number of tokens.
      hidden_size: channels of the residual stream.
      intermediate_size: channels of the gated MLP.
      num_layers: the number of layers.
      num_heads, num_kv_heads: heads of queries, and of keys and values. The second divides the
        first.
      head_dim: channels of a head, an even number.
      max_positions: the longest context that the model was made for.
      norm_eps: added to the mean square in RMSNorm.
      activation: "silu" or "gelu_tanh".
      tied: whether the output embedding is the input embedding.
      windows: for each layer how many positions back it sees, its own included; None is all.
      ropes: the rotary positions of each layer.
      query_scale: what scores are multiplied by.
      embedding_scale: what embeddings are multiplied by.
      qk_norm: whether queries and keys are normalised by head.
      sandwich_norm: whether the outputs of attention and MLP are normalised, too.
      qkv_bias, output_bias, mlp_bias: whether these layers have biases.
      bos_token_id: the token that begins a text, or None.
      eos_token_ids: the tokens that end one.
      pad_token_id: the token that pads, or None.

    Raises:
      ValueError: naming the field, if sizes are not positive or do not fit each other.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: str
    tied: bool
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    query_scale: float
    embedding_scale: float = 1.0
    qk_norm: bool = False
    sandwich_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("norm_eps", "query_scale", "embedding_scale"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for name in ("tied", "qk_norm", "sandwich_norm", "qkv_bias", "output_bias", "mlp_bias"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads {self.num_heads}, got {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be {' or '.join(ACTIVATIONS)}, got {self.activation!r}"
            )
        for name in ("windows", "ropes"):
            if len(getattr(self, name)) != self.num_layers:
                raise ValueError(
                    f"{name} must have an entry for each of {self.num_layers} layers, "
                    f"got {len(getattr(self, name))}"
                )
        if any(w is not None and (type(w) is not int or w < 1) for w in self.windows):
            raise ValueError(f"windows must be positive or None, got {self.windows}")
        tokens = (self.bos_token_id, self.pad_token_id, *self.eos_token_ids)
        if any(token is not None and (type(token) is not int or token < 0) for token in tokens):
            raise ValueError(
                "bos_token_id, pad_token_id and eos_token_ids must be natural numbers, got "
                f"{self.bos_token_id!r}, {self.pad_token_id!r} and {self.eos_token_ids!r}"
            )
        for rope in self.ropes:
            if not all(0 < value < math.inf for value in (rope.theta, *rope.divisors)):
                raise ValueError(f"theta and divisors of a rope must be positive, got {rope}")
            if len(rope.divisors) not in (0, 1, self.head_dim // 2):
                raise ValueError(
                    f"a rope's divisors must be none, one or {self.head_dim // 2}, "
                    f"got {len(rope.divisors)}"
                )

    @property
    def q_size(self) -> int:
        """Outputs of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Outputs of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain JSON values, for `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """Reads what `to_json` returned, also after it went through a file.

        Raises:
          ValueError: if a field is missing, unknown or of another kind.
        """
        try:
            fields = dict(values)
            fields["ropes"] = tuple(
                Rope(float(rope["theta"]), tuple(map(float, rope["divisors"])))
                for rope in fields["ropes"]
            )
            fields["windows"] = tuple(fields["windows"])
            fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"not a DecoderConfig: {e}") from e


def check_config(config: object) -> None:
    """Raises a TypeError for anything but a `DecoderConfig`."""
    if not isinstance(config, DecoderConfig):
        raise TypeError(f"config must be a DecoderConfig, got {type(config).__name__}")
