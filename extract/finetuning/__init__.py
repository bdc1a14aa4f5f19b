"""From labelled tiles to an adapter: tile sets, augmentation, probe, tuning, report."""
