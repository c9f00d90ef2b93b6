"""Everything that a machine with an NVIDIA GPU has to show, in two short calls: `python -m benchmarks.gpu`."""
