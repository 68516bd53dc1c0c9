#include "lift/geometry.h"

#include <algorithm>

namespace slidejax::lift {
namespace {

constexpr int kMaxRows = 3;           // of a block, in the ring at once
constexpr int kReservedBytes = 1024;  // of shared memory, which a block takes beside its own
constexpr int kFewWarps = 8;          // a block of at most this many is not halved
constexpr int64_t kManyRows = 16;     // rows that keep a multiprocessor busy all the time
constexpr int64_t kKilobyte = 1024;

// TilesOfWarp returns the most tiles of a row that one of `warps` warps has. EvenWarps returns the
// fewest warps that have no more tiles each.
int TilesOfWarp(const RowShape& s, int warps) { return (s.tiles + warps - 1) / warps; }
int EvenWarps(const RowShape& s, int warps) {
  return TilesOfWarp(s, TilesOfWarp(s, std::max(1, std::min(warps, s.tiles))));
}

// The launch with which a multiprocessor works best, if all of it fits. The numbers are measured
// (docs/journal/2026-11-24-lift.md). A multiprocessor needs enough bytes under way. Copies that are
// asked for further ahead only get in the way of the stores.
struct Wish {
  int blocks;
  int warps;      // of a block
  int rows;       // of a block that are in the ring at once, at most
  int64_t ahead;  // bytes of the rings of all blocks, at most
};

// Rows that arrive shifted, or that are gated or normed before they are converted: all warps work,
// and each block has a row.
Wish WishForComputedRows(const RowShape& s, int sources, int64_t ahead) {
  Wish wish = {1, 1, kMaxRows, ahead};
  wish.warps =
      EvenWarps(s, std::min(s.tiles > 7 * sources ? (s.tiles + 1) / 2 : s.tiles, kMaxWarps));
  wish.blocks = kMaxWarps / wish.warps;
  if (s.normed && s.x_aligned) wish.rows = 1;
  return wish;
}

// Many rows: one block where they are long, three where they are shorter, else as many blocks as
// hold 64 KB.
Wish WishForManyRows(const RowShape& s, int64_t row_bytes) {
  Wish wish = {1, 1, kMaxRows, 88 * kKilobyte};
  const bool fours = s.n % 4 == 0;  // N decides how a warp's chunks fall on its lanes
  if (row_bytes >= (fours ? 21 : 32) * kKilobyte) {
    const bool two_are_too_many = row_bytes <= wish.ahead && 2 * row_bytes > wish.ahead;
    wish.warps = EvenWarps(s, two_are_too_many ? kMaxWarps / 3 : kMaxWarps / 2);
    if (two_are_too_many) wish.ahead = 104 * kKilobyte;
  } else if (row_bytes >= (fours ? 16 : 20) * kKilobyte) {
    wish.blocks = 3;
    wish.warps = EvenWarps(s, (s.tiles + 1) / 2);
  } else {
    const int64_t blocks = (64 * kKilobyte + row_bytes / 2) / row_bytes;
    wish.blocks = static_cast<int>(std::min<int64_t>(blocks, kMaxWarps));
    wish.warps = EvenWarps(s, kMaxWarps / wish.blocks);
    wish.rows = 1;
  }
  return wish;
}

// Few rows: as many blocks as leave two rows to each. Four blocks hide each other's copies.
Wish WishForFewRows(const RowShape& s, int64_t row_bytes, int64_t shared) {
  Wish wish = {1, 1, kMaxRows, shared};
  while (wish.blocks < kMaxWarps && 4 * wish.blocks * row_bytes <= shared) wish.blocks *= 2;
  wish.warps = EvenWarps(s, kMaxWarps / wish.blocks);
  if (wish.blocks >= 4) wish.rows = 1;
  return wish;
}

Wish WishFor(const RowShape& s, int sources, int64_t row_bytes, const DeviceLimits& device) {
  const int64_t shared = device.shared_of_multiprocessor;
  const int64_t fewest_rows = s.rows / device.multiprocessors;
  Wish wish = s.normed || sources > 1 || !s.x_aligned ? WishForComputedRows(s, sources, shared)
              : fewest_rows >= kManyRows              ? WishForManyRows(s, row_bytes)
                                                      : WishForFewRows(s, row_bytes, shared);
  if (fewest_rows < wish.blocks) {
    const int64_t rows = std::max<int64_t>(1, fewest_rows);
    wish.warps = EvenWarps(s, static_cast<int>(kMaxWarps / rows));
  }
  return wish;
}

// Looks for the geometry nearest to a wish that fits.
class Fitting {
 public:
  Fitting(const RowShape& s, int sources, int in_bytes, int out_bytes, const DeviceLimits& device)
      : s_(s),
        device_(device),
        tile_bytes_(int64_t{sources} * SlotBytes(s, s.steps, in_bytes)),
        stage_bytes_(StageBytes(s, s.n, s.steps, out_bytes)),
        wish_(WishFor(s, sources, s.tiles * tile_bytes_, device)),
        blocks_(wish_.blocks),
        warps_(wish_.warps) {}

  RingGeometry Fit() {
    Deepen();
    // Fewer warps stage fewer tiles, which leaves more room for a long row.
    while (warps_ > 1 && !Fits(Bytes(warps_, depth_))) Halve();
    while (blocks_ == 1 && warps_ > kFewWarps && rows_ > 1 && depth_ == TilesOfWarp(s_, warps_) &&
           HalfFits()) {
      Halve();
    }
    const int64_t bytes = Bytes(warps_, depth_);
    if (bytes > device_.shared_of_block) return {0, 0, 0, 0};
    return {warps_, blocks_, depth_, static_cast<int>(bytes)};
  }

 private:
  int64_t Bytes(int warps, int depth) const {
    return kReductionBytes + warps * (depth * tile_bytes_ + stage_bytes_);
  }
  bool Fits(int64_t bytes) const {
    return bytes <= device_.shared_of_block &&
           blocks_ * (bytes + kReservedBytes) <= device_.shared_of_multiprocessor;
  }
  // Chooses the deepest ring that fits for these warps, on fewer blocks if need be.
  void Deepen() {
    const int own = TilesOfWarp(s_, warps_);
    while (!Fits(Bytes(warps_, own)) && blocks_ > 1) --blocks_;
    const int64_t side_by_side = int64_t{device_.multiprocessors} * blocks_;
    const int64_t waves = (s_.rows + side_by_side - 1) / side_by_side;
    rows_ = static_cast<int>(std::min<int64_t>(wish_.rows, waves));
    depth_ = std::min(rows_ * own, own + kMaxPending);
    while (depth_ > own && TooDeep(own)) --depth_;
  }
  bool TooDeep(int own) const {
    // Whether a ring of one tile less would leave nothing to ask for ahead.
    const bool nothing_ahead = blocks_ == 1 && depth_ <= own + 1;
    return !Fits(Bytes(warps_, depth_)) ||
           (!nothing_ahead && blocks_ * warps_ * depth_ * tile_bytes_ > wish_.ahead);
  }
  int Half() const { return EvenWarps(s_, warps_ / 2); }
  bool HalfFits() const { return Fits(Bytes(Half(), TilesOfWarp(s_, Half()))); }
  void Halve() {
    warps_ = Half();
    Deepen();
  }

  const RowShape& s_;
  const DeviceLimits& device_;
  const int64_t tile_bytes_, stage_bytes_;
  const Wish wish_;
  int blocks_, warps_;
  int rows_ = 0;  // of a block, in the ring at once
  int depth_ = 0;
};

}  // namespace

RingGeometry ChooseGeometry(const RowShape& shape, int sources, int in_bytes, int out_bytes,
                            const DeviceLimits& device) {
  return Fitting(shape, sources, in_bytes, out_bytes, device).Fit();
}

}  // namespace slidejax::lift
