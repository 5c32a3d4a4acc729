"""What other libraries put around models and optimizers."""
