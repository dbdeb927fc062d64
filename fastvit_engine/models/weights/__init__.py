"""Weights of models in files: reading and writing them, whatever the layout."""
