"""Weight gradients of the active rows."""
