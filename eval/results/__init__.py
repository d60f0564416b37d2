"""What a sweep found, how it is stored, and how it is read back."""
