"""What a study predicts: the columns it needs, the outputs of a member, what a prediction means and is scored by.

The contract is in `contract`, the table in `table`; what of a task needs torch is in `mil.training.objectives`.
"""
