"""The ops `lift_quantize`, `sparse_matmul` and `linear`, and the choice of what runs them.

Each op is one file: formula, reference, primitive, sharding, batching, derivative, public function.
The reference of `sparse_matmul` is in `implementations/reference.py`.
`implementations` holds one file for each way to compute a product, `registry` lists them, and
`choice` decides which one runs. `cuda` loads and calls the compiled library.
"""
