"""The network as a function from tiles to probabilities."""
