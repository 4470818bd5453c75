"""Routes, one file a noun; each translates a request to one call of the registry."""
