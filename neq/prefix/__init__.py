"""Freezing a network from the input up: where it can be cut, and what a frozen prefix does."""
