"""From a cohort of slides to one feature file each: what is missing, readers, batches, writing."""
