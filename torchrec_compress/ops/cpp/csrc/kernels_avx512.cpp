// The kernels for x86 processors with AVX-512. As kernels_avx2.cpp, it must not use the standard library.
#if defined(__x86_64__)
#define KERNELS kernels_avx512
#define KERNELS_NAME "avx512"
#include "kernels.h"
#endif
