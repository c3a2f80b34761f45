"""The configuration: schema, field types, tuned keys and searches, secrets, and the docs page."""
