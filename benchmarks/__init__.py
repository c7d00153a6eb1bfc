"""Speed and memory beside what a researcher would otherwise use: `python -m benchmarks [NAME ...] [--quick]`."""
