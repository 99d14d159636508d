"""Benchmarks of second-order optimizers: ``python -m benchmarks --help``.

This package is not part of the installed library. It needs the ``bench`` extra.
"""
