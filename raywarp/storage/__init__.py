"""Files that outlive a process: sealed folders, a location (a folder or a bucket), its local
mirror, locks, scratch folders.
"""
