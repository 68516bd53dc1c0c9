// The FFI handlers, which module.cc hands out. Each folder's handlers.cc defines its own.
#pragma once

#include "xla/ffi/api/ffi.h"

// A state type: what the instantiate stage of a handler makes, and XLA destroys with the
// executable.
XLA_FFI_TypeId* slidejax_cusparselt_state_id();
const XLA_FFI_TypeInfo* slidejax_cusparselt_state_info();

XLA_FFI_DECLARE_HANDLER_SYMBOL(slidejax_lift_quantize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(slidejax_lift_quantize_fused);
XLA_FFI_DECLARE_HANDLER_SYMBOL(slidejax_memcpy);
XLA_FFI_DECLARE_HANDLER_SYMBOL(slidejax_compress_cusparselt);
XLA_FFI_DECLARE_HANDLER_SYMBOL(slidejax_sparse_matmul_cusparselt_instantiate);
XLA_FFI_DECLARE_HANDLER_SYMBOL(slidejax_sparse_matmul_cusparselt_initialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(slidejax_sparse_matmul_cusparselt_execute);
XLA_FFI_DECLARE_HANDLER_SYMBOL(slidejax_decode_initialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(slidejax_linear_decode);
XLA_FFI_DECLARE_HANDLER_SYMBOL(slidejax_chain_decode);
XLA_FFI_DECLARE_HANDLER_SYMBOL(slidejax_attention_initialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(slidejax_decode_attention);
#ifdef SLIDEJAX_HOPPER
XLA_FFI_DECLARE_HANDLER_SYMBOL(slidejax_hopper_initialize);
XLA_FFI_DECLARE_HANDLER_SYMBOL(slidejax_metadata_hopper);
XLA_FFI_DECLARE_HANDLER_SYMBOL(slidejax_sparse_matmul_hopper);
XLA_FFI_DECLARE_HANDLER_SYMBOL(slidejax_linear_hopper);
XLA_FFI_DECLARE_HANDLER_SYMBOL(slidejax_chain_hopper);
#endif
