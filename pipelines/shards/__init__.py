"""Stage `shards`: WebDataset tar files, their index, their reader, and a linter for any folder of them."""
