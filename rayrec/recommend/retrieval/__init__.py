"""What retrievers look up: sessions, rules, play counts and groups of songs, as flat arrays that merge and map."""
