"""Other libraries that take B-cos layers for linear ones; `registration` says when each is told."""
