"""Text for decoders: tokenizers, chat templates, and decoding as tokens come."""
