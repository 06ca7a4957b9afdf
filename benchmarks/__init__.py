"""Benchmarks of fusednorm against the stock layers: see README.md in this folder."""
