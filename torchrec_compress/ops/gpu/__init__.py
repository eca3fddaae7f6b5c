"""`codebook_bag` on NVIDIA GPUs: CUDA C++ compiled at run time, and Triton. Nothing here is compiled when imported."""
