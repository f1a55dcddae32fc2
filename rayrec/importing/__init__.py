"""From files in outside formats to the canonical data set. No Ray."""
