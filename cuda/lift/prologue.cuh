// Prologues: the norms and activations that a model applies right before a linear layer. The kernel
// applies a prologue to the chunks of a row before it looks for absmax. Its result is computed in
// float32 and rounded once, to x's dtype.
// slidejax/ops/prologue.py holds the formulas.
//
// A prologue is a type with kSources (inputs as large as x), kSums (sums over the row that it needs
// first) and these functions. The first two are there only where kSums is not 0.
//   void Sum(chunk, float (&sums)[])             adds a chunk of x to the sums
//   void Finish(const float (&sums)[], params)   receives the sums of the row
//   Chunk Apply(chunk, second, column, params)   returns the chunk of results; zeros past the end
//                                                of the row stay zeros
#pragma once

#include "lift/chunk.cuh"
#include "lift/lift.h"

namespace slidejax::lift {

struct PrologueParams {
  const void* second;   // GLU: up, [rows, columns] like x
  const float* weight;  // norms: [columns]
  const float* bias;    // LayerNorm: [columns] or nullptr
  float eps;
  float per_column;  // 1 / columns
  int columns;
  Activation activation;
};

struct NoPrologue {
  static constexpr int kSources = 1, kSums = 0;
};

// Loads a norm's weight or bias for a chunk, with zeros past the end of the row.
__device__ inline void LoadParameter(const float* from, int column, int columns,
                                     float (&v)[kChunk]) {
  if (column + kChunk <= columns) {
#pragma unroll
    for (int i = 0; i < kChunk; i += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(from + column + i));
      v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[i] = column + i < columns ? __ldg(from + column + i) : 0.0f;
  }
}

// y = x * (rsqrt(mean(x^2) + eps) * weight)
struct RmsNormPrologue {
  static constexpr int kSources = 1, kSums = 1;

  template <typename T>
  __device__ void Sum(const Chunk<T>& x, float (&sums)[kSums]) const {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float2 v = PairOf(x, pair);
      sums[0] = fmaf(v.x, v.x, sums[0]), sums[0] = fmaf(v.y, v.y, sums[0]);
    }
  }
  __device__ void Finish(const float (&sums)[kSums], const PrologueParams& p) {
    factor = rsqrtf(sums[0] * p.per_column + p.eps);
  }
  template <typename T>
  __device__ Chunk<T> Apply(const Chunk<T>& x, const Chunk<T>&, int column,
                            const PrologueParams& p) const {
    float weight[kChunk];
    LoadParameter(p.weight, column, p.columns, weight);
    return Apply(x, weight);
  }
  template <typename T>
  __device__ Chunk<T> Apply(const Chunk<T>& x, const float (&weight)[kChunk]) const {
    Chunk<T> y;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float2 v = PairOf(x, pair);
      SetPair(y, pair, {v.x * (factor * weight[2 * pair]), v.y * (factor * weight[2 * pair + 1])});
    }
    return y;
  }

  float factor = 0;
};

// y = (x - mean) * (rsqrt(max(0, mean(x^2) - mean^2) + eps) * weight) + bias
struct LayerNormPrologue {
  static constexpr int kSources = 1, kSums = 2;

  template <typename T>
  __device__ void Sum(const Chunk<T>& x, float (&sums)[kSums]) const {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float2 v = PairOf(x, pair);
      sums[0] += v.x + v.y;
      sums[1] = fmaf(v.x, v.x, sums[1]), sums[1] = fmaf(v.y, v.y, sums[1]);
    }
  }
  __device__ void Finish(const float (&sums)[kSums], const PrologueParams& p) {
    mean = sums[0] * p.per_column;
    const float variance = sums[1] * p.per_column - mean * mean;
    factor = rsqrtf((variance < 0.0f ? 0.0f : variance) + p.eps);  // nan stays nan
  }
  template <typename T>
  __device__ Chunk<T> Apply(const Chunk<T>& x, const Chunk<T>&, int column,
                            const PrologueParams& p) const {
    float weight[kChunk], bias[kChunk] = {};
    LoadParameter(p.weight, column, p.columns, weight);
    if (p.bias != nullptr) LoadParameter(p.bias, column, p.columns, bias);
    Chunk<T> y;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float2 v = PairOf(x, pair);
      SetPair(y, pair,
              {(v.x - mean) * (factor * weight[2 * pair]) + bias[2 * pair],
               (v.y - mean) * (factor * weight[2 * pair + 1]) + bias[2 * pair + 1]});
    }
    return y;
  }

  float mean = 0, factor = 0;
};

__device__ inline float Activated(float x, Activation activation) {
  switch (activation) {
    case Activation::kSilu: return __fdividef(x, 1.0f + __expf(-x));
    case Activation::kGelu: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::kGeluTanh: {  // 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u))
      const float u = 0.79788456f * (x + 0.044715f * x * x * x);
      return __fdividef(x, 1.0f + __expf(-2.0f * u));
    }
    default: return x < 0.0f ? 0.0f : x;  // relu; nan stays nan
  }
}

// y = activation(x)
struct ActivationPrologue {
  static constexpr int kSources = 1, kSums = 0;

  template <typename T>
  __device__ Chunk<T> Apply(const Chunk<T>& x, const Chunk<T>&, int,
                            const PrologueParams& p) const {
    Chunk<T> y;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float2 v = PairOf(x, pair);
      SetPair(y, pair, {Activated(v.x, p.activation), Activated(v.y, p.activation)});
    }
    return y;
  }
};

// y = activation(x) * up
struct GluPrologue {
  static constexpr int kSources = 2, kSums = 0;

  template <typename T>
  __device__ Chunk<T> Apply(const Chunk<T>& x, const Chunk<T>& up, int,
                            const PrologueParams& p) const {
    Chunk<T> y;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float2 v = PairOf(x, pair), u = PairOf(up, pair);
      SetPair(y, pair, {Activated(v.x, p.activation) * u.x, Activated(v.y, p.activation) * u.y});
    }
    return y;
  }
};

}  // namespace slidejax::lift
