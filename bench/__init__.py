"""Benchmarks. The scripts to run: backward_speed.py and overhead.py."""
