"""A detector built before training once left the model in evaluation mode, and normalisation never learned."""

import torch


def test_every_training_step_updates_batch_normalisation(tiny_run):
    content = torch.load(tiny_run / "detector.pt", weights_only=True)
    steps = content["about"]["overrides"]
    expected = next(int(word.partition("=")[2]) for word in steps if word.startswith("training.steps="))
    counted = [value.item() for key, value in content["state_dict"].items() if key.endswith("num_batches_tracked")]
    assert counted
    assert 0 < min(counted) == max(counted) <= expected  # the best epoch, not always the last
