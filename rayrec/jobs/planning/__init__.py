"""Plans what a data set needs on a cluster: memory, disk, storage and hours."""
