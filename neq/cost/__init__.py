"""What a training step costs, by layer."""
