"""Tokenizers for tests, made in memory."""

from slidejax.lm.text import gguf

WORDS = ["▁", "a", "b", "ab", "▁a", "▁ab", "é"]


def sentence_piece(prefix=True, **more):
    """The tokenizer of a GGUF file of kind "llama": 4 special tokens, 256 bytes, 7 pieces."""
    special = ["<unk>", "<s>", "</s>", "<user>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    return gguf.from_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * 260 + [-7.0, -8.0, -9.0, -1.0, -3.0, -2.0, -6.0],
            "tokenizer.ggml.token_type": [2, 3, 3, 4] + [6] * 256 + [1] * 7,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.add_space_prefix": prefix,
            **more,
        }
    )
