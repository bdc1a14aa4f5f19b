"""Bags of features, checks before training, the LightningModule that trains all members, members on disk."""
