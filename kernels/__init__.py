"""Triton kernels that compute with a compiled linear's stored bytes.  Importing ``kernels.launch`` imports Triton."""
