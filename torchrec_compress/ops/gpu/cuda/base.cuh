// What all CUDA kernels share. No header is included: NVRTC compiles this text behind a prelude of #defines
// (ops/gpu/program.py), followed by the files of a purpose; the tests compile it for a CPU.

typedef long long int64;
typedef unsigned long long uint64;

constexpr unsigned ALL = 0xffffffffu;  // lanes of a warp

union Bits {
  float value;
  unsigned int bits;
};

__device__ inline int64 smaller(int64 a, int64 b) { return a < b ? a : b; }

// A failed check ends the launch, as a failed assertion in torch's own kernels does.
__device__ inline void check(bool holds, const char* message) {
  if (!holds) __assertfail(message, "torchrec_compress", 0, "torchrec_compress", 1);
}
