"""What `import mil` offers: studies, run folders, features, a scikit-learn estimator and single aggregators."""
