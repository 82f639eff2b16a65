"""Volumes, tables and pictures in and out: the only folder that imports zarr, tifffile and fsspec."""
