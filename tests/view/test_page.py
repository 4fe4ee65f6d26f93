"""The page as one file, and in a real browser."""
