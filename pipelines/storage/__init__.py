"""Files that are not local: object stores that mirror an output root, and source files behind URLs."""
