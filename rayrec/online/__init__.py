"""A user's state between requests, and the stores that hold it. No HTTP, no Ray."""
