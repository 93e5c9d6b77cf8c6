"""Stage `shards`: WebDataset tar files, their indexes and reader, and a linter for any folder of them."""
