"""What this machine has: the extension, GPUs, and ways past the dispatcher."""
