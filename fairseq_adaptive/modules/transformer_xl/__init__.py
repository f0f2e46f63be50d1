"""Transformer-XL: what its blocks need of a stack."""
