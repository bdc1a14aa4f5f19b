"""One file for each tool whose feature folders can be read, and the table of them."""
