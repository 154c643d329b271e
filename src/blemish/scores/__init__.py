"""From a model and a batch of tiles to score tiles: (model, (B, C, H, W) in [0, 1]) -> (B, 1, H, W) >= 0."""
