"""Reading in pieces: a document longer than the window, read a part at a time."""
