"""Raw files to the prepared dataset, and the dataset's readers."""
