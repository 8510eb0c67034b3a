"""Benchmarks for `make bench` and developers, in addition to `python -m dlkernels bench`, whose code they use."""
