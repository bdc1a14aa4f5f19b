"""What people read: wording, figures, the page, and the comparison of runs."""
