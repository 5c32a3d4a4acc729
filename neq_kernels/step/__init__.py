"""The optimizer's step on the active rows."""
