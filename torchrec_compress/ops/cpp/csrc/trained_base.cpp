// Trained rows on any processor.
#define TRAINED trained_base
#include "trained_kernels.h"
