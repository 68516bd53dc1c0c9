"""The compiled CUDA library (cuda/module.cc). It is there only where it was built."""

from collections.abc import Sequence
from typing import Any

class CusparseltError(RuntimeError): ...

def registrations() -> dict[str, Any]:
    """For `jax.ffi.register_ffi_target`: `{target: capsule, or {stage: capsule}}`."""

def types() -> dict[str, Any]:
    """For `jax.ffi.register_ffi_type`: `{name: {"type_id": capsule, "type_info": capsule}}`."""

def build_info() -> dict[str, Any]:
    """How the library was built: `version`, `cuda`, `architectures` (CMake's words), `jaxlib`,
    `ffi_api` (major, minor), `hopper` (whether it has the Hopper kernels)."""

def load_cusparselt(candidates: Sequence[str]) -> str:
    """Loads cuSPARSELt from the first of these paths that works; returns "" or why none does."""

def cusparselt_version() -> tuple[int, int, int] | None:
    """(major, minor, patch) of the cuSPARSELt that is loaded, or None."""

def cusparselt_compressed_bytes(dtype: str, outputs: int, columns: int) -> int:
    """Bytes of the compressed form of a weight of `columns` lifted columns. Needs a GPU."""

def cusparselt_layout(dtype: str, outputs: int, columns: int) -> list[int] | None:
    """The order of the compressed form of a weight on the current GPU, as the attribute `layout` of
    `slidejax_compress_cusparselt`; None if it could not be found out. Needs a GPU."""

def cusparselt_tune(
    dtype: str,
    result: str,
    outputs: int,
    tokens: int,
    columns: int,
    workspace_limit: int,
    finish: bool = True,
) -> list[dict[str, Any]]:
    """Times cuSPARSELt's algorithms for a product on the current GPU, fastest first: `algorithm`,
    `split_k`, `split_k_mode`, `parts`, `beside`, `microseconds`, `workspace_bytes`. With `finish`,
    scales are applied too. Those that are clearly slower than the fastest are left out."""

def hopper_workspace_bytes(
    M: int, out: int, columns: int, group: int, metadata_prepared: bool, multiprocessors: int
) -> int:
    """Bytes of workspace of `slidejax_sparse_matmul_hopper` for a weight of `columns` lifted
    columns and groups of `group` columns (2N), or for a dense one (`group` 0). Needs no GPU. It is
    there only where `build_info()["hopper"]` is true."""
