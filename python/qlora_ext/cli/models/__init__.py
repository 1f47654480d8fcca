"""The models that a command names: found, checked, loaded in 4 bits, and the adapters that belong to them."""
