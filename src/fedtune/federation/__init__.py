"""Rounds over a Flower Grid: in this process, or in a pool of workers (Flower's simulation engine)."""
