"""This machine: the compiled extension, GPUs, names, ranks, and a way past the dispatcher."""
