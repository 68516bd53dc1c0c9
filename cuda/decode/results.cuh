// The results of a thread block that has all sums of its tiles in shared memory.
#pragma once

#include "decode/decode.h"
#include "decode/elements.cuh"
#include "decode/params.h"
#include "decode/ptx.cuh"
#include "lift/prologue.cuh"

namespace slidejax::decode {

// A tile has kRows rows of the weight. Where a gate and its factor are two of them, the gates are
// the first half of a tile. The sums of a part are [M][stride]; parts are added in their order.
template <typename Sum, int kRows>
class BlockResults {
 public:
  Sum* sums;
  float* scale_w;  // and the biases behind them, each [block_rows]
  float* scale_x;

  // `rows` of x from row `first_row` on.
  __device__ BlockResults(const Params& p, int first_row, int rows, int first_tile, int tiles,
                          int stride, int parts)
      : p_(p),
        first_row_(first_row),
        rows_(rows),
        first_tile_(first_tile),
        tiles_(tiles),
        stride_(stride),
        parts_(parts) {}

  __device__ int Words() const { return parts_ * rows_ * stride_; }  // of sums

  __device__ Sum* SumsOf(int part, int m) const { return sums + (part * rows_ + m) * stride_; }

  // Asks for the scales and biases of the block's rows.
  __device__ void AskForScales() const {
    const DecodeArgs& a = p_.a;
    for (int i = threadIdx.x; i < tiles_ * kRows; i += blockDim.x) {
      const int row = RowOf(i);
      Copy4(SharedAddress(scale_w + i), a.scale_w + row);
      if (a.bias != nullptr) Copy4(SharedAddress(scale_w + p_.block_rows + i), a.bias + row);
    }
  }

  // The residual of output number i of the block, of all rows of x; 0 where there is none.
  __device__ float ResidualOf(int i) const {
    const DecodeArgs& a = p_.a;
    if (a.residual == nullptr || i >= rows_ * Outputs()) return 0;
    return LoadFloat(a.residual, a.residual_type, OutputPlace(i));
  }

  // Writes y. `residual` is that of the thread's first output.
  __device__ void Write(float residual) const {
    const DecodeArgs& a = p_.a;
    const int outputs = Outputs();
#pragma unroll 1
    for (int i = threadIdx.x; i < rows_ * outputs; i += blockDim.x) {
      const int m = i / outputs, output = i % outputs;
      float v;
      if (a.gate_rows != 0) {
        constexpr int kHalf = kRows / 2;
        const int row = output / kHalf * kRows + output % kHalf;
        const float gate = Rounded(Scaled(m, row), a.y_type);
        const float other = Rounded(Scaled(m, row + kHalf), a.y_type);
        v = lift::Activated(gate, a.activation) * other;
      } else {
        v = Scaled(m, output);
        if (a.residual != nullptr)
          v = __fadd_rn(v, i == static_cast<int>(threadIdx.x) ? residual : ResidualOf(i));
      }
      StoreFloat(a.y, a.y_type, OutputPlace(i), v);
    }
  }

 private:
  // The row of the weight that is the block's row number i, or one inside the weight beyond its
  // end.
  __device__ int RowOf(int i) const {
    const int output = (first_tile_ + i / kRows) * p_.tile_outputs;
    const int row = i % kRows & (p_.tile_outputs - 1);
    const bool second = i % kRows >= p_.tile_outputs;
    return min(output + row, p_.a.out - 1) + (second ? p_.a.gate_rows : 0);
  }

  // Outputs of the block, of each row of x.
  __device__ int Outputs() const {
    return min(tiles_ * p_.tile_outputs, p_.a.out - first_tile_ * p_.tile_outputs);
  }

  // Where output number i of the block, of all rows of x, goes.
  __device__ int64_t OutputPlace(int i) const {
    return static_cast<int64_t>(first_row_ + i / Outputs()) * p_.a.out +
           first_tile_ * p_.tile_outputs + i % Outputs();
  }

  // The product of row `row` of the block with row m of x.
  __device__ float Scaled(int m, int row) const {
    Sum sum = SumsOf(0, m)[row];
    for (int part = 1; part < parts_; ++part) sum += SumsOf(part, m)[row];
    const float v = __fmul_rn(__fmul_rn(static_cast<float>(sum), scale_x[m]), scale_w[row]);
    return p_.a.bias != nullptr ? __fadd_rn(v, scale_w[p_.block_rows + row]) : v;
  }

  const Params& p_;
  const int first_row_, rows_, first_tile_, tiles_, stride_, parts_;
};

}  // namespace slidejax::decode
