"""Formats out: what `volseg export` writes of a run, a module for each group of formats."""
