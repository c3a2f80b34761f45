"""Files that outlive a process: sealed folders, folders and buckets, locks and scratch folders.

A bucket has a local mirror.
"""
