"""What records mean: alerts in, packets out, their schemas, and tables of candidates."""
