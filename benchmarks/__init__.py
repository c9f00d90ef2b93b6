"""Benchmarks: bench_<op>.py, orthogonal_maps.py and gpu.py measure with harness.py; report.py reads the records."""
