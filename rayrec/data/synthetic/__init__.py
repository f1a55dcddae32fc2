"""A generated world whose answers are known."""
