"""The two ends of a language model with many words: adaptive input and adaptive softmax."""
