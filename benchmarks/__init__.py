"""Speed measurements, run by hand; ``python -m benchmarks.meta_step``."""
