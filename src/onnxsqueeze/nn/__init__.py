"""PyTorch parts that stages share: families, checkpoints, batches, losses, the training loop, masks."""
