"""Rounds over a Flower Grid: in this process, or on the devices of a fleet (Flower's simulation engine)."""
