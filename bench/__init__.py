"""Benchmarks. The commands are the modules in this folder, what they share is in lib/."""
