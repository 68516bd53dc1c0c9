// The kernel is compiled quickly, without this, and what runs most of the time is here.
#pragma GCC optimize("O3")
#include "emulator.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>

#include "hopper/scheduler.cuh"

uint3 threadIdx, blockIdx;
dim3 gridDim;
namespace emulator {
namespace {

jmp_buf scheduler;
Fiber* running = nullptr;
std::vector<std::function<void()>> jobs;
std::mt19937 random_bits(1);
int multiprocessors = 8;
int resident = 8;  // multiprocessors that are free
int chance = 50;   // percent, that an event which could happen next does
std::function<void()> body;
bool failed = false;
unsigned grid_y = 0;
struct Copy {
  void* to;
  std::vector<uint8_t> bytes;
};
std::vector<Copy> lift;  // the writes of the kernel before the next launch

bool Maybe() { return static_cast<int>(random_bits() % 100) < chance; }

void Enter() {
  body();
  for (const auto& read : running->stores)
    if (!*read) Fail("a thread leaves while a bulk copy still reads from shared memory");
  running->finished = true;
  _longjmp(scheduler, 1);
}

void Resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = {static_cast<unsigned>(fiber.thread), 0, 0};
  fiber.place.Resume(scheduler);
}

float FromE4m3(uint8_t v) {
  const int exponent = v >> 3 & 15, mantissa = v & 7;
  const float magnitude =
      exponent ? std::ldexp(1.0f + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6);
  return v & 0x80 ? -magnitude : magnitude;
}

uint32_t Swizzled(uint32_t address, int bits) {
  return address ^ ((address >> 7 & ((1u << bits) - 1)) << 4);
}

// Runs a grid with a fiber for each thread, `resident` clusters of it at a time.
void Run(int blocks, int threads, int cluster_size, int resident) {
  struct Running {
    std::unique_ptr<Cluster> cluster;
    std::vector<std::unique_ptr<Fiber>> fibers;
    size_t left;
  };
  std::list<Running> running_clusters;
  int begun = 0, still = 0;
  while (!failed) {
    while (begun < blocks && static_cast<int>(running_clusters.size()) < resident) {
      auto& one = running_clusters.emplace_back(std::make_unique<Cluster>());
      one.cluster->threads = threads * cluster_size;
      for (int rank = 0; rank < cluster_size; ++rank, ++begun) {
        auto block = std::make_unique<Block>();
        block->shared.assign(228 * 1024, 0xFF);  // nan in every dtype of floats
        block->warps.resize(threads / 32);
        block->groups.resize((threads + 127) / 128);
        block->cluster = one.cluster.get();
        block->rank = rank;
        block->index = begun;
        for (int t = 0; t < threads; ++t) {
          auto fiber = std::make_unique<Fiber>();
          constexpr size_t kStack = 48 * 1024;
          fiber->stack = std::unique_ptr<char[]>(new char[kStack]);
          fiber->block = block.get();
          fiber->thread = t;
          fiber->place.BeginIn(Enter, fiber->stack.get(), kStack);
          one.fibers.push_back(std::move(fiber));
        }
        one.cluster->blocks.push_back(std::move(block));
      }
      one.left = one.fibers.size();
    }
    if (running_clusters.empty()) break;
    bool moved = false;
    for (auto& one : running_clusters) {
      // A warp runs at a time. Some warps do not run in this round.
      for (size_t w = 0; w < one.fibers.size(); w += 32) {
        if (!Maybe()) continue;
        for (size_t i = w; i < std::min(w + 32, one.fibers.size()); ++i) {
          Fiber& fiber = *one.fibers[i];
          if (fiber.finished || (fiber.waits_for && !fiber.waits_for())) continue;
          fiber.waits_for = nullptr;
          blockIdx = {fiber.block->index, grid_y, 0};
          fiber.block->begun = true;
          Resume(fiber);
          one.left -= fiber.finished;
          moved = true;
        }
      }
      for (auto& block : one.cluster->blocks)
        for (auto& group : block->groups)
          while (group.done < group.queue.size() && group.queue[group.done]->issued == 128 &&
                 Maybe()) {
            RunInstruction(*block, *group.queue[group.done]);
            group.queue[group.done++].reset();
            moved = true;
          }
    }
    std::shuffle(jobs.begin(), jobs.end(), random_bits);
    size_t count = 0;
    while (count < jobs.size() && Maybe()) ++count;
    for (size_t i = 0; i < count; ++i) jobs[i]();
    jobs.erase(jobs.begin(), jobs.begin() + static_cast<std::ptrdiff_t>(count));
    if (moved || count > 0) {
      still = 0;
    } else if (++still > 2000) {
      std::map<std::string, int> where;
      for (auto& one : running_clusters)
        for (auto& fiber : one.fibers)
          if (!fiber->finished) ++where[fiber->what];
      for (auto& [what, n] : where)
        std::fprintf(stderr, "emulator: %d threads wait for %s\n", n, what.c_str());
      failed = true;
    }
    // A block's shared memory ends with the block. A job that would still write there is an error
    // of the kernel.
    if (jobs.empty()) running_clusters.remove_if([](const Running& one) { return one.left == 0; });
  }
  jobs.clear();
}

}  // namespace

bool lift_has_ended = true;
Fiber& Current() { return *running; }
void Fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %d)\n", what, running->block->index,
               running->thread);
  std::abort();
}
void WaitUntil(const char* what, std::function<bool()> ready) {
  Fiber& fiber = *running;
  fiber.what = what;
  fiber.waits_for = std::move(ready);
  jump::Switch(fiber.place.context, scheduler);
}
void Later(std::function<void()> job) { jobs.push_back(std::move(job)); }
uint32_t SharedOffset(const void* variable) {
  if (variable == nullptr) return 0x400;  // dynamic shared memory begins here
  // Of the variables of all kernels, each of up to 256 bytes.
  static std::map<const void*, uint32_t> offsets;
  const auto [found, fresh] =
      offsets.try_emplace(variable, 0x400 + 256 * static_cast<uint32_t>(offsets.size() % 16));
  return found->second;
}
uint8_t* SharedBytes(Block& block, uint32_t address, size_t size) {
  if (address % std::min<size_t>(size, 16) || address < 0x400 ||
      address + size > block.shared.size())
    Fail("a bad address in shared memory");
  // The barriers are kept beside the memory, which on a GPU they are part of.
  const auto barrier = block.barriers.lower_bound(address - 7);
  if (barrier != block.barriers.end() && barrier->first < address + size)
    Fail("these bytes of shared memory are a barrier");
  return block.shared.data() + address;
}
Block& BlockOfCluster(uint32_t rank) { return *running->block->cluster->blocks.at(rank); }

void CopyBox(const Tensor& map, const int (&at)[3], uint8_t* shared, uint32_t address, bool store) {
  const int depth = map.rank > 2 ? map.box[2] : 1, rows = map.box[1],
            row_bytes = map.box[0] * map.element;
  for (int z = 0; z < depth; ++z)
    for (int y = 0; y < rows; ++y)
      for (int x = 0; x < row_bytes; x += map.element) {
        uint8_t* here = shared + Swizzled(address + (z * rows + y) * row_bytes + x, map.swizzle);
        const int64_t column = at[0] + x / map.element, row = at[1] + y, plane = at[2] + z;
        const bool inside =
            column >= 0 && row >= 0 && column < static_cast<int64_t>(map.size[0]) &&
            row < static_cast<int64_t>(map.size[1]) &&
            (map.rank < 3 || (plane >= 0 && plane < static_cast<int64_t>(map.size[2])));
        uint8_t* there = map.base + column * map.element + row * map.stride[0] +
                         (map.rank > 2 ? plane * map.stride[1] : 0);
        if (store) {
          if (inside) std::memcpy(there, here, map.element);
        } else if (inside) {
          std::memcpy(here, there, map.element);
        } else {
          std::memset(here, 0, map.element);
        }
      }
}

// A is the type of the accumulators. A sum of 64 products of int8 codes is exact in float32.
template <class A>
void Multiply(Block& block, Instruction& i) {
  static const auto table = [] {
    std::vector<float> t(256);
    for (int v = 0; v < 256; ++v)
      t[v] = std::is_same_v<A, float> ? FromE4m3(v) : static_cast<int8_t>(v);
    return t;
  }();
  auto value = [](uint8_t v) { return table[v]; };
  auto operand = [&](uint64_t descriptor, int row, int byte) {
    const uint32_t span = descriptor >> 32;
    return block.shared[Swizzled(static_cast<uint32_t>(descriptor) + row * span + byte,
                                 span == 128 ? 3 : 2)];
  };
  const int columns = i.sparse ? 64 : 32;
  const int tokens = i.tokens;
  std::vector<float> b(static_cast<size_t>(tokens) * columns), sums(tokens);
  for (int n = 0; n < tokens; ++n)
    for (int k = 0; k < columns; ++k) b[k * tokens + n] = value(operand(i.b, n, k));
  for (int r = 0; r < 64; ++r) {
    float a[64] = {};
    for (int k = 0; !i.sparse && k < columns; ++k) a[k] = value(operand(i.a, r, k));
    for (int chunk = 0; i.sparse && chunk < 16; ++chunk) {
      const int holder = 32 * (r / 16) + (r % 8) * 4 + chunk / 8 * 2 + r % 16 / 8;
      const uint32_t nibble = i.metadata[holder] >> (4 * (chunk % 8)) & 15;
      a[chunk * 4 + (nibble & 3)] += value(operand(i.a, r, 2 * chunk));
      a[chunk * 4 + (nibble >> 2)] += value(operand(i.a, r, 2 * chunk + 1));
    }
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int k = 0; k < columns; ++k)
      for (int n = 0; n < tokens; ++n) sums[n] += a[k] * b[k * tokens + n];
    for (int n = 0; n < tokens; ++n) {
      const int thread = 32 * (r / 16) + (r % 8) * 4 + n % 8 / 2,
                at = n / 8 * 4 + r % 16 / 8 * 2 + n % 2;
      const auto sum = static_cast<A>(sums[n]);
      A& d = reinterpret_cast<A&>(i.sums[thread][at]);
      d = i.add ? d + sum : sum;
    }
  }
}
void RunInstruction(Block& block, Instruction& i) {
  i.fp8 ? Multiply<float>(block, i) : Multiply<int>(block, i);
}

}  // namespace emulator

// ---- The functions of the CUDA runtime that hopper/launch.cu calls

extern "C" {

void emulator_configure(int multiprocessors, int resident, int chance, int seed) {
  emulator::multiprocessors = multiprocessors;
  emulator::resident = resident;
  emulator::chance = chance;
  emulator::random_bits.seed(seed);
  emulator::failed = false;
}

// The kernel before the next launch writes these bytes. It may still run when the next one begins,
// if the next one is launched to begin early.
void emulator_lift(void* to, const void* from, size_t bytes) {
  const auto* begin = static_cast<const uint8_t*>(from);
  emulator::lift.push_back({to, {begin, begin + bytes}});
}

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : emulator::multiprocessors;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*,
                                           const cudaLaunchConfig_t* config) {
  const int size = config->attrs[0].val.clusterDim.x;  // larger clusters do not fill the device
  *count = emulator::multiprocessors / size - (size > 2);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

static CUresult Encode(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* base,
                       const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                       const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  auto& map = reinterpret_cast<emulator::Tensor&>(*to);
  map = {};
  map.base = static_cast<uint8_t*>(base);
  map.rank = static_cast<int>(rank);
  map.element = type == CU_TENSOR_MAP_DATA_TYPE_UINT8    ? 1
                : type == CU_TENSOR_MAP_DATA_TYPE_UINT16 ? 2
                                                         : 4;
  map.swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 3
                : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 2
                                                       : swizzle == CU_TENSOR_MAP_SWIZZLE_32B;
  for (cuuint32_t i = 0; i < rank; ++i) {
    map.size[i] = size[i], map.box[i] = box[i];
    if (box[i] < 1 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    if (i + 1 < rank) {
      map.stride[i] = stride[i];
      if (stride[i] % 16) return CUDA_ERROR_INVALID_VALUE;
    }
  }
  if (reinterpret_cast<uintptr_t>(base) % 16 || map.box[0] * map.element % 16)
    return CUDA_ERROR_INVALID_VALUE;
  if (map.swizzle && map.box[0] * map.element > 16u << map.swizzle) return CUDA_ERROR_INVALID_VALUE;
  return CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *entry = reinterpret_cast<void*>(Encode);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
  const auto& params = *static_cast<slidejax::hopper::Params*>(arguments[0]);
  gridDim = config->gridDim;
  emulator::body = [=] { reinterpret_cast<void (*)(slidejax::hopper::Params)>(kernel)(params); };
  const int cluster_size = config->attrs[0].val.clusterDim.x;
  if (config->gridDim.x % cluster_size) return cudaErrorInvalidValue;
  auto end_lift = [] {
    for (auto& copy : std::exchange(emulator::lift, {}))
      std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
    emulator::lift_has_ended = true;
  };
  if (config->numAttrs > 1 &&
      config->attrs[1].id == cudaLaunchAttributeProgrammaticStreamSerialization) {
    emulator::lift_has_ended = false;
    emulator::Later(end_lift);
  } else {
    end_lift();
  }
  emulator::Run(config->gridDim.x, config->blockDim.x, cluster_size,
                std::max(1, emulator::resident / cluster_size));
  return emulator::failed ? cudaErrorLaunchTimeout : cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** a, size_t,
                             cudaStream_t) {
  using Expand = void (*)(const uint8_t*, uint8_t*, int, int, int, int);
  auto number = [&](int i) { return *static_cast<int*>(a[i]); };
  gridDim = grid;
  for (unsigned y = 0; y < grid.y; ++y) {
    emulator::grid_y = y;
    emulator::body = [=] {
      reinterpret_cast<Expand>(kernel)(*static_cast<const uint8_t**>(a[0]),
                                       *static_cast<uint8_t**>(a[1]), number(2), number(3),
                                       number(4), number(5));
    };
    emulator::Run(grid.x, block.x, 1, 1);
  }
  emulator::grid_y = 0;
  return emulator::failed ? cudaErrorLaunchTimeout : cudaSuccess;
}

}  // extern "C"
