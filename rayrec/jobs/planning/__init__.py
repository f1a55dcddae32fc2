"""What a data set will take on a cluster: memory, disk, storage and hours."""
