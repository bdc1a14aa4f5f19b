"""What all pages that people read share: colours, style, script, and what makes them readable by everybody."""
