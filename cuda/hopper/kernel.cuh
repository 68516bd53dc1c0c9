// The GEMM kernel: a persistent grid of clusters. Each CTA has two consumer warp groups, which
// issue wgmma and write y, and a producer warp group, of which one warp copies X and one copies W.
// Tiles of few tokens have one more warp group, which makes the metadata (pipeline.cuh).
//
// The sparse operand of wgmma must be A, so a CTA computes D = W' X^T: rows of D are outputs,
// columns are tokens. The same kernel multiplies dense weights, without metadata.
//
// Work is counted in steps of two slices (256 columns of the product) because the metadata
// registers alternate, and ptxas follows wgmma's asynchronous use of them only through a loop
// without other exits.
#pragma once

#include "hopper/epilogue.cuh"
#include "hopper/pipeline.cuh"
#include "hopper/split_k.cuh"
#include "hopper/wgmma.cuh"

namespace slidejax::hopper {

inline constexpr int kStartBarrier = 8;  // a named barrier of both consumer warp groups

// The work of a consumer thread: it waits for stages, issues wgmma and hands the sums to the
// epilogue.
//
// The accumulators are declared inside the loop over work tiles and passed around by reference. If
// they were carried from tile to tile, ptxas would keep them alive through the epilogue and spill
// there.
template <class T>
class Consumer {
 public:
  SJ_DEVICE Consumer(const Params& p, const Shared& shared, const CtaPlace& place)
      : p_(p),
        shared_(shared),
        place_(place),
        thread_(threadIdx.x & 127),
        warp_(__shfl_sync(~0u, static_cast<int>(threadIdx.x >> 5), 0)),
        group_(warp_ >> 2),
        metadata_at_(MetadataOfThread(thread_)) {}

  SJ_DEVICE void Run() {
    for (bool start = true;; start = false, scale_set_ ^= 1) {
      BarrierWait(shared_.x.full + 8 * x_.stage, x_.parity);
      const int4 info = LoadShared4I(shared_.work_info + 16 * x_.stage);
      int steps = __shfl_sync(~0u, info.z, 0);
      const int split = __shfl_sync(~0u, info.w, 0);
      if constexpr (T::kHoldsZeros) {
        phase_ = steps >> kPhaseShift;
        steps &= (1 << kPhaseShift) - 1;
      }
      const int row = __shfl_sync(~0u, info.x, 0) + group_ * T::kM64Blocks * 64;
      const int token = __shfl_sync(~0u, info.y, 0);
      if (steps == 0) break;
      MultiplyTile(start, steps, {split, row, token});
    }
    if (const Worker me = WorkerOf<T>(p_, place_.cta_group, place_.rank);
        me.index < p_.stream_k_workers) {
      FixUp<T>(p_, shared_, me, warp_, inherited_);
    }
    if (thread_ == 0) BulkWaitRead<0>();  // shared memory must outlive the stores from it
  }

 private:
  using Instruction = Wgmma<T::kFp8, T::kTokens>;
  using Accumulator = typename Instruction::Accumulator;
  using Sums = Accumulator[T::kM64Blocks][T::kTokens / 2];
  using Metadata = uint32_t[T::kM64Blocks][2];
  static constexpr int kInstructions = T::kSparse ? 2 : 4;  // for a slice of an m64 block

  struct Target {
    int split;       // WorkTile::split
    int row, token;  // the warp group's first output, the tile's first token
  };
  struct Slice {
    uint32_t x, w;  // where it lies in shared memory
  };

  SJ_DEVICE int StageW() const {
    return T::kRingsInStep ? x_.stage * T::kSlicesX / T::kSlicesW : w_.stage;
  }

  // A stage is released to every CTA that wrote into this one, by one thread for each. X comes from
  // the CTAs of the group, whose places in the cluster differ in their last bits.
  SJ_DEVICE void ReleaseX(int stage) {
    if constexpr (T::kCtas == 1) {
      if (thread_ == 0) BarrierArrive(shared_.x.empty + 8 * stage);
    } else if (thread_ < T::kCtas) {
      BarrierArriveAt(shared_.x.empty + 8 * stage, place_.in_cluster ^ thread_);
    }
  }
  // Shared W comes from this CTA and from the one of the same rank in the other CTA group.
  SJ_DEVICE void ReleaseW(int stage) {
    if (thread_ == 32) BarrierArrive(shared_.w.empty + 8 * stage);
    if (T::kCanShareW && thread_ == 33 && p_.role == kPrimary) {
      BarrierArriveAt(shared_.w.empty + 8 * stage, place_.in_cluster ^ T::kCtas);
    }
  }

  // Thread 32 q + l of a warp group holds the metadata of row 16 q + l / 4 + 8 (l % 2) and, of each
  // k64 step, of the 32 columns from 32 (l / 2 % 2) on, as eight nibbles with K ascending.
  SJ_DEVICE static int MetadataOfThread(int thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * (thread % 2), half = thread / 2 % 2;
    return MetadataRow(row) + 8 * half;
  }

  // A row of a stage has 32 bytes. The zeros begin with those of the group in which the stage
  // begins, 5 * phase bytes behind: they are shifted to the front. Half h has the words 2 i + h of
  // a stage, 8 (2 i + h) windows behind it. Zero number (phase + 8 (2 i + h)) / 3 is the first one
  // of the word.
  SJ_DEVICE void LoadZeros(uint32_t stage) {
    const int row = thread_ / 32 * 16 + thread_ % 32 / 4 + 8 * (thread_ % 2);
    const uint32_t swapped = row << 2 & 16;  // the swizzle of the copy
#pragma unroll
    for (int b = 0; b < T::kM64Blocks; ++b) {
      const uint32_t from =
          stage + T::kValueBytes + ((group_ * T::kM64Blocks + b) * 64 + row) * kZerosPitch;
      const uint4 v = LoadShared4(from + swapped), w = LoadShared4(from + (16 ^ swapped));
      const uint32_t words[10] = {v.x, v.y, v.z, v.w, w.x, w.y, w.z, w.w, 0, 0};
      uint32_t shifted[7];  // by the words of 5 * phase bytes, which are 0, 1 and 2
#pragma unroll
      for (int i = 0; i < 7; ++i) {
        const uint32_t moved = phase_ == 2 ? words[i + 2] : words[i + 1];
        shifted[i] = phase_ == 0 ? words[i] : moved;
      }
#pragma unroll
      for (int i = 0; i < 6; ++i) {
        zeros_[b][i] = __funnelshift_r(shifted[i], shifted[i + 1], 8 * phase_);
      }
    }
  }
  template <int kSlice>
  SJ_DEVICE void MakeMetadata(Metadata& meta) {
    const int half = thread_ / 2 % 2;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int i = 2 * kSlice + k;
      const int window = phase_ + 8 * half + 16 * i;
      const int zero = window * 43 >> 7;  // window / 3
      // The four zeros begin within the first of these words, 0, 1, 2 and 4 or, of the second half,
      // 0, 2, 3 and 4.
      const int first = i == 3 ? 4 : i, second = i == 3 || i == 0 ? first : first + 1;
#pragma unroll
      for (int b = 0; b < T::kM64Blocks; ++b) {
        const uint32_t (&z)[6] = zeros_[b];
        const uint32_t low = half ? z[second] : z[first];
        const uint32_t high = half ? z[second + 1] : z[first + 1];
        meta[b][k] = WordOfGroupsOfEight(__funnelshift_r(low, high, 8 * zero), window - 3 * zero);
      }
    }
  }

  SJ_DEVICE void LoadMetadata(Metadata& meta, uint32_t stage, int slice) {
    if constexpr (T::kSparse) {
      const uint32_t from = stage + T::kValueBytes +
                            (group_ * T::kM64Blocks * T::kSlicesW + slice) * kMetadataSliceBytes +
                            metadata_at_;
#pragma unroll
      for (int b = 0; b < T::kM64Blocks; ++b) {
        const uint2 v = LoadShared2(from + b * T::kSlicesW * kMetadataSliceBytes);
        meta[b][0] = v.x;
        meta[b][1] = v.y;
      }
    }
  }

  // Instruction k of a slice for m64 block b: 64 columns, or 32 of a dense weight. Where `add` is 0
  // the sums need no clearing.
  SJ_DEVICE void Multiply(Accumulator (&sums)[T::kTokens / 2], const Slice& at, int b, int k,
                          const uint32_t (&meta)[2], int add) {
    const uint64_t rows =
        Descriptor<128>(at.w + (group_ * T::kM64Blocks + b) * (64 * 128) + 32 * k);
    if constexpr (T::kSparse) {
      Instruction::Mma(sums, rows, Descriptor<128>(at.x + 64 * k), meta[k], add);
    } else {
      Instruction::Dense(sums, rows, Descriptor<128>(at.x + 32 * k), add);
    }
  }

  // Waits for slice kIndex of a step and loads its metadata. kFirst: it is the first of a tile,
  // whose X has been waited for.
  template <int kIndex, bool kFirst>
  SJ_DEVICE Slice Arrive(Metadata& meta) {
    constexpr int kSliceX = kIndex % T::kSlicesX, kSliceW = kIndex % T::kSlicesW;
    if (!kFirst && kSliceX == 0) BarrierWait(shared_.x.full + 8 * x_.stage, x_.parity);
    if (kSliceW == 0) {
      BarrierWait(shared_.w.full + 8 * StageW(), T::kRingsInStep ? x_.parity : w_.parity);
    }
    const uint32_t stage_w = shared_.w.data + StageW() * T::kStageBytesW;
    if constexpr (T::kHoldsZeros) {
      if (kSliceW == 0) LoadZeros(stage_w);
      MakeMetadata<kSliceW>(meta);
      if (kSliceW == 1) phase_ = phase_ == 2 ? 0 : phase_ + 1;
    } else {
      LoadMetadata(meta, stage_w, kSliceW);
    }
    return {shared_.x.data + x_.stage * T::kStageBytesX + kSliceX * (T::kTokens * 128),
            stage_w + 64 * kSliceW};
  }

  // Goes on to the slice after slice kIndex of a step.
  template <int kIndex>
  SJ_DEVICE void Advance() {
    if (kIndex % T::kSlicesW == T::kSlicesW - 1) {
      previous_w_ = StageW();
      if (!T::kRingsInStep) w_.Advance();
    }
    if (kIndex % T::kSlicesX == T::kSlicesX - 1) {
      previous_x_ = x_.stage;
      x_.Advance();
    }
  }

  // Issues the instructions of a slice. When those of the slice before it have run, releases the
  // stages that they have read.
  template <int kIndex, bool kFirst>
  SJ_DEVICE void SliceStep(Sums& d, Metadata& meta) {
    const Slice at = Arrive<kIndex, kFirst>(meta);
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < kInstructions; ++k) {
#pragma unroll
      for (int b = 0; b < T::kM64Blocks; ++b) {
        Multiply(d[b], at, b, k, meta[b], kFirst && k == 0 ? 0 : 1);
      }
    }
    WgmmaCommit();
    WgmmaWait<1>();
    if (!kFirst && kIndex % T::kSlicesX == 0) ReleaseX(previous_x_);
    if (!kFirst && kIndex % T::kSlicesW == 0) ReleaseW(previous_w_);
    Advance<kIndex>();
  }

  SJ_DEVICE void MultiplyTile(bool start, int steps, const Target& target) {
    Sums d;
    Metadata e[2];  // of two slices: running instructions read one while the other is loaded
    // Once, at the start, the second warp group lets the first one get ahead. From then on the
    // epilogue of one runs while the instructions of the other keep the tensor cores busy.
    const bool waits = T::kWarpGroups == 2 && start;
    if (waits && group_ == 1) NamedSync(kStartBarrier, 256);
    previous_x_ = previous_w_ = 0;
    SliceStep<0, true>(d, e[0]);
    if (waits && group_ == 0) NamedArrive(kStartBarrier, 256);
    if (target.split < 0) {
      PrefetchScales<T>(p_, ScalesOf<T>(shared_, group_, scale_set_), target.row, target.token);
    }
    SliceStep<1, false>(d, e[1]);
    // With two m64 blocks, the last step of a whole tile is left to StoreUnderLastStep.
    constexpr bool kTail = T::kM64Blocks == 2;
    const int plain = kTail && target.split == kWholeTile ? steps - 1 : steps;
#pragma unroll 1
    for (int k = 1; k < plain; ++k) {
      SliceStep<0, false>(d, e[0]);
      SliceStep<1, false>(d, e[1]);
    }
    if (!kTail || target.split != kWholeTile) {
      WgmmaWait<0>();
      ReleaseX(previous_x_);
      ReleaseW(previous_w_);
#pragma unroll
      for (int b = 0; b < T::kM64Blocks; ++b) Pin(d[b]);
      HandOver(d, target);
    } else if constexpr (kTail) {
      StoreUnderLastStep(d, e, target);
    }
  }

  // Passes on the sums of a tile, or of a part of its K, when all instructions have run.
  SJ_DEVICE void HandOver(Sums& d, const Target& target) {
    if (T::kCanSplitInCluster && target.split == kSplitInCluster) {
      ClusterSync();  // nobody needs the rings any more
      SendPartials<T>(p_, d, shared_, place_.rank, place_.group_in_cluster, warp_);
      CopyAsyncWait();
      if (thread_ == 0) BulkWaitRead<0>();
      ClusterSync();  // all sums and scales have arrived, and the staging buffers are free
      ReduceInbox<T>(p_, shared_, place_.group_in_cluster, warp_, scale_set_, target.row,
                     target.token);
    } else if (target.split >= 0) {
      const Worker me = WorkerOf<T>(p_, place_.cta_group, place_.rank);
      inherited_ |= StorePartial<T>(p_, d, target.split, me, warp_)
                    << (target.split == FirstStep(p_, me.index) / p_.steps ? 0 : 16);
    } else {
      CopyAsyncWait();
      if (T::kSlabs == 1 && thread_ == 0) BulkWaitRead<0>();
      NamedSync(1 + group_, 128);
      if constexpr (T::kM64Blocks == 1) {
        StoreBlock<T, 0>(p_, d[0], shared_, warp_, scale_set_, target.row, target.token);
      }
    }
  }

  // The last step of a whole tile: all of its columns for the first m64 block, then all for the
  // second, under which the first is stored.
  SJ_DEVICE void StoreUnderLastStep(Sums& d, Metadata (&e)[2], const Target& target) {
    static_assert(T::kSlicesX == 1);
    const int before_x = previous_x_, before_w = previous_w_;
    const Slice even = Arrive<0, false>(e[0]);
    Advance<0>();
    const int even_x = previous_x_, even_w = previous_w_;
    const Slice odd = Arrive<1, false>(e[1]);
    Advance<1>();
    auto block_step = [&](int b) {
#pragma unroll
      for (int k = 0; k < kInstructions; ++k) Multiply(d[b], even, b, k, e[0][b], 1);
#pragma unroll
      for (int k = 0; k < kInstructions; ++k) Multiply(d[b], odd, b, k, e[1][b], 1);
      WgmmaCommit();
    };
    WgmmaFence();
    block_step(0);
    WgmmaWait<1>();
    ReleaseX(before_x);
    ReleaseW(before_w);
    block_step(1);
    CopyAsyncWait();
    NamedSync(1 + group_, 128);  // the scales have arrived, and all have read those before them
    WgmmaWait<1>();
    Pin(d[0]);
    StoreBlock<T, 0>(p_, d[0], shared_, warp_, scale_set_, target.row, target.token);
    WgmmaWait<0>();
    Pin(d[1]);
    ReleaseX(even_x);
    ReleaseX(previous_x_);
    if (T::kSlicesW == 1) ReleaseW(even_w);
    ReleaseW(previous_w_);
    StoreBlock<T, 1>(p_, d[1], shared_, warp_, scale_set_, target.row, target.token);
  }

  const Params& p_;
  const Shared& shared_;
  const CtaPlace& place_;
  const int thread_;  // of the warp group
  const int warp_, group_;
  const int metadata_at_;  // of a slice of an m64 block
  RingPosition<T::kStagesX> x_{0, 0};
  RingPosition<T::kStagesW> w_{0, 0};
  int previous_x_ = 0, previous_w_ = 0;  // the stages that the slice before has read
  uint32_t inherited_ = 0;  // reduction units that other workers have left to this warp
  int scale_set_ = 0;       // the scales of the tile before may still be in use
  // Where stages hold zeros: the phase of the next stage, and the zeros of this stage's rows.
  static constexpr int kZerosPitch = 32;
  int phase_ = 0;
  uint32_t zeros_[T::kHoldsZeros ? T::kM64Blocks : 1][6];
};

template <class T>
SJ_DEVICE void InitBarriers(const Params& p, const Shared& shared) {
  for (int i = 0; i < T::kStagesX; ++i) {
    BarrierInit(shared.x.full + 8 * i, 1);
    BarrierInit(shared.x.empty + 8 * i, T::kWarpGroups * T::kCtas);
  }
  for (int i = 0; i < T::kStagesW; ++i) {
    BarrierInit(shared.w.full + 8 * i, ExpandsZeros<T>(p) ? 1 + T::kRows / 32 : 1);
    BarrierInit(shared.w.empty + 8 * i, T::kWarpGroups * (p.role == kPrimary ? 2 : 1));
    if constexpr (T::kExpands) BarrierInit(shared.zeros + 8 * i, 32);
  }
  FenceBarrierInit();
  PrefetchMap(&p.map_x);
  if (p.M % T::kTokensOfCta != 0) PrefetchMap(&p.map_x_end);
  PrefetchMap(&p.map_w);
  if (T::kSparse && !ExpandsZeros<T>(p)) PrefetchMap(&p.map_e);
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    SparseMatmulKernel(const __grid_constant__ Params p) {
  SJ_DYNAMIC_SHARED(dynamic);
  const Shared shared = MakeShared<T>(SharedAddress(dynamic));
  const uint32_t in_cluster = T::kCtas > 1 || T::kCanSplitInCluster ? ClusterRank() : 0;
  const CtaPlace place{
      in_cluster, in_cluster % T::kCtas,
      T::kCanSplitInCluster || T::kCanShareW ? static_cast<int>(in_cluster / T::kCtas) : 0,
      p.first_group + static_cast<int>(blockIdx.x / T::kCtas), p.cta_groups};

  if (threadIdx.x == 0) InitBarriers<T>(p, shared);
  __syncthreads();
  if constexpr (T::kCtas > 1) ClusterSync();

  if (threadIdx.x >= T::kWarpGroups * 128) {
    RegistersDecrease<T::kProducerRegisters>();
    const int thread = static_cast<int>(threadIdx.x) - T::kWarpGroups * 128, warp = thread / 32;
    if (thread == 0) {
      LoadActivations<T>(p, shared, place);
    } else if (thread == 32 || (warp == 1 && ExpandsZeros<T>(p))) {
      if (T::kCanShareW && p.role == kPrimary) {
        LoadWeights<T, true>(p, shared, place, thread - 32);
      } else {
        LoadWeights<T, false>(p, shared, place, thread - 32);
      }
    } else if (warp >= 4 && ExpandsZeros<T>(p)) {
      if constexpr (T::kExpands) ExpandMetadata<T>(p, shared, place, thread - 128);
    }
    __syncwarp();
    if (T::kCanSplitInCluster && p.cluster_groups > 1 &&
        place.cta_group / p.cluster_groups < p.cluster_split_tiles) {
      ClusterSync();  // the consumers call both when they hand over their sums
      ClusterSync();
    }
  } else {
    RegistersIncrease<T::kConsumerRegisters>();
    if (p.role != kSecondary) GridWait();
    Consumer<T>(p, shared, place).Run();
  }
  __syncwarp();
  // A CTA may not leave while another still writes into its shared memory or arrives at its
  // barriers.
  if constexpr (T::kCtas > 1) ClusterSync();
  if (p.role == kSecondary) GridWait();  // so that waiting for this launch waits for both
}

}  // namespace slidejax::hopper
