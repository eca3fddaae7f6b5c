// Runs CUDA kernels on a CPU, one block after another, so that the very text that NVRTC compiles is tested for its
// values without a GPU. Every thread of a block is a fibre that runs until it waits: for its block at __syncthreads,
// for its warp at __syncwarp and shuffles. A forgotten barrier shows, because fibres may run in reverse order as well
// and shared memory starts as NaN; shared memory written behind its end is an error.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct Dim3 {
  unsigned x, y, z;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

static Dim3 threadIdx, blockIdx, blockDim, gridDim;
alignas(128) unsigned char arena[256 * 1024 + 128];

namespace emulator {

enum State { READY, WAITS_FOR_BLOCK, WAITS_FOR_WARP, DONE };

struct Fibre {
  ucontext_t context;
  State state = READY;
  std::vector<char> stack = std::vector<char>(64 * 1024);
};

static ucontext_t scheduler;
static std::vector<Fibre> fibres;
static unsigned current;
static std::string failure;
static void (*body)();
alignas(16) static unsigned char slots[1024][16];  // what a lane shows to its warp

inline void wait(State state) {
  fibres[current].state = state;
  const unsigned self = current;
  swapcontext(&fibres[self].context, &scheduler);
}

inline void enter() {
  try {
    body();
  } catch (const std::runtime_error& error) {
    failure = error.what();
  }
  fibres[current].state = DONE;
}

// Lets a group go on once all of it that is still running waits for the same thing. A lane that has ended while its warp
// waits is an error, though not on every GPU.
inline bool release(unsigned begin, unsigned end, State state) {
  bool any = false, all = true;
  for (unsigned i = begin; i < end; ++i) {
    if (fibres[i].state != state && fibres[i].state != DONE) return false;
    any = any || fibres[i].state == state;
    all = all && fibres[i].state == state;
  }
  if (any && !all && state == WAITS_FOR_WARP) failure = "threads of a warp wait for one that has ended";
  for (unsigned i = begin; any && i < end; ++i)
    if (fibres[i].state == state) fibres[i].state = READY;
  return any;
}

inline void run_block(bool reverse) {
  const unsigned count = blockDim.x;
  for (unsigned i = 0; i < count; ++i) {
    Fibre& fibre = fibres[i];
    fibre.state = READY;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = fibre.stack.size();
    fibre.context.uc_link = &scheduler;
    makecontext(&fibre.context, enter, 0);
  }
  // a warp goes on as far as it can before the next one starts
  const unsigned warps = (count + 31) / 32;
  while (failure.empty()) {
    bool moved = false;
    for (unsigned turn = 0; turn < warps; ++turn) {
      const unsigned begin = (reverse ? warps - 1 - turn : turn) * 32, end = std::min(begin + 32, count);
      do {
        for (unsigned step = begin; step < end && failure.empty(); ++step) {
          current = reverse ? begin + end - 1 - step : step;
          if (fibres[current].state != READY) continue;
          moved = true;
          threadIdx = {current, 0, 0};
          swapcontext(&scheduler, &fibres[current].context);
        }
      } while (failure.empty() && release(begin, end, WAITS_FOR_WARP));
    }
    moved = release(0, count, WAITS_FOR_BLOCK) || moved;
    if (moved) continue;
    for (const Fibre& fibre : fibres)
      if (fibre.state != DONE) failure = "threads of a block wait for each other";
    return;
  }
}

template <typename... Arguments>
struct Call {
  static inline void (*kernel)(Arguments...);
  static inline void** given;

  template <size_t... I>
  static void call(std::index_sequence<I...>) {
    kernel(*static_cast<std::decay_t<Arguments>*>(given[I])...);
  }
  static void run() { call(std::index_sequence_for<Arguments...>()); }
};

template <typename... Arguments>
const char* launch(void (*kernel)(Arguments...), const unsigned* grid, unsigned threads, unsigned shared, bool reverse,
                   void** arguments) {
  Call<Arguments...>::kernel = kernel;
  Call<Arguments...>::given = arguments;
  body = Call<Arguments...>::run;
  failure.clear();
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {threads, 1, 1};
  fibres.resize(std::max<size_t>(fibres.size(), threads));
  for (unsigned block = 0; block < grid[0] * grid[1] * grid[2] && failure.empty(); ++block) {
    blockIdx = {block % grid[0], block / grid[0] % grid[1], block / grid[0] / grid[1]};
    for (Fibre& fibre : fibres) fibre.state = DONE;
    std::memset(arena, 0xff, sizeof arena);
    run_block(reverse);
    for (unsigned i = shared; failure.empty() && i < sizeof arena; ++i)
      if (arena[i] != 0xff) failure = "a block wrote behind the end of its shared memory";
  }
  return failure.c_str();
}

// Every lane shows `value` and reads what lane `source` shows.
template <typename Value>
Value exchange(Value value, unsigned source) {
  const unsigned self = current, warp = self / 32 * 32;
  std::memcpy(slots[self], &value, sizeof value);
  wait(WAITS_FOR_WARP);
  Value found;
  std::memcpy(&found, slots[warp + source % 32], sizeof found);
  wait(WAITS_FOR_WARP);
  return found;
}

}  // namespace emulator

inline float half_value(unsigned short bits) {
  _Float16 value;
  std::memcpy(&value, &bits, sizeof bits);
  return float(value);
}

inline unsigned short half_bits(float value) {
  const _Float16 half = _Float16(value);
  unsigned short bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

inline void __syncthreads() { emulator::wait(emulator::WAITS_FOR_BLOCK); }
inline void __syncwarp() { emulator::wait(emulator::WAITS_FOR_WARP); }

template <typename Value>
Value __shfl_sync(unsigned, Value value, int source) {
  return emulator::exchange(value, unsigned(source));
}

template <typename Value>
Value __shfl_up_sync(unsigned, Value value, unsigned step) {
  const unsigned lane = emulator::current % 32;
  return emulator::exchange(value, lane >= step ? lane - step : lane);
}

template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
  return emulator::exchange(value, emulator::current % 32 ^ unsigned(mask));
}

// Fibres take turns only where they wait, so a read and a write are one.
template <typename Value>
Value atomicMin(Value* address, Value value) {
  const Value before = *address;
  *address = std::min(before, value);
  return before;
}

inline void __assertfail(const char* message, const char*, unsigned, const char*, size_t) {
  throw std::runtime_error(message);
}
