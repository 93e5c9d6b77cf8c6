"""Cost estimates: what each stage of a profile will read, write and take, with the source of every figure."""
