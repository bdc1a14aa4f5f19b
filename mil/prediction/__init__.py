"""A trained study on new slides, made like the study's own."""
