// The kernels for any processor: whatever the compiler targets unasked (SSE2 on x86-64, NEON on ARM).
#define KERNELS kernels_base
#define KERNELS_NAME "base"
#include "kernels.h"
