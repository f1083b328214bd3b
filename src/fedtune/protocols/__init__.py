"""Frozen protocol files; read them with `fedtune.config.read_protocol`."""
