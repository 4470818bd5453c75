"""Content-addressed blobs; layout.py draws the disk."""
