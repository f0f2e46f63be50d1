"""What the originals compute, written from their papers and weight names in plain torch: what converters are checked by.

Nothing here knows the converters' maps of names or our models. One sequence at a time, in float64; a weight is made
double only while it is used, and of tables of words only the rows that are needed.
"""
