"""Rounds over a Flower Grid: in this process, in Flower's simulation, or on a real federation."""
