"""Base models: the zoo, loading, the packed forward pass, adapters, and what a run will need."""
