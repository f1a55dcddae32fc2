"""The stages as jobs on Ray, one file per stage. Only `jobs`, `serving` and `bench` import Ray."""
