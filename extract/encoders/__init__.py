"""The frozen networks that turn tiles into features: the table, their weights, encoding, LoRA."""
