"""Results as tables, files, plots and one HTML page."""
