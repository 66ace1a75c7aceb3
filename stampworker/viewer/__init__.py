"""Packets for the eye: ``picture`` draws their stamps and writes their fields as text."""
