"""Drop-in layers that train their active neurons only, and converting a model to them."""
