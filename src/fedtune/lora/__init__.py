"""Adapter states and their algebra."""
