"""`codebook_bag` on CPUs: C++ kernels, compiled at first use. Nothing here is compiled when imported."""
