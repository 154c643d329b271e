"""Two images, and where they differ: what is done to both, how they are compared, what counts as different."""
