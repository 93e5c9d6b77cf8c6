"""The contracts every stage obeys, and the data stages: LAION subset, image download, WebDataset shards."""
