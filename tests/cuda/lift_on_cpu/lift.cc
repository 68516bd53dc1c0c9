// The lift kernels on a CPU (cuda_on_cpu/): the C function that tests/cuda/test_lift_emulated.py
// calls.
#include "lift/lift.h"

#include "cuda_runtime_api.h"

namespace slidejax::lift {
alignas(16) char shared[emulated::kSharedBytes];
}  // namespace slidejax::lift

char* const emulated::shared_memory = slidejax::lift::shared;

// One call of LiftQuantize on a device of `multiprocessors`; dtypes, prologue and activation by
// name. Returns the status, or -1 for an unknown name.
extern "C" int lift_quantize(const void* x, const char* x_type, const float* absmax, const void* up,
                             const float* weight, const float* bias, void* lifted,
                             const char* lifted_type, float* scale, int64_t rows, int64_t columns,
                             int64_t x_stride, int64_t lifted_columns, int group,
                             const char* prologue, const char* activation, float eps,
                             int multiprocessors, int shared_of_block, int lazy, int seed) {
  using namespace slidejax;
  emulated::multiprocessors = multiprocessors, emulated::shared_of_block = shared_of_block;
  emulated::shared_of_multiprocessor = shared_of_block + 1024;
  const auto x_dtype = DTypeNamed(x_type), lifted_dtype = DTypeNamed(lifted_type);
  const auto kind = lift::PrologueOf(prologue);
  const auto function = lift::ActivationOf(activation);
  if (!x_dtype || !lifted_dtype || !kind || !function) return -1;

  emulated::Begin(lazy != 0, seed);
  const int64_t element = static_cast<int64_t>(Bytes(*x_dtype));
  const int64_t x_bytes = rows * x_stride * element;
  // Without up, the rows of x that are longer than `columns` hold up in their second half.
  if (up == nullptr && x_stride > columns) up = static_cast<const char*>(x) + columns * element;
  emulated::Allow(x, x_bytes);
  if (x_stride == columns) emulated::Allow(up, x_bytes);
  emulated::Allow(weight, 4 * columns), emulated::Allow(bias, 4 * columns);

  lift::Args args = {};
  args.x = x, args.x_type = *x_dtype, args.absmax = absmax;
  args.lifted = lifted, args.lifted_type = *lifted_dtype, args.scale = scale;
  args.rows = rows, args.columns = columns, args.lifted_columns = lifted_columns;
  args.x_stride = x_stride;
  args.group = group, args.prologue = *kind, args.activation = *function;
  args.up = up, args.weight = weight, args.bias = bias, args.eps = eps;
  // Now and then the kernel ahead may still write x when this one begins.
  args.behind = seed % 3 == 1;
  if (args.behind) emulated::Make(x, x_bytes), emulated::Make(args.up, x_bytes);
  return LiftQuantize(args, nullptr);
}
