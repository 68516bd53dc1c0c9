// The Python module slidejax._cuda (slidejax/_cuda.pyi): it hands out the FFI handlers, and the few
// host functions that Python needs beside them. Importing it needs neither a GPU nor a CUDA driver.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cusparselt/layout.h"
#include "cusparselt/tune.h"
#include "handlers.h"
#ifdef SLIDEJAX_HOPPER
#include "hopper/plan.h"
#endif

namespace nb = nanobind;
using slidejax::DType;

namespace {

nb::capsule Capsule(XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

nb::dict Registrations() {
  nb::dict targets, matmul;
  targets["slidejax_lift_quantize"] = Capsule(slidejax_lift_quantize);
  targets["slidejax_lift_quantize_fused"] = Capsule(slidejax_lift_quantize_fused);
  targets["slidejax_memcpy"] = Capsule(slidejax_memcpy);
  targets["slidejax_compress_cusparselt"] = Capsule(slidejax_compress_cusparselt);
  matmul["instantiate"] = Capsule(slidejax_sparse_matmul_cusparselt_instantiate);
  matmul["initialize"] = Capsule(slidejax_sparse_matmul_cusparselt_initialize);
  matmul["execute"] = Capsule(slidejax_sparse_matmul_cusparselt_execute);
  targets["slidejax_sparse_matmul_cusparselt"] = matmul;
  nb::dict decode, chain;
  decode["initialize"] = Capsule(slidejax_decode_initialize);
  decode["execute"] = Capsule(slidejax_linear_decode);
  targets["slidejax_linear_decode"] = decode;
  chain["initialize"] = Capsule(slidejax_decode_initialize);
  chain["execute"] = Capsule(slidejax_chain_decode);
  targets["slidejax_chain_decode"] = chain;
  nb::dict attention;
  attention["initialize"] = Capsule(slidejax_attention_initialize);
  attention["execute"] = Capsule(slidejax_decode_attention);
  targets["slidejax_decode_attention"] = attention;
#ifdef SLIDEJAX_HOPPER
  nb::dict sparse_matmul, linear, hopper_chain;
  sparse_matmul["initialize"] = Capsule(slidejax_hopper_initialize);
  sparse_matmul["execute"] = Capsule(slidejax_sparse_matmul_hopper);
  targets["slidejax_sparse_matmul_hopper"] = sparse_matmul;
  linear["initialize"] = Capsule(slidejax_hopper_initialize);
  linear["execute"] = Capsule(slidejax_linear_hopper);
  targets["slidejax_linear_hopper"] = linear;
  hopper_chain["initialize"] = Capsule(slidejax_hopper_initialize);
  hopper_chain["execute"] = Capsule(slidejax_chain_hopper);
  targets["slidejax_chain_hopper"] = hopper_chain;
  targets["slidejax_metadata_hopper"] = Capsule(slidejax_metadata_hopper);
#endif
  return targets;
}

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
  if (const auto type = slidejax::DTypeNamed(name)) return *type;
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

nb::object CompressedLayout(const std::string& dtype, int64_t outputs, int64_t columns) {
  std::optional<slidejax::cusparselt::Layout> layout;
  {
    const DType type = ToDType(dtype);
    nb::gil_scoped_release release;
    layout = slidejax::cusparselt::LearnLayout(type, outputs, columns);
  }
  if (!layout) return nb::none();
  return nb::cast(slidejax::cusparselt::ToNumbers(*layout));
}

nb::list Tune(const std::string& dtype, const std::string& result, int64_t outputs, int64_t tokens,
              int64_t columns, size_t workspace_limit, bool finish) {
  std::vector<slidejax::cusparselt::Timing> timings;
  {
    slidejax::cusparselt::Problem problem = {};
    problem.operand = ToDType(dtype), problem.result = ToDType(result);
    problem.outputs = outputs, problem.tokens = tokens, problem.columns = columns;
    nb::gil_scoped_release release;
    timings = slidejax::cusparselt::Tune(problem, workspace_limit, finish);
  }
  nb::list list;
  for (const auto& timing : timings) {
    nb::dict entry;
    entry["algorithm"] = timing.choice.algorithm;
    entry["split_k"] = timing.choice.split_k;
    entry["split_k_mode"] = timing.choice.split_k_mode;
    entry["parts"] = timing.choice.parts;
    entry["beside"] = timing.choice.beside;
    entry["microseconds"] = timing.microseconds;
    entry["workspace_bytes"] = timing.workspace_bytes;
    list.append(entry);
  }
  return list;
}

#ifdef SLIDEJAX_HOPPER
size_t HopperWorkspaceBytes(int M, int out, int columns, int group, bool metadata_prepared,
                            int multiprocessors) {
  return slidejax::hopper::WorkspaceBytes({M, out, columns, group}, {}, metadata_prepared,
                                          multiprocessors);
}
#endif

}  // namespace

NB_MODULE(_cuda, m) {
  m.doc() = "slidejax's CUDA kernels as XLA FFI handlers";
  nb::exception<slidejax::cusparselt::Failure>(m, "CusparseltError", PyExc_RuntimeError);
  m.def("registrations", &Registrations);
  m.def("types", &Types);
  m.def("build_info", &BuildInfo);
  m.def("load_cusparselt", &slidejax::cusparselt::Load, nb::arg("candidates"));
  m.def("cusparselt_version", &CusparseltVersion);
  m.def("cusparselt_compressed_bytes", &CompressedBytes, nb::arg("dtype"), nb::arg("outputs"),
        nb::arg("columns"));
  m.def("cusparselt_layout", &CompressedLayout, nb::arg("dtype"), nb::arg("outputs"),
        nb::arg("columns"));
  m.def("cusparselt_tune", &Tune, nb::arg("dtype"), nb::arg("result"), nb::arg("outputs"),
        nb::arg("tokens"), nb::arg("columns"), nb::arg("workspace_limit"),
        nb::arg("finish") = true);
#ifdef SLIDEJAX_HOPPER
  m.def("hopper_workspace_bytes", &HopperWorkspaceBytes, nb::arg("M"), nb::arg("out"),
        nb::arg("columns"), nb::arg("group"), nb::arg("metadata_prepared"),
        nb::arg("multiprocessors"));
#endif
}
