"""Practice with known truth: a simulated night, what became of it, and the demo."""
