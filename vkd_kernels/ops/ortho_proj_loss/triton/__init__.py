"""The fused loss on a GPU: tiles.py (sizes), kernels.py (Triton), launch.py (operators and launches)."""
