"""Where the states of users live between requests: SQLite on one node, Redis for many."""
