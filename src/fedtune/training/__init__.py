"""Local work of one client: which rows, which learning rate, which steps."""
