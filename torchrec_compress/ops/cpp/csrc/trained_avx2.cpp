// Trained rows on x86 processors with AVX2 and FMA. As kernels_avx2.cpp, it must not use the standard library.
#if defined(__x86_64__)
#define TRAINED trained_avx2
#include "trained_kernels.h"
#endif
