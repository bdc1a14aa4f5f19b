"""What a prediction is scored by."""
