"""Exact masks of any N:M pattern: vector kernels compiled by numba, and the same on a GPU by Triton.

Read in this order: `simd` (a small vector language), `network` (selecting two ranks), `tile` (what is done to 32
blocks at once), `transposable` (the solver for any N:M), `paths` (the blocks it leaves), `two_four` and `rowwise`
(the easier patterns), `cpu` (tensors in, masks out, threads); `cuda` and `cuda_*` are the same on a GPU.
"""
