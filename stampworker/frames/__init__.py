"""FITS frames, read by the section.

A `FrameStore` opens a frame by its URL, keeps a bounded number of frames open, and reads only what is sliced::

    Remote  ->  Source  ->  Pixels  ->  Frame  ->  Regridded
    ranges      bytes       numbers     plane      plane on the science frame's grid

========================================================  =================================
Question                                                  Module
========================================================  =================================
Which frames are open, and may this one be read?          ``store``
What is a frame?                                          ``frame``
How does a plane get onto the science frame's grid?       ``regrid``
Which WCS is usable, and where is a sky position on it?   ``wcs``
What does a URL name, and how is it shown?                ``urls``
How much may one alert cost?                              ``limits``
Which decoded data are kept in memory?                    ``cache``
Which keywords belong to a WCS, which to the storage?     ``stampworker.cutouts.keywords``
Where are the HDUs, and what do their headers say?        ``fits.header``, ``fits.inherit``
How do stored numbers become pixels, and what is a mask?  ``fits.scaling``
How is an image stored: plain, tiles, gzip?               ``fits.plain``, ``.tiles``, ``.gunzip``
What is a section?                                        ``fits.section``
How are local files read, and beneath which folders?      ``io.local``, ``io.sources``
How does an HTTP range request work?                      ``io.http``
Which addresses are connected to, and how long?           ``io.connections``
How are buckets and fsspec's memory read?                 ``io.buckets``, ``io.memory``
Which ranges of a remote file are fetched and kept?       ``io.ranges``
Which failures are remembered, and for how long?          ``io.failures``
========================================================  =================================
"""

from stampworker.frames.frame import Frame
from stampworker.frames.regrid import PlaneKind, Regridded, on_grid
from stampworker.frames.store import FrameKey, FrameStore
from stampworker.frames.wcs import celestial_frame, sky_to_pixel

__all__ = ["Frame", "FrameKey", "FrameStore", "PlaneKind", "Regridded", "celestial_frame", "on_grid", "sky_to_pixel"]
