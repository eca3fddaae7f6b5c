// Which of the kernels that are compiled once per instruction set serve on this processor.
#pragma once
#if defined(__x86_64__)
#include <cstdlib>
#include <string>

namespace torchrec_compress {
namespace {

template <typename Kernels>
const Kernels& choose(const Kernels& base, const Kernels& avx2, const Kernels& avx512) {
  // torch's own variable, so that one setting holds for torch and for us
  const char* set = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string wanted = set == nullptr ? "" : set;
  if (wanted == "default" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return base;
  if (wanted != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) return avx512;
  return avx2;
}

}  // namespace
}  // namespace torchrec_compress
#endif
