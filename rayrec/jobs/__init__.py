"""Each stage as a job on Ray, one thin file a stage. Ray is imported here and in serving alone."""
