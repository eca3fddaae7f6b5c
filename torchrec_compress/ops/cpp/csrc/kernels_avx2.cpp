// The kernels for x86 processors with AVX2 and FMA: this file alone is compiled with -mavx2 -mfma. It must not use the
// standard library: the linker could then keep the AVX2 copy of a shared inline function for everybody.
#if defined(__x86_64__)
#define KERNELS kernels_avx2
#define KERNELS_NAME "avx2"
#include "kernels.h"
#endif
