// The Python module slidejax._cuda: hands out the FFI handlers, and the few host functions that
// Python needs beside them. Importing it needs neither a GPU nor a CUDA driver.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cusparselt/plan.h"
#include "handlers.h"
#ifdef SLIDEJAX_HOPPER
#include "hopper/hopper.h"
#endif

namespace nb = nanobind;
using slidejax::DType;

namespace {

nb::capsule Capsule(XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

// {target: capsule, or {stage: capsule}}, for jax.ffi.register_ffi_target.
nb::dict Registrations() {
  nb::dict targets, matmul;
  targets["slidejax_lift_quantize"] = Capsule(slidejax_lift_quantize);
  targets["slidejax_lift_quantize_fused"] = Capsule(slidejax_lift_quantize_fused);
  targets["slidejax_memcpy"] = Capsule(slidejax_memcpy);
  targets["slidejax_cusparselt_compress"] = Capsule(slidejax_cusparselt_compress);
  matmul["instantiate"] = Capsule(slidejax_cusparselt_instantiate);
  matmul["initialize"] = Capsule(slidejax_cusparselt_initialize);
  matmul["execute"] = Capsule(slidejax_cusparselt_execute);
  targets["slidejax_sparse_matmul_cusparselt"] = matmul;
#ifdef SLIDEJAX_HOPPER
  nb::dict hopper;
  hopper["initialize"] = Capsule(slidejax_hopper_initialize_handler);
  hopper["execute"] = Capsule(slidejax_hopper_execute_handler);
  targets["slidejax_sparse_matmul_hopper"] = hopper;
  nb::dict linear;
  linear["initialize"] = Capsule(slidejax_hopper_initialize_handler);
  linear["execute"] = Capsule(slidejax_hopper_linear_handler);
  targets["slidejax_linear_hopper"] = linear;
  targets["slidejax_hopper_metadata"] = Capsule(slidejax_hopper_metadata_handler);
#endif
  return targets;
}

// {name: {"type_id": capsule, "type_info": capsule}}, for jax.ffi.register_ffi_type.
nb::dict Types() {
  nb::dict types, state;
  state["type_id"] = nb::capsule(static_cast<void*>(slidejax_cusparselt_state_id()));
  state["type_info"] = nb::capsule(static_cast<const void*>(slidejax_cusparselt_state_info()));
  types["slidejax_cusparselt_state"] = state;
  return types;
}

nb::dict BuildInfo() {
  nb::dict info;
  info["version"] = SLIDEJAX_VERSION;
  info["cuda"] = SLIDEJAX_CUDA_VERSION;
  info["architectures"] = SLIDEJAX_ARCHITECTURES;
  info["jaxlib"] = SLIDEJAX_JAXLIB;
  info["ffi_api"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
#ifdef SLIDEJAX_HOPPER
  info["hopper"] = true;
#else
  info["hopper"] = false;
#endif
  return info;
}

DType ToDType(const std::string& name) {
  for (const DType type :
       {DType::kS8, DType::kE4M3, DType::kBF16, DType::kF16, DType::kF32, DType::kS32}) {
    if (name == slidejax::Name(type)) return type;
  }
  throw nb::value_error(("unknown dtype " + name).c_str());
}

nb::object CusparseltVersion() {
  const auto* api = slidejax::cusparselt::Loaded();
  if (api == nullptr) return nb::none();
  return nb::make_tuple(api->version[0], api->version[1], api->version[2]);
}

size_t CompressedBytes(const std::string& dtype, int64_t outputs, int64_t columns) {
  return slidejax::cusparselt::SizeOfCompressed(ToDType(dtype), outputs, columns).compressed;
}

nb::list Tune(const std::string& dtype, const std::string& result, bool alpha_vector,
              int64_t outputs, int64_t tokens, int64_t columns, size_t workspace_limit,
              int repeats) {
  std::vector<slidejax::cusparselt::Timing> timings;
  {
    const DType operand_type = ToDType(dtype), result_type = ToDType(result);
    nb::gil_scoped_release release;
    timings = slidejax::cusparselt::Tune(
        {operand_type, result_type, alpha_vector, outputs, tokens, columns, {}}, workspace_limit,
        repeats);
  }
  nb::list list;
  for (const auto& timing : timings) {
    nb::dict entry;
    entry["algorithm"] = timing.choice.algorithm;
    entry["split_k"] = timing.choice.split_k;
    entry["split_k_mode"] = timing.choice.split_k_mode;
    entry["microseconds"] = timing.microseconds;
    entry["workspace_bytes"] = timing.workspace_bytes;
    list.append(entry);
  }
  return list;
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.doc() = "slidejax's CUDA kernels as XLA FFI handlers";
  nb::exception<slidejax::cusparselt::Failure>(m, "CusparseltError", PyExc_RuntimeError);
  m.def("registrations", &Registrations);
  m.def("types", &Types);
  m.def("build_info", &BuildInfo);
  m.def("load_cusparselt", &slidejax::cusparselt::Load, nb::arg("candidates"),
        "Loads cuSPARSELt from the first of these paths that works; returns '' or why none does.");
  m.def("cusparselt_version", &CusparseltVersion,
        "(major, minor, patch) of the library that is loaded, or None.");
  m.def("cusparselt_compressed_bytes", &CompressedBytes, nb::arg("dtype"), nb::arg("outputs"),
        nb::arg("columns"), "Bytes of a weight's compressed form. Needs a GPU.");
  m.def("cusparselt_tune", &Tune, nb::arg("dtype"), nb::arg("result"), nb::arg("alpha_vector"),
        nb::arg("outputs"), nb::arg("tokens"), nb::arg("columns"), nb::arg("workspace_limit"),
        nb::arg("repeats") = 10,
        "Times the library's kernels on the current GPU: [{algorithm, split_k, "
        "split_k_mode, microseconds, workspace_bytes}], fastest first.");
#ifdef SLIDEJAX_HOPPER
  m.def("hopper_metadata_bytes", &slidejax_hopper_metadata_bytes, nb::arg("out"), nb::arg("groups"),
        nb::arg("group"), "Bytes of a weight's metadata in the kernel's order. Needs no GPU.");
  m.def(
      "hopper_workspace_bytes",
      [](int M, int out, int groups, int group, const std::string& dtype, bool has_metadata,
         int multiprocessors) {
        slidejax::HopperArgs args = {};
        args.M = M, args.out = out, args.groups = groups, args.group = group;
        args.input = ToDType(dtype) == DType::kS8 ? slidejax::HopperInput::kS8
                                                  : slidejax::HopperInput::kE4M3;
        args.meta =
            has_metadata ? reinterpret_cast<const uint32_t*>(16) : nullptr;  // only tested for null
        args.config = -1, args.split = -1;
        return slidejax_hopper_workspace(args, multiprocessors);
      },
      nb::arg("M"), nb::arg("out"), nb::arg("groups"), nb::arg("group"), nb::arg("dtype"),
      nb::arg("has_metadata"), nb::arg("multiprocessors"),
      "Bytes of workspace of slidejax_sparse_matmul_hopper. Needs no GPU.");
#endif
}
