"""The exact watershed: arrays in, arrays out, for any cutting into blocks."""
