"""The mathematics, free of models: per operation a slow `reference.py` and the backends that must equal it."""
