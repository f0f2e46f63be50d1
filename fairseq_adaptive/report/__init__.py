"""What a model spent, and where."""
