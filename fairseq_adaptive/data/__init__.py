"""What fairseq's datasets do not cover."""
