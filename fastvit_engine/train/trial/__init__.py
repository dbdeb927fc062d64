"""The largest micro-batch that fits, found by trying instead of computing: `train.micro_batch_trial`."""
