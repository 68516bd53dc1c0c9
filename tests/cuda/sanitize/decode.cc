#include "decode/decode.h"

#include <iterator>

#include "cases.h"

namespace slidejax::sanitize {
namespace {

constexpr DType kTypes[] = {DType::kS8, DType::kE4M3, DType::kBF16, DType::kF16};
constexpr int kGroups[] = {0, 4, 6, 8, 10, 12, 14, 16};

struct Sizes {
  int M, rows, blocks;  // rows and blocks of the weight
  int missing = 0;      // columns of the weight that x has not
  bool gate = false;    // rows of the weight are gates, and their factors
  int out() const { return gate ? rows / 2 : rows; }
};

int Columns(int group, int blocks) { return blocks * (group == 0 ? 32 : 8 * group); }

// A call that reads an array `x` [M, columns], or a new one.
decode::DecodeArgs ArgsOf(Memory& m, DType type, DType float_type, int group, Sizes s,
                          const void* x = nullptr) {
  decode::DecodeArgs a = {};
  a.type = type, a.group = group, a.blocks = s.blocks;
  a.M = s.M, a.out = s.out(), a.gate_rows = s.gate ? s.out() : 0;
  a.columns = Columns(group, s.blocks) - s.missing;
  a.x = x != nullptr ? x : m.Floats(float_type, int64_t{a.M} * a.columns);
  a.x_type = a.y_type = a.residual_type = float_type;
  const int64_t row = int64_t{s.blocks} * (group == 0 ? 32 : 8 * (group - 2));
  a.values = m.Codes(type, s.rows * row);
  if (group != 0) a.zeros = m.Zeros(int64_t{s.rows} * s.blocks * 8, group);
  a.scale_w = m.Scales(s.rows);
  a.y = m.Result(float_type, int64_t{a.M} * a.out);
  a.workspace = m.Take(decode::DecodeWorkspace(a.M, type, group, s.blocks));
  return a;
}

void AddBias(Memory& m, decode::DecodeArgs& a) {
  a.bias = static_cast<float*>(m.Floats(DType::kF32, a.gate_rows != 0 ? 2 * a.out : a.out));
}
void AddResidual(Memory& m, decode::DecodeArgs& a, DType type) {
  a.residual = m.Floats(type, int64_t{a.M} * a.out), a.residual_type = type;
}
void AddNorm(Memory& m, decode::DecodeArgs& a) {
  a.norm = static_cast<float*>(m.Floats(DType::kF32, a.columns)), a.eps = 1e-5f;
}

std::string Details(DType type, DType x, int group, Sizes s) {
  return std::string(Name(x)) + " by " + Name(type) + ", group " + std::to_string(group) + ", [" +
         std::to_string(s.M) + ", " + std::to_string(Columns(group, s.blocks) - s.missing) +
         "] to " + std::to_string(s.out());
}

cudaError_t Checked(const decode::DecodeArgs& a, cudaStream_t stream) {
  return decode::DecodeCheck(a) != nullptr ? cudaErrorInvalidValue : decode::Decode(a, stream);
}

// Three layers: one with a norm and a gate, one that adds x, and a plain one.
cudaError_t Chain(Memory& m, cudaStream_t stream, DType type, DType x_type, int group, int M) {
  const int width = Columns(group, 3) - 8;
  decode::DecodeArgs up = ArgsOf(m, type, x_type, group, {M, 2 * width, 3, 8, true});
  AddNorm(m, up), AddBias(m, up);
  decode::DecodeArgs down = ArgsOf(m, type, x_type, group, {M, width, 3, 8}, up.y);
  down.residual = up.x;
  const decode::DecodeArgs last = ArgsOf(m, type, x_type, group, {M, 37, 3, 8}, down.y);
  const decode::DecodeArgs calls[] = {up, down, last};
  for (const decode::DecodeArgs& call : calls)
    if (decode::DecodeCheck(call) != nullptr) return cudaErrorInvalidValue;
  return decode::DecodeChain(calls, 3, stream);
}

}  // namespace

void DecodeCases(Runner& run) {
  int turn = 0;
  for (const DType type : kTypes) {
    for (const int group : kGroups) {
      // If x is aligned, up to four rows of 16-bit values and all of 8 bits need no kernel ahead.
      for (const Sizes s :
           {Sizes{1, 37, 3}, Sizes{2, 38, 11, 8}, Sizes{3, 16, 5, 8}, Sizes{2, 5, 1, 7},
            Sizes{5, 33, 4}, Sizes{8, 21, 7, 3}, Sizes{13, 33, 4}}) {
        const bool narrow = Bytes(type) == 1;
        const bool own = (narrow || s.M <= 4) && s.missing % 8 == 0;
        const DType x = kFloats[turn++ % std::size(kFloats)];
        const int extra = turn % 5;
        run(std::string("decode ") + Name(type) +
                (narrow && own && s.M > 8 ? " two groups"
                 : own                    ? " own"
                 : s.M > 8                ? " two tiles"
                                          : " ahead"),
            Details(type, x, group, s), [=](Memory& m, cudaStream_t stream) {
              decode::DecodeArgs a = ArgsOf(m, type, x, group, s);
              if (extra == 0) AddBias(m, a);
              if (extra == 1) AddResidual(m, a, kFloats[group % std::size(kFloats)]);
              if (extra == 2) AddNorm(m, a);
              return Checked(a, stream);
            });
      }
      const DType x = kFloats[turn % std::size(kFloats)];
      for (const int M : {1, 7, 12}) {
        const Sizes s = {M, 42, 2, 8, true};
        const int activation = turn % 4;
        run(std::string("decode ") + Name(type) + " gate", Details(type, x, group, s),
            [=](Memory& m, cudaStream_t stream) {
              decode::DecodeArgs a = ArgsOf(m, type, x, group, s);
              a.activation = static_cast<lift::Activation>(activation);
              AddBias(m, a);
              return Checked(a, stream);
            });
      }
    }
    for (const int group : {0, 8}) {
      for (const int M : {1, 4, 8, 16}) {
        run(std::string("decode ") + Name(type) + " chain",
            "group " + std::to_string(group) + ", " + std::to_string(M) + " rows",
            [=](Memory& m, cudaStream_t stream) {
              return Chain(m, stream, type, DType::kBF16, group, M);
            });
      }
    }
  }
  // K in slices, because x of all of it does not fit; more outputs than shared memory has scales.
  for (const Sizes s : {Sizes{8, 17, 320, 5}, Sizes{1, 300007, 1}}) {
    const DType x = DType::kBF16, type = DType::kS8;
    run(s.rows > 1000 ? "decode many outputs" : "decode slices", Details(type, x, 8, s),
        [=](Memory& m, cudaStream_t stream) { return Checked(ArgsOf(m, type, x, 8, s), stream); });
  }
}

}  // namespace slidejax::sanitize
