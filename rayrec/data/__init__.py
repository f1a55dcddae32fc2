"""The data set of a workspace: schemas, histories as flat arrays, windows, catalog, splits, and generated plays."""
