"""How alike the outputs of neurons are."""
