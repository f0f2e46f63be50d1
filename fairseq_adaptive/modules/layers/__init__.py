"""fairseq's layers made to serve several depths, and what they are made of."""
