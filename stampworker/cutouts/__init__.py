"""Cutouts: crop, write, load, adjust and downscale."""
