"""How good and how certain labels are, and whether they are exact."""
