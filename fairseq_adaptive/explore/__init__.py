"""A page on which a person types a text and sees what a model makes of it, and what it spends: ``fairseq-adaptive explore``."""
