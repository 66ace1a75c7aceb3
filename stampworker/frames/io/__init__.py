"""Where bytes come from.

``sources`` (mapped files, bytes in memory), ``local`` (folders), ``http`` (range requests) over ``connections``,
``buckets``, ``memory``; ``ranges`` says which bytes of a remote file are fetched, ``failures`` what is not asked again.
"""
