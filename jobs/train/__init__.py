"""Training: the driver (`run`), the worker, DeepSpeed around the model, checkpoints, and the progress line."""
