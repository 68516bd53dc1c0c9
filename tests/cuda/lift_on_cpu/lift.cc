// The lift kernels on a CPU (cuda_runtime_api.h): the emulator, and the C function that
// tests/cuda/test_lift_emulated.py calls.
#include "lift/lift.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda_runtime_api.h"

namespace slidejax::lift {
alignas(16) char shared[emulated::kSharedBytes];
}  // namespace slidejax::lift

namespace emulated {

Thread* current = nullptr;
dim3 block_dim, grid_dim;
int multiprocessors = 132, shared_of_block = 232448, shared_of_multiprocessor = 233472;

namespace {

struct Copy {
  char* to;
  const char* from;  // nullptr: zeros
  int group;
};

struct Fibre : Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::function<bool()> ready = [] { return true; };
  uint32_t value = 0;        // for the other lanes of its warp
  std::vector<Copy> copies;  // that have not arrived
  int groups = 0;            // of copies, committed
};

constexpr size_t kStack = 64 << 10;
std::vector<Fibre> fibres;
ucontext_t scheduler;
bool lazy_copies;
std::mt19937 order;
std::vector<std::pair<uintptr_t, uintptr_t>> readable;
struct Meeting {
  int arrived = 0, turn = 0;
};
std::vector<Meeting> warps;
Meeting block_meeting;

[[noreturn]] void Fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s\n", what);
  std::abort();
}

Fibre& Self() { return *static_cast<Fibre*>(current); }

void Yield(std::function<bool()> ready) {
  Fibre& self = Self();
  self.ready = std::move(ready);
  swapcontext(&self.context, &scheduler);
}

// Waits until `threads` threads have arrived at this turn of a barrier.
void Barrier(Meeting& meeting, int threads) {
  const int mine = meeting.turn;
  if (++meeting.arrived == threads) meeting.arrived = 0, ++meeting.turn;
  Yield([&meeting, mine] { return meeting.turn != mine; });
}

void Finish(const Copy& copy) {
  if (copy.from == nullptr)
    std::memset(copy.to, 0, 16);
  else
    std::memcpy(copy.to, copy.from, 16);
}

const std::function<void()>* run_kernel;

void Enter() {
  (*run_kernel)();
  Fibre& self = Self();
  self.done = true;
  swapcontext(&self.context, &scheduler);
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

void CheckRead(const void* address, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  if (begin % bytes) Fail("a read is not aligned");
  for (const auto& [from, to] : readable) {
    if (from <= begin && begin + bytes <= to) return;
  }
  Fail("a read is out of bounds");
}

void CopyGranule(void* to, const void* from, bool wanted) {
  const char* const target = static_cast<char*>(to);
  if (target < slidejax::lift::shared || target + 16 > slidejax::lift::shared + shared_of_block)
    Fail("a copy leaves shared memory");
  if (reinterpret_cast<uintptr_t>(to) % 16) Fail("a copy's target is not aligned");
  if (wanted) CheckRead(from, 16);
  Fibre& self = Self();
  const Copy copy = {static_cast<char*>(to), wanted ? static_cast<const char*>(from) : nullptr,
                     self.groups};
  if (lazy_copies)
    self.copies.push_back(copy);
  else
    Finish(copy);
}
void CommitCopies() { ++Self().groups; }
void WaitForCopies(int pending) {
  Fibre& self = Self();
  std::vector<Copy> later;
  for (const Copy& copy : self.copies) {
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

cudaError_t Launch(const std::function<void()>& run, dim3 grid, dim3 block, size_t shared) {
  if (shared > static_cast<size_t>(shared_of_block) || block.x > 1024 || block.x % 32)
    return cudaErrorInvalidValue;
  run_kernel = &run, grid_dim = grid, block_dim = block;
  for (unsigned b = 0; b < grid.x; ++b) {
    std::memset(slidejax::lift::shared, 0xa5, sizeof(slidejax::lift::shared));
    const unsigned threads = block.x;
    fibres = std::vector<Fibre>(threads);
    warps.assign(threads / 32, {}), block_meeting = {};
    for (unsigned t = 0; t < threads; ++t) {
      Fibre& f = fibres[t];
      f.thread = dim3(t, 0, 0), f.block = dim3(b, 0, 0);
      f.stack = std::make_unique<char[]>(kStack);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = kStack,
      f.context.uc_link = &scheduler;
      makecontext(&f.context, Enter, 0);
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
        current = &f;
        swapcontext(&scheduler, &f.context);
        if (f.done) --left;
      }
      if (!moved) Fail("threads wait for each other");
    }
    for (size_t i = shared; i < sizeof(slidejax::lift::shared); ++i) {
      if (slidejax::lift::shared[i] != static_cast<char>(0xa5))
        Fail("a write beyond the block's shared memory");
    }
  }
  return cudaSuccess;
}

}  // namespace emulated

// One call of LiftQuantize on a device of `multiprocessors`; dtypes, prologue and activation by
// name. Returns the status, or -1 for an unknown name.
extern "C" int lift_quantize(const void* x, const char* x_type, const float* absmax, const void* up,
                             const float* weight, const float* bias, void* lifted,
                             const char* lifted_type, float* scale, int64_t rows, int64_t columns,
                             int64_t lifted_columns, int group, const char* prologue,
                             const char* activation, float eps, int multiprocessors,
                             int shared_of_block, int lazy, int seed) {
  using namespace slidejax;
  emulated::multiprocessors = multiprocessors, emulated::shared_of_block = shared_of_block;
  emulated::shared_of_multiprocessor = shared_of_block + 1024;
  emulated::lazy_copies = lazy != 0, emulated::order.seed(seed);
  const auto x_dtype = DTypeNamed(x_type), lifted_dtype = DTypeNamed(lifted_type);
  const auto kind = lift::PrologueOf(prologue);
  const auto function = lift::ActivationOf(activation);
  if (!x_dtype || !lifted_dtype || !kind || !function) return -1;

  emulated::readable.clear();
  const auto allow = [](const void* from, int64_t bytes) {  // whole granules, as allocations are
    const uintptr_t begin = reinterpret_cast<uintptr_t>(from);
    if (from != nullptr) emulated::readable.push_back({begin, (begin + bytes + 15) / 16 * 16});
  };
  const int64_t x_bytes = rows * columns * static_cast<int64_t>(Bytes(*x_dtype));
  allow(x, x_bytes), allow(up, x_bytes), allow(weight, 4 * columns), allow(bias, 4 * columns);

  lift::Args args = {};
  args.x = x, args.x_type = *x_dtype, args.absmax = absmax;
  args.lifted = lifted, args.lifted_type = *lifted_dtype, args.scale = scale;
  args.rows = rows, args.columns = columns, args.lifted_columns = lifted_columns;
  args.group = group, args.prologue = *kind, args.activation = *function;
  args.up = up, args.weight = weight, args.bias = bias, args.eps = eps;
  return LiftQuantize(args, nullptr);
}
