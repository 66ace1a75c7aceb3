"""Stream worker for real-time astronomical alerts."""
