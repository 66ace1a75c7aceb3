"""What the bytes of a FITS file mean."""
