"""Malformed inputs, each made by code, and what the one line about it must say."""
