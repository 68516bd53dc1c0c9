"""The ops: `lift_quantize`, `sparse_matmul`, `linear`. One file each: formula, reference, primitive, sharding, batching,
derivative, public function. `registry` chooses implementations; `ffi` loads and calls the compiled library."""
