"""A user's state between requests, and the stores that hold it. The package uses neither HTTP nor Ray."""
