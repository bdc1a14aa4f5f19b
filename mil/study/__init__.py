"""Who trains on what: members and roles, folds, sites, nested cross-validation, learning curve."""
