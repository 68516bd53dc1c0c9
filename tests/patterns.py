"""The patterns that tests run over."""

SPARSE = [f"{g - 2}:{g}" for g in range(4, 17, 2)]
PATTERNS = [*SPARSE, "dense"]
