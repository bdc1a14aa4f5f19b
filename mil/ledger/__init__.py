"""What has a published or independent reference, run again and laid beside it."""
