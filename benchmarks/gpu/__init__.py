"""Everything that a machine with an NVIDIA GPU has to show, in three short calls: `python -m benchmarks.gpu`."""
