"""Transformer-XL: relative attention, blocks, layouts and the blocks of a supernet, memory, and segments on a stack."""
