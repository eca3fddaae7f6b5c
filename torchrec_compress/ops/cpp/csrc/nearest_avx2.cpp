// Nearest centroids on x86 processors with AVX2. As kernels_avx2.cpp, it must not use the standard library.
#if defined(__x86_64__)
#define NEAREST nearest_avx2
#include "nearest_kernels.h"
#endif
