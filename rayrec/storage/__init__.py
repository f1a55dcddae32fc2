"""Where artifacts live: workspace, object storage, manifests, locking and releases."""
