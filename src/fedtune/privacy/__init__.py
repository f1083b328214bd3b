"""What stands between a client's reply and the global model."""
