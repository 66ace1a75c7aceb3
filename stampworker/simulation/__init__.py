"""Practice with known truth.

``night`` writes frames, alerts and truth of a survey night, from ``sky`` and ``candidates``; ``confusion`` compares
results with the truth; ``demo`` runs all of it through the worker.
"""
