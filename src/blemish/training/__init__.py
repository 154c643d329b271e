"""Training by gradient: objectives, the Lightning task, callbacks."""
