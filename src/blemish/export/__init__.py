"""From a trained detector to one file that predicts without PyTorch, compared with it before anyone may use it."""
