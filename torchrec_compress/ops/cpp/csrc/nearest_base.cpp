// Nearest centroids on any processor.
#define NEAREST nearest_base
#include "nearest_kernels.h"
