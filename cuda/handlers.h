// The FFI handlers; module.cc hands them out.
#pragma once

#include "xla/ffi/api/c_api.h"

// State types: what the instantiate stage of a handler makes and XLA destroys with the executable.
XLA_FFI_TypeId* slidejax_cusparselt_state_id();
const XLA_FFI_TypeInfo* slidejax_cusparselt_state_info();

extern "C" {
XLA_FFI_Error* slidejax_lift_quantize(XLA_FFI_CallFrame*);
XLA_FFI_Error* slidejax_lift_quantize_fused(XLA_FFI_CallFrame*);
XLA_FFI_Error* slidejax_memcpy(XLA_FFI_CallFrame*);
XLA_FFI_Error* slidejax_cusparselt_compress(XLA_FFI_CallFrame*);
XLA_FFI_Error* slidejax_cusparselt_instantiate(XLA_FFI_CallFrame*);
XLA_FFI_Error* slidejax_cusparselt_initialize(XLA_FFI_CallFrame*);
XLA_FFI_Error* slidejax_cusparselt_execute(XLA_FFI_CallFrame*);
#ifdef SLIDEJAX_HOPPER
XLA_FFI_Error* slidejax_hopper_initialize_handler(XLA_FFI_CallFrame*);
XLA_FFI_Error* slidejax_hopper_execute_handler(XLA_FFI_CallFrame*);
XLA_FFI_Error* slidejax_hopper_metadata_handler(XLA_FFI_CallFrame*);
XLA_FFI_Error* slidejax_hopper_linear_handler(XLA_FFI_CallFrame*);
#endif
}
