"""Torch's own layers, right inside ``torch.func`` transforms."""
