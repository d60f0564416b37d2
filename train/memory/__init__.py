"""The memory of one update, predicted part by part before anything is loaded."""
