"""Storage of artifacts: workspace, object storage, manifests, locking and releases."""
