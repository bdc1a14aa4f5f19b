"""A first look at a folder of features and a cohort's tables, and the config that follows from it."""
