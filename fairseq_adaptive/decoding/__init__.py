"""Beam search, and one step of a decoder."""
