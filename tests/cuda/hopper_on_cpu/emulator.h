// Runs CUDA kernels on the CPU. Every thread is a fiber. Hopper's asynchronous work (bulk copies,
// wgmma) happens at random later moments, as late as the kernel's own waits allow. So a missing
// wait, fence or barrier shows as a wrong result, and a wait for something that never comes shows
// as a message instead of a hang.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static  // SharedOffset gives each variable an address in every block
#include <cstdint>
#include <cstring>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <vector>

#include "../cuda_on_cpu/jump.h"

namespace emulator {

// An mbarrier.
struct Barrier {
  int count = 0, pending = 0, bytes = 0;
  uint32_t phase = 0;
  void Settle() {
    if (pending != 0 || bytes != 0) return;
    ++phase;
    pending = count;
  }
};

// A barrier of a fixed number of threads: of a warp, a block, a cluster, or named.
struct Rendezvous {
  int arrived = 0;
  uint64_t generation = 0;
  void Arrive(int of) {
    if (++arrived < of) return;
    arrived = 0;
    ++generation;
  }
};

struct Warp {
  Rendezvous meeting;
  int values[32];
  uint32_t registers[32][4], addresses[32];
};

// One wgmma. It runs at some moment after all 128 threads of the warp group have issued it.
struct Instruction {
  int issued = 0, tokens = 0, add = 0;
  bool sparse = true;  // if not: 32 columns and no metadata
  uint64_t a = 0, b = 0;
  bool fp8 = false;
  uint32_t metadata[128];
  uint32_t* sums[128];
};
struct WarpGroup {
  std::vector<std::unique_ptr<Instruction>> queue;
  size_t done = 0;
};

struct Block {
  std::vector<uint8_t> shared;
  // Maps an address to the thread that wrote 16 bytes there. No bulk copy may read them before that
  // thread's next fence.
  std::map<uint32_t, int> unfenced;
  std::map<uint32_t, Barrier> barriers;
  Rendezvous named[16], all;
  std::vector<Warp> warps;
  std::vector<WarpGroup> groups;
  struct Cluster* cluster = nullptr;
  uint32_t rank = 0, index = 0;
  bool begun = false;  // one of its threads has run
};
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Rendezvous all;
  int threads = 0;
};

// Accumulators that instructions still write. The kernel's own variables hold garbage meanwhile.
struct Shadow {
  uint32_t* variable;
  std::vector<uint32_t> values;
  size_t last;  // index of the last instruction
};

struct Fiber {
  jump::Place place;
  std::unique_ptr<char[]> stack;
  Block* block = nullptr;
  int thread = 0;
  bool finished = false;
  std::function<bool()> waits_for;
  const char* what = "";
  std::list<Shadow> shadows;
  size_t instructions = 0;                    // that it has issued
  std::vector<size_t> groups;                 // the number of instructions at each commit
  std::vector<std::function<void()>> copies;  // cp.async that have not happened
  // Bulk stores, in order: whether the source has been read.
  std::vector<std::shared_ptr<bool>> stores;
  Warp& CurrentWarp() { return block->warps[thread / 32]; }
};

Fiber& Current();
void WaitUntil(const char* what, std::function<bool()> ready);
void Later(std::function<void()> job);  // runs it at some later moment, in any order
[[noreturn]] void Fail(const char* what);
uint32_t SharedOffset(const void* variable);  // nullptr: the dynamic shared memory
uint8_t* SharedBytes(Block& block, uint32_t address, size_t size);
Block& BlockOfCluster(uint32_t rank);
extern bool lift_has_ended;  // the lift is the kernel that this one was launched to follow

// The contents of a CUtensorMap here.
struct Tensor {
  uint8_t* base;
  int rank, element, swizzle;  // swizzle: 0, 1, 2, 3 bits
  uint64_t size[3], stride[3];
  uint32_t box[3];
};
static_assert(sizeof(Tensor) <= sizeof(CUtensorMap));
void CopyBox(const Tensor& map, const int (&at)[3], uint8_t* shared, uint32_t address, bool store);
void RunInstruction(Block& block, Instruction& instruction);

}  // namespace emulator
