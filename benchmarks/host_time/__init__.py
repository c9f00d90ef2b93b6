"""Triton's host path without a GPU: a stub of libcuda, and the driver of Triton made to believe in an H100."""
