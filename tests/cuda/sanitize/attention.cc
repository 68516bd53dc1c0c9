#include "attention/attention.h"

#include <vector>

#include "cases.h"

namespace slidejax::sanitize {
namespace {

struct Sizes {
  int heads, kv_heads, length, head_dim, window;
};

// Rows whose positions are none, the first, a middle one and the last; those of a cache that a
// window fills go on beyond its length.
std::vector<int32_t> Positions(const Sizes& s) {
  std::vector<int32_t> positions = {-1, 0, s.length / 2, s.length - 1};
  if (s.window == s.length) positions.push_back(3 * s.length + 1);
  return positions;
}

cudaError_t Attend(Memory& m, cudaStream_t stream, DType type, DType cache, const Sizes& s) {
  attention::AttentionArgs a = {};
  const std::vector<int32_t> positions = Positions(s);
  a.rows = static_cast<int32_t>(positions.size());
  a.heads = s.heads, a.kv_heads = s.kv_heads, a.length = s.length, a.head_dim = s.head_dim;
  a.scale = 0.1f, a.window = s.window;
  const int64_t q_size = int64_t{s.heads} * s.head_dim, kv_size = int64_t{s.kv_heads} * s.head_dim;
  const int64_t row = q_size + 2 * kv_size, bytes = Bytes(type);
  // q, k and v lie side by side in a row.
  const char* const together = static_cast<const char*>(m.Floats(type, a.rows * row));
  a.q = together, a.k = together + q_size * bytes, a.v = together + (q_size + kv_size) * bytes;
  a.q_stride = a.kv_stride = row, a.type = type, a.cache_type = cache;
  const int64_t cached = a.rows * kv_size * s.length;
  a.keys = m.Changed(m.Floats(cache, cached), cache, cached);
  a.values = m.Changed(m.Floats(cache, cached), cache, cached);
  a.positions = m.Integers(positions);
  const int64_t angles = int64_t{a.rows} * s.head_dim / 2;
  a.cosines = static_cast<float*>(m.Floats(DType::kF32, angles));
  a.sines = static_cast<float*>(m.Floats(DType::kF32, angles));
  a.y = m.Result(type, a.rows * q_size);
  a.workspace = m.Take(attention::AttentionWorkspace(a));
  return attention::Attention(a, stream);
}

}  // namespace

void AttentionCases(Runner& run) {
  int turn = 0;
  for (const DType cache : kFloats) {
    for (const Sizes& s :
         {Sizes{4, 4, 1, 16, 0}, Sizes{3, 1, 37, 48, 0}, Sizes{12, 2, 300, 64, 41},
          Sizes{6, 3, 129, 80, 0}, Sizes{8, 1, 65, 128, 65}, Sizes{9, 1, 40, 112, 3},
          Sizes{2, 2, 33, 144, 0}, Sizes{4, 1, 515, 256, 100}, Sizes{16, 2, 21, 256, 21}}) {
      const DType type = kFloats[turn++ % 3];
      run(std::string("attention ") + Name(cache) +
              (s.head_dim > 128  ? " 32 lanes"
               : s.head_dim > 64 ? " 16 lanes"
                                 : " 8 lanes") +
              (s.heads / s.kv_heads > 4 ? ", 8 heads" : ", 4 heads"),
          std::string(Name(type)) + ", " + std::to_string(s.heads) + " heads of " +
              std::to_string(s.kv_heads) + " with " + std::to_string(s.head_dim) + ", length " +
              std::to_string(s.length) + ", window " + std::to_string(s.window),
          [=](Memory& m, cudaStream_t stream) { return Attend(m, stream, type, cache, s); });
    }
  }
}

}  // namespace slidejax::sanitize
