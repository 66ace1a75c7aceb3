"""Packets for the eye: pictures and text."""
