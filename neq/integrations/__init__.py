"""Other libraries that train models."""
