"""The similarity of neurons' outputs."""
