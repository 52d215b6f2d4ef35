"""Task families: each samples batches of tasks as plain tensors and scores predictions."""
