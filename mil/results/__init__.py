"""From predictions to numbers: tables, intervals, the summary, and a finished run folder read back."""
