"""GPUs: NVML, and clocks that are given back whatever happens."""
