"""tierctl, the packer, the benchmarks."""
