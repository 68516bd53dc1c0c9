// The work of an attention kernel. docs/attention-kernel.md says why it is built so.
//
// A thread block has some query heads that share a key head of one row, and a part of that row's
// cache. Its warps take steps of a few keys in turn. A lane holds eight channels of a key and of
// the value beside it; each lane copies them into a ring of its own, and so waits for nobody. The
// new token is taken from shared memory by the warp in whose step it lies.
//
// Every warp keeps a running softmax. Partial results meet in shared memory, and those of a row's
// thread blocks in the cluster, or in a second kernel where there are no clusters.
#pragma once

#include "attention/elements.cuh"
#include "attention/params.h"

namespace slidejax::attention {

template <typename Cache, int kLanesOfKey, int kHeads>
class Attend {
 public:
  static constexpr Shape kShape{sizeof(Cache), kLanesOfKey, kHeads};
  static constexpr int kKeys = kShape.keys(), kPieces = kShape.pieces();
  static constexpr int kStepKeys = kShape.step_keys(), kDepth = kShape.depth();
  static constexpr int kKeyGroups = kLanes / kLanesOfKey;  // keys beside each other
  static constexpr int kScores = kKeys * kHeads;           // of a lane's keys
  // Scores of a lane after the lanes of a key have added up their parts, and how many lanes then
  // have the same ones.
  static constexpr int kOwn = kScores > kLanesOfKey ? kScores / kLanesOfKey : 1;
  static constexpr int kSame = kScores < kLanesOfKey ? kLanesOfKey / kScores : 1;
  static constexpr int kLanesOfHead = kLanesOfKey / kHeads;  // whose scores are of one head
  static_assert(kLanesOfKey % kHeads == 0 && kKeys % kOwn == 0, "own scores are of one head");
  static constexpr int kRow = kLanesOfKey * kChannels;  // channels of a head, with padding
  static constexpr int kChunks = kShape.head_chunks();
  static_assert(kChunks % kMaxSplits == 0, "thread blocks share the chunks of a head");

  __device__ Attend(const Params& p, uint8_t* shared)
      : p_(p),
        a_(p.a),
        warp_(threadIdx.x / kLanes),
        lane_(threadIdx.x % kLanes),
        of_key_(lane_ % kLanesOfKey),
        channel_(of_key_ * kChannels),
        split_(blockIdx.x),
        row_(blockIdx.z),
        kv_head_(blockIdx.y / p.chunks),
        shared_(shared) {
    const int group = a_.heads / a_.kv_heads, first = blockIdx.y % p.chunks * kHeads;
    heads_ = min(kHeads, group - first);
    head_ = kv_head_ * group + first;
    ring_ = shared + warp_ * kShape.ring_bytes() + lane_ * 16;
    fresh_ = reinterpret_cast<float*>(shared + p.warps * kShape.ring_bytes());
    of_warps_ = reinterpret_cast<Head*>(fresh_ + kShape.fresh_floats());
    sent_heads_ = of_warps_ + kMaxWarps * kHeads;
    sent_ = reinterpret_cast<float4*>(sent_heads_ + kMaxSplits * kHeads);
    begin_of_head_ = (int64_t{row_} * a_.kv_heads + kv_head_) * a_.length * a_.head_dim + channel_;
    keys_ = static_cast<const Cache*>(a_.keys) + begin_of_head_;
    values_ = static_cast<const Cache*>(a_.values) + begin_of_head_;
  }

  __device__ void Run() {
    if (p_.clustered) ClusterBegin();  // Finish waits
    const int position = __ldg(a_.positions + row_);
    Fresh fresh;
    int row = threadIdx.x / kLanesOfKey;
    AskForFresh(fresh, row);  // before the cache, behind which it would wait
    // Slots as many as the window are a ring. When it is full, the new token takes the slot of the
    // one that it no longer sees, and sees all slots.
    const bool is_full = a_.window == a_.length && position >= a_.length;
    own_ = is_full ? position % a_.length : position;
    cached_ = max(0, min(position, a_.length));
    end_ = position < a_.length ? position + 1 : a_.length;
    const int begin =
        a_.window > 0 && !is_full ? min(cached_, max(0, position - a_.window + 1)) : 0;
    // The warps of all splits take the steps in turn.
    const int warps = p_.splits * p_.warps, stride = warps * kStepKeys;
    int at = begin + (split_ * p_.warps + warp_) * kStepKeys, ask = at;
#pragma unroll 1
    for (int i = 0; i < kDepth - 1; ++i, ask += stride) Load(ask, i);

    // The new token lies in the step of one warp, which takes it from shared memory.
    const bool is_new = own_ >= 0 && own_ < a_.length;
    const int owner = (own_ - begin) / kStepKeys & (warps - 1);
    const bool is_mine = is_new && owner / p_.warps == split_;
    while (true) {  // one turn, unless the thread block is small
      PutFresh(fresh, row, is_mine ? own_ : -1);
      row += blockDim.x / kLanesOfKey;
      if (row >= heads_ + 2) break;
      AskForFresh(fresh, row);
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const auto* from = reinterpret_cast<const float4*>(fresh_ + h * kRow + channel_);
      const float4 low = from[0], high = from[1];
      query_[h][0] = low.x, query_[h][1] = low.y, query_[h][2] = low.z, query_[h][3] = low.w;
      query_[h][4] = high.x, query_[h][5] = high.y, query_[h][6] = high.z, query_[h][7] = high.w;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) out_[h][c] = 0;
    }
    greatest_ = kUnseen, total_ = 0;

    int slot = 0;
#pragma unroll 1
    for (; at < end_; at += stride, ask += stride) {
      WaitForCopies<kDepth - 2>();
      uint8_t* from = ring_ + slot * kShape.slot_bytes();
      if (is_mine && own_ >= at && own_ - at < kStepKeys) TakeFresh(from, own_ - at);
      Load(ask, slot == 0 ? kDepth - 1 : slot - 1);
      Step(end_ - at, from);
      slot = slot + 1 == kDepth ? 0 : slot + 1;
    }
    WaitForCopies<0>();
    Finish();
  }

 private:
  // ---- What is read -----------------------------------------------------------------------------

  // Asks for the lane's part of the keys and values from `first` on. Beyond the end there are
  // zeros.
  __device__ void Load(int first, int slot) const {
    if (first < end_) {
      const uint32_t to = SharedAddress(ring_) + slot * kShape.slot_bytes();
#pragma unroll
      for (int r = 0; r < kKeys; ++r) {
        const int key = first + r * kKeyGroups + lane_ / kLanesOfKey;
        const bool valid = key < cached_ && key != own_ && channel_ < a_.head_dim;
        // Nothing is read of an invalid one; its address must only exist.
        const int64_t from = valid ? int64_t{key} * a_.head_dim : -begin_of_head_;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const int place = (r * kPieces + i) * kLanes * 16;
          const int64_t piece = valid ? from + i * static_cast<int>(16 / sizeof(Cache)) : from;
          Copy16(to + place, keys_ + piece, valid);
          Copy16(to + place + kShape.slot_bytes() / 2, values_ + piece, valid);
        }
      }
    }
    CommitCopies();
  }

  // Eight channels of a query, of the new key or of the new value, as they lie in memory, and the
  // cosines and sines that turn them.
  struct Fresh {
    uint4 own[2], other[2];
    float4 cosines[2], sines[2];
  };

  // Asks for row number i of the fresh rows: the queries, the new key, the new value.
  __device__ void AskForFresh(Fresh& fresh, int i) const {
    if (i >= heads_ + 2 || channel_ >= a_.head_dim) return;
    const int half = a_.head_dim / 2;
    const bool is_query = i < heads_, second = channel_ >= half;
    const void* from = is_query ? a_.q : i > heads_ ? a_.v : a_.k;
    const int64_t at = is_query ? row_ * a_.q_stride + int64_t{head_ + i} * a_.head_dim
                                : row_ * a_.kv_stride + int64_t{kv_head_} * a_.head_dim;
    const int angle = second ? channel_ - half : channel_;
    const int64_t turn = int64_t{row_} * half + angle;
    const int size = a_.type == DType::kF32 ? 4 : 2, words = size / 2;  // of 16 bytes
    const auto* own = static_cast<const char*>(from) + (at + channel_) * size;
    const auto* other =
        static_cast<const char*>(from) + (at + (second ? angle : channel_ + half)) * size;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j < words) {
        fresh.own[j] = __ldg(reinterpret_cast<const uint4*>(own) + j);
        fresh.other[j] = __ldg(reinterpret_cast<const uint4*>(other) + j);
      }
      fresh.cosines[j] = __ldg(reinterpret_cast<const float4*>(a_.cosines + turn) + j);
      fresh.sines[j] = __ldg(reinterpret_cast<const float4*>(a_.sines + turn) + j);
    }
  }

  // Turns fresh row number i, and leaves it in shared memory. With a position the new
  // key and value also go to the cache. The heads of a key head may be in several thread blocks,
  // which then write the same.
  __device__ void PutFresh(const Fresh& fresh, int i, int position) const {
    if (i >= heads_ + 2) return;
    auto* to = reinterpret_cast<float4*>(fresh_ + i * kRow + channel_);
    if (channel_ >= a_.head_dim) {  // padding is multiplied, too: with zeros, which nan would spoil
      to[0] = to[1] = {0, 0, 0, 0};
      return;
    }
    const bool second = channel_ >= a_.head_dim / 2;
    float own[kChannels], other[kChannels];
    WithType(a_.type, [&](auto type) {
      Widen(type, reinterpret_cast<const uint32_t*>(fresh.own), own);
      Widen(type, reinterpret_cast<const uint32_t*>(fresh.other), other);
    });
    if (i <= heads_) {
      const float cosines[kChannels] = {fresh.cosines[0].x, fresh.cosines[0].y, fresh.cosines[0].z,
                                        fresh.cosines[0].w, fresh.cosines[1].x, fresh.cosines[1].y,
                                        fresh.cosines[1].z, fresh.cosines[1].w};
      const float sines[kChannels] = {fresh.sines[0].x, fresh.sines[0].y, fresh.sines[0].z,
                                      fresh.sines[0].w, fresh.sines[1].x, fresh.sines[1].y,
                                      fresh.sines[1].z, fresh.sines[1].w};
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        const float turned = own[c] * cosines[c] + (second ? other[c] : -other[c]) * sines[c];
        own[c] = Rounded(turned);
      }
    }
    if (i >= heads_ && position >= 0) {
      void* cache = i > heads_ ? a_.values : a_.keys;
      Store8<Cache>(cache, begin_of_head_ + int64_t{position} * a_.head_dim, own);
    }
    to[0] = {own[0], own[1], own[2], own[3]};
    to[1] = {own[4], own[5], own[6], own[7]};
  }

  // A number after rounding to the type of the queries.
  __device__ float Rounded(float x) const {
    return a_.type == DType::kBF16  ? Wide(Narrow(__nv_bfloat16{}, x))
           : a_.type == DType::kF16 ? Wide(Narrow(__half{}, x))
                                    : x;
  }

  // Puts the new key and value into their places in a slot, as key number `at` of a step.
  __device__ void TakeFresh(uint8_t* slot, int at) const {
    if (at % kKeyGroups != lane_ / kLanesOfKey || channel_ >= a_.head_dim) return;
    slot += at / kKeyGroups * kPieces * kLanes * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // the key, the value
      const float* from = fresh_ + (heads_ + i) * kRow + channel_;
      alignas(16) Cache narrow[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) narrow[c] = Narrow(Cache{}, from[c]);
#pragma unroll
      for (int j = 0; j < kPieces; ++j)
        *reinterpret_cast<uint4*>(slot + i * kShape.slot_bytes() / 2 + j * kLanes * 16) =
            reinterpret_cast<const uint4*>(narrow)[j];
    }
  }

  // ---- Steps ------------------------------------------------------------------------------------

  // Adds up the parts of the scores that the lanes of a key have. Score s = head * kKeys + key then
  // is number s % kOwn of the lanes from s / kOwn * kSame on.
  __device__ void AddUp(float (&scores)[kScores]) const {
    int count = kScores;
#pragma unroll
    for (int bit = kLanesOfKey / 2; bit > 0; bit /= 2) {
      if (count > 1) {
        count /= 2;
        const bool upper = lane_ & bit;
#pragma unroll
        for (int i = 0; i < kScores / 2; ++i) {
          if (i < count) {
            const float mine = upper ? scores[i + count] : scores[i];
            const float other = upper ? scores[i] : scores[i + count];
            scores[i] = mine + ShuffleXor(other, bit);
          }
        }
      } else {
        scores[0] += ShuffleXor(scores[0], bit);
      }
    }
  }

  // Takes the first `left` keys and values that lie at `from`.
  __device__ void Step(int left, const uint8_t* from) {
    float scores[kScores];
#pragma unroll
    for (int r = 0; r < kKeys; ++r) {
      float key[kChannels];
      Read(from + r * kPieces * kLanes * 16, key);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float sum = query_[h][0] * key[0];
#pragma unroll
        for (int c = 1; c < kChannels; ++c) sum += query_[h][c] * key[c];
        scores[h * kKeys + r] = sum;
      }
    }
    AddUp(scores);
    float greatest = kUnseen;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int r = (of_key_ / kSame * kOwn + i) % kKeys;
      const bool seen = r * kKeyGroups + lane_ / kLanesOfKey < left;
      scores[i] = seen ? scores[i] * (a_.scale * kLog2E) : kUnseen;
      greatest = fmaxf(greatest, scores[i]);
    }
    greatest = OverHead(greatest, [](float x, float y) { return fmaxf(x, y); });
    if (__reduce_max_sync(kAllLanes, greatest > greatest_ ? 1u : 0u)) Rescale(greatest);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      scores[i] = Exp2(scores[i] - greatest_);
      if (of_key_ % kSame == 0) total_ += scores[i];
    }
#pragma unroll
    for (int r = 0; r < kKeys; ++r) {
      float value[kChannels];
      Read(from + kShape.slot_bytes() / 2 + r * kPieces * kLanes * 16, value);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const int s = h * kKeys + r;
        const int lane = lane_ - of_key_ + s / kOwn * kSame;
        const float weight = Shuffle(scores[s % kOwn], lane);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) out_[h][c] += weight * value[c];
      }
    }
  }

  __device__ static void Read(const uint8_t* from, float (&to)[kChannels]) {
    uint4 words[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      words[i] = *reinterpret_cast<const uint4*>(from + i * kLanes * 16);
    Widen(Cache{}, reinterpret_cast<const uint32_t*>(words), to);
  }

  // Combines what the lanes with scores of the same head have.
  template <typename Combine>
  __device__ float OverHead(float x, const Combine& combine) const {
#pragma unroll
    for (int bit = 1; bit < kLanesOfHead; bit *= 2) x = combine(x, ShuffleXor(x, bit));
#pragma unroll
    for (int bit = kLanesOfKey; bit < kLanes; bit *= 2) x = combine(x, ShuffleXor(x, bit));
    return x;
  }

  __device__ void Rescale(float greatest) {
    const float now = fmaxf(greatest, greatest_), shrink = Exp2(greatest_ - now);
    greatest_ = now, total_ *= shrink;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float factor = Shuffle(shrink, h * kLanesOfHead);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) out_[h][c] *= factor;
    }
  }

  // ---- Results ----------------------------------------------------------------------------------

  // A chunk is four channels of a head. Thread t has chunk t % kChunks of head t / kChunks, and of
  // further heads if there are few threads.
  __device__ void Finish() {
    total_ = OverHead(total_, [](float x, float y) { return x + y; });
    __syncthreads();  // the rings are free
    float* sums = reinterpret_cast<float*>(shared_);
    if (lane_ < kLanesOfKey && of_key_ % kLanesOfHead == 0)
      of_warps_[warp_ * kHeads + of_key_ / kLanesOfHead] = {greatest_, total_};
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
#pragma unroll
        for (int bit = kLanesOfKey; bit < kLanes; bit *= 2)
          out_[h][c] += ShuffleXor(out_[h][c], bit);
      }
      if (lane_ < kLanesOfKey) {
        auto* to = reinterpret_cast<float4*>(sums + (warp_ * kHeads + h) * kRow + channel_);
        to[0] = {out_[h][0], out_[h][1], out_[h][2], out_[h][3]};
        to[1] = {out_[h][4], out_[h][5], out_[h][6], out_[h][7]};
      }
    }
    if (p_.clustered) ClusterWait();  // all thread blocks have begun
    __syncthreads();
    const int chunk = threadIdx.x % kChunks, log_splits = p_.log_splits;
#pragma unroll 1
    for (int h = threadIdx.x / kChunks; h < heads_; h += blockDim.x / kChunks) {
      Head all = {kUnseen, 0};
#pragma unroll 4
      for (int w = 0; w < p_.warps; ++w)
        all.greatest = fmaxf(all.greatest, of_warps_[w * kHeads + h].greatest);
      float4 sum = {0, 0, 0, 0};
#pragma unroll 4
      for (int w = 0; w < p_.warps; ++w) {
        const Head part = of_warps_[w * kHeads + h];
        const float factor = Exp2(part.greatest - all.greatest);
        all.total += factor * part.total;
        Add(sum, factor,
            *reinterpret_cast<const float4*>(sums + (w * kHeads + h) * kRow + chunk * 4));
      }
      if (log_splits == 0) {
        Write(h, chunk, all.total, sum);
      } else if (p_.clustered) {
        // Chunks go around the thread blocks of the cluster. Each must know all of a head.
        const int to = chunk & (p_.splits - 1);
        const int at = ((split_ * kHeads + h) * kChunks >> log_splits) + (chunk >> log_splits);
        StoreRemote(sent_ + at, to, sum);
        if (chunk < p_.splits) StoreRemote(sent_heads_ + split_ * kHeads + h, to, all);
      } else {
        const int64_t part = PartOf(split_, h);
        static_cast<float4*>(a_.workspace)[part * (kChunks + 1) + chunk] = sum;
        if (chunk == 0)
          static_cast<float4*>(a_.workspace)[part * (kChunks + 1) + kChunks] = {all.greatest,
                                                                                all.total, 0, 0};
      }
    }
    if (!p_.clustered) return;
    ClusterArrive();
    ClusterWait();
    const int share = kChunks >> log_splits;
    AddSplits(
        share, split_, [&](int split, int h) { return sent_heads_[split * kHeads + h]; },
        [&](int split, int h, int i) { return sent_[(split * kHeads + h) * share + i]; });
  }

  // Adds up the parts of the row's thread blocks, each of which a lane has, and writes chunks
  // first, first + splits and so on of every head, `count` of them.
  template <typename HeadOf, typename ChunkOf>
  __device__ void AddSplits(int count, int first, const HeadOf& head_of,
                            const ChunkOf& chunk_of) const {
    const int log_splits = p_.log_splits, split = threadIdx.x & (p_.splits - 1);
    const int here = blockDim.x >> log_splits;  // chunks that are added up at a time
#pragma unroll 1
    for (int begin = 0; begin < count * kHeads; begin += here) {
      const int i = begin + (threadIdx.x >> log_splits);
      const int h = (i << log_splits) / kChunks, chunk = i & (count - 1);
      const bool valid = h < heads_;
      const Head part = valid ? head_of(split, h) : Head{kUnseen, 0};
      float4 sum = valid ? chunk_of(split, h, chunk) : float4{0, 0, 0, 0};
      float greatest = part.greatest;
#pragma unroll
      for (int bit = 1; bit < kMaxSplits; bit *= 2)
        if (bit < p_.splits) greatest = fmaxf(greatest, ShuffleXor(greatest, bit));
      const float factor = Exp2(part.greatest - greatest);
      float total = factor * part.total;
      sum.x *= factor, sum.y *= factor, sum.z *= factor, sum.w *= factor;
#pragma unroll
      for (int bit = 1; bit < kMaxSplits; bit *= 2) {
        if (bit >= p_.splits) break;
        total += ShuffleXor(total, bit);
        sum.x += ShuffleXor(sum.x, bit), sum.y += ShuffleXor(sum.y, bit);
        sum.z += ShuffleXor(sum.z, bit), sum.w += ShuffleXor(sum.w, bit);
      }
      if (valid && split == 0) Write(h, (chunk << log_splits) + first, total, sum);
    }
  }

  __device__ static void Add(float4& sum, float factor, const float4& part) {
    sum.x += factor * part.x, sum.y += factor * part.y;
    sum.z += factor * part.z, sum.w += factor * part.w;
  }

  // Writes a chunk of a head, whose weights sum up to `total`.
  __device__ void Write(int h, int chunk, float total, const float4& sum) const {
    if (chunk * 4 >= a_.head_dim) return;
    const float factor = total == 0 ? 0 : 1 / total;  // a row without a token sees nothing
    const int64_t to = (int64_t{row_} * a_.heads + head_ + h) * a_.head_dim + chunk * 4;
    WithType(a_.type, [&](auto type) {
      auto* y = static_cast<decltype(type)*>(a_.y) + to;
      y[0] = Narrow(type, sum.x * factor), y[1] = Narrow(type, sum.y * factor);
      y[2] = Narrow(type, sum.z * factor), y[3] = Narrow(type, sum.w * factor);
    });
  }

  // The number of a part of the workspace: kChunks chunks of a head, and one for the head.
  __device__ int64_t PartOf(int split, int h) const {
    const int64_t block = (int64_t{row_} * gridDim.y + blockIdx.y) * p_.splits + split;
    return block * kHeads + h;
  }

 public:
  // Adds up the parts in the workspace: the second kernel.
  __device__ void Combine() const {
    const auto* from = static_cast<const float4*>(a_.workspace);
    for (int first = 0; first < p_.splits; ++first)
      AddSplits(
          kChunks >> p_.log_splits, first,
          [&](int split, int h) {
            const float4 head = __ldg(from + PartOf(split, h) * (kChunks + 1) + kChunks);
            return Head{head.x, head.y};
          },
          [&](int split, int h, int i) {
            return __ldg(from + PartOf(split, h) * (kChunks + 1) + (i << p_.log_splits) + first);
          });
  }

 private:
  const Params& p_;
  const AttentionArgs& a_;
  const int warp_, lane_;
  const int of_key_;   // place of the lane among those of a key
  const int channel_;  // the first of the lane
  const int split_, row_, kv_head_;
  int heads_, head_;  // of the thread block, and the first of them
  uint8_t* shared_;
  uint8_t* ring_;     // of the lane
  float* fresh_;      // the turned queries, the new key and value
  Head* of_warps_;    // [warp][head]
  Head* sent_heads_;  // [split][head], by the thread blocks of the cluster
  float4* sent_;      // [split][head], and this thread block's share of chunks
  int64_t begin_of_head_;
  const Cache* keys_;
  const Cache* values_;
  int own_;           // the new token's slot
  int cached_, end_;  // of the tokens that the row sees: those in the cache, and all
  float query_[kHeads][kChannels];
  float greatest_;  // score of the head that the lane has scores of, in powers of two
  float total_;     // of that head's weights, of this lane
  float out_[kHeads][kChannels];
};

}  // namespace slidejax::attention
