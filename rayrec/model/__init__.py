"""The recurrent network that turns a history into taste vectors, its training and its inference."""
