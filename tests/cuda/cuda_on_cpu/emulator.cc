// The emulator that cuda_runtime_api.h declares.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime_api.h"
#include "jump.h"

namespace emulated {

Thread* current = nullptr;
dim3 block_dim, grid_dim;
bool early = false;
int multiprocessors = 132, shared_of_block = 232448, shared_of_multiprocessor = 233472;

[[noreturn]] void Fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s\n", what);
  std::abort();
}

namespace {

struct PendingCopy {
  char* to;
  const char* from;  // nullptr: zeros
  int group, bytes;
};

struct Fibre : Thread {
  jump::Place place;
  bool done = false;
  bool waited = false;  // for the kernel ahead
  std::function<bool()> ready = [] { return true; };
  uint32_t value = 0;  // for the other lanes of its warp
  Words words;         // for them too
  const int* polled = nullptr;
  int seen = 0;                     // what it polled last
  std::vector<PendingCopy> copies;  // that have not arrived
  int groups = 0;                   // of copies, committed
};

constexpr size_t kStack = 64 << 10;
std::vector<Fibre> fibres;
std::vector<std::unique_ptr<char[]>> stacks;  // of the fibres of a block, and then of the next one
jmp_buf scheduler;
bool lazy_copies;
std::mt19937 order;
std::vector<std::pair<uintptr_t, uintptr_t>> readable, made;
struct Meeting {
  int arrived = 0, turn = 0;
};
std::vector<Meeting> warps;
Meeting block_meeting;

Fibre& Self() { return *static_cast<Fibre*>(current); }

void Resume(Fibre& fibre) {
  current = &fibre;
  fibre.place.Resume(scheduler);
}

void Yield(std::function<bool()> ready) {
  Fibre& self = Self();
  self.ready = std::move(ready);
  jump::Switch(self.place.context, scheduler);
}

// Waits until `threads` threads have arrived at this turn of a barrier.
void Barrier(Meeting& meeting, int threads) {
  const int mine = meeting.turn;
  if (++meeting.arrived == threads) meeting.arrived = 0, ++meeting.turn;
  Yield([&meeting, mine] { return meeting.turn != mine; });
}

void Finish(const PendingCopy& copy) {
  if (copy.from == nullptr)
    std::memset(copy.to, 0, copy.bytes);
  else
    std::memcpy(copy.to, copy.from, copy.bytes);
}

const std::function<void()>* run_kernel;

void Enter() {
  (*run_kernel)();
  Self().done = true;
  _longjmp(scheduler, 1);
}

}  // namespace

void SyncWarp() { Barrier(warps[current->thread.x / 32], 32); }
void SyncThreads() { Barrier(block_meeting, static_cast<int>(fibres.size())); }

uint32_t Exchange(uint32_t value, int from) {
  Self().value = value;
  SyncWarp();
  const uint32_t result = fibres[current->thread.x / 32 * 32 + from].value;
  SyncWarp();
  return result;
}
uint32_t ReduceMax(uint32_t value) {
  Self().value = value;
  SyncWarp();
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane)
    result = std::max(result, fibres[current->thread.x / 32 * 32 + lane].value);
  SyncWarp();
  return result;
}

Words WordsOf(int lane) { return fibres[current->thread.x / 32 * 32 + lane].words; }
void Publish(const Words& words) {
  Self().words = words;
  SyncWarp();
}

int Poll(const int* p) {
  Fibre& self = Self();
  if (self.polled == p && self.seen == *p) {
    const int seen = *p;
    Yield([p, seen] { return *p != seen; });
  }
  self.polled = p;
  return self.seen = *p;
}

void Begin(bool lazy, int seed) {
  lazy_copies = lazy, order.seed(seed);
  readable.clear(), made.clear();
}
void Allow(const void* from, int64_t bytes) {  // whole granules, as allocations are
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from);
  if (from != nullptr) readable.push_back({begin, (begin + bytes + 15) / 16 * 16});
}

void Make(const void* from, int64_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from);
  if (from != nullptr) made.push_back({begin, begin + bytes});
}
void WaitForGrid() { Self().waited = true; }
void ReleaseGrid() {
  if (early && !Self().waited) Fail("a kernel lets the next one begin before it has waited");
}

int Device() {
  static std::vector<std::pair<int, int>> seen;
  const std::pair<int, int> mine = {multiprocessors, shared_of_block};
  const auto at = std::find(seen.begin(), seen.end(), mine);
  if (at != seen.end()) return static_cast<int>(at - seen.begin());
  seen.push_back(mine);
  return static_cast<int>(seen.size()) - 1;
}

void CheckRead(const void* address, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  if (begin % bytes) Fail("a read is not aligned");
  if (early && !Self().waited) {
    for (const auto& [from, to] : made)
      if (begin < to && from < begin + bytes) Fail("a read of what may not be written yet");
  }
  for (const auto& [from, to] : readable) {
    if (from <= begin && begin + bytes <= to) return;
  }
  Fail("a read is out of bounds");
}

void Copy(void* to, const void* from, bool wanted, int bytes) {
  const char* const target = static_cast<char*>(to);
  if (target < shared_memory || target + bytes > shared_memory + shared_of_block)
    Fail("a copy leaves shared memory");
  if (reinterpret_cast<uintptr_t>(to) % bytes) Fail("a copy's target is not aligned");
  if (wanted) CheckRead(from, bytes);
  Fibre& self = Self();
  const PendingCopy copy = {static_cast<char*>(to),
                            wanted ? static_cast<const char*>(from) : nullptr, self.groups, bytes};
  if (lazy_copies)
    self.copies.push_back(copy);
  else
    Finish(copy);
}
void CommitCopies() { ++Self().groups; }
void WaitForCopies(int pending) {
  Fibre& self = Self();
  std::vector<PendingCopy> later;
  for (const PendingCopy& copy : self.copies) {
    if (copy.group < self.groups - pending)
      Finish(copy);
    else
      later.push_back(copy);
  }
  self.copies = std::move(later);
}

// Whether a thread of this warp can go on.
bool Ready(unsigned warp) {
  return std::any_of(fibres.begin() + 32 * warp, fibres.begin() + 32 * (warp + 1),
                     [](const Fibre& f) { return !f.done && f.ready(); });
}

// What memory holds that nothing was written to: nan in every dtype of floats.
constexpr int kGarbage = 0xff;

cudaError_t Launch(const std::function<void()>& run, dim3 grid, dim3 block, size_t shared) {
  if (shared > static_cast<size_t>(shared_of_block) || block.x > 1024 || block.x % 32)
    return cudaErrorInvalidValue;
  run_kernel = &run, grid_dim = grid, block_dim = block;
  std::memset(shared_memory, kGarbage, kSharedBytes);
  char* const beyond = shared_memory + shared;
  for (unsigned b = 0; b < grid.x * grid.y * grid.z; ++b) {
    std::memset(shared_memory, kGarbage, shared);
    const unsigned threads = block.x;
    fibres = std::vector<Fibre>(threads);
    warps.assign(threads / 32, {}), block_meeting = {};
    for (unsigned t = 0; t < threads; ++t) {
      Fibre& f = fibres[t];
      f.thread = dim3(t, 0, 0),
      f.block = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
      if (t == stacks.size()) stacks.emplace_back(new char[kStack]);
      f.place.BeginIn(Enter, stacks[t].get(), kStack);
    }
    std::vector<unsigned> turn(threads);
    for (unsigned t = 0; t < threads; ++t) turn[t] = t;
    // Half of the orders are fair. In the others one warp runs as far as it can, then another.
    const bool greedy = order() % 2;
    unsigned favoured = 0;
    for (size_t left = threads; left > 0;) {
      std::shuffle(turn.begin(), turn.end(), order);
      bool moved = false;
      for (const unsigned t : turn) {
        Fibre& f = fibres[t];
        if (greedy && moved && t / 32 != favoured) continue;
        if (f.done || !f.ready()) continue;
        if (greedy && !moved && t / 32 != favoured && Ready(favoured)) continue;
        favoured = t / 32;
        moved = true;
        Resume(f);
        if (f.done) --left;
      }
      if (!moved) Fail("threads wait for each other");
    }
    // All of it is garbage if its first byte is, and each equals the next one.
    const size_t rest = kSharedBytes - shared;
    if (rest > 0 && (beyond[0] != static_cast<char>(kGarbage) ||
                     std::memcmp(beyond, beyond + 1, rest - 1) != 0))
      Fail("a write beyond the block's shared memory");
  }
  return cudaSuccess;
}

}  // namespace emulated
