"""The page of a run or a sweep: what it shows, from a folder's files, and the one HTML file."""
