"""Everything read from or written to disk and the hub, with errors that name the file."""
