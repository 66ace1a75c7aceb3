"""What the bytes of a FITS file mean.

``header`` finds the HDUs, ``inherit`` adds the primary header's cards, ``plain``, ``tiles`` and ``gunzip`` read pixels,
``scaling`` makes values of stored numbers and has the rule for masks.
"""
