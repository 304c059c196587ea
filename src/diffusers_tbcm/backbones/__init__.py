"""Networks by family: what is the family's own, in one file each."""
