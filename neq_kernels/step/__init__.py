"""Optimizers' steps on the active rows."""
