"""The ops: `lift_quantize`, `sparse_matmul`, `linear`. One file each: formula, reference, primitive, sharding, batching,
derivative, public function. `registry` chooses implementations; `cuda` loads and calls the compiled library."""
