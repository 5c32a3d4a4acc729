"""What is measured of each neuron, and on which samples."""
