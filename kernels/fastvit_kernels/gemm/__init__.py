"""Matrix products with fused prologues and epilogues, in cuBLAS or Triton, used by the half-blocks."""
