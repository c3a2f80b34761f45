"""The configuration: its schema and field types, tuned keys and searches, secrets, and its
reference for the docs.
"""
