"""From an exported file to a detector, without PyTorch: what runs the tiles, and what the file says of the rest."""
