"""What a run reads: prompts, preferences, texts, a model's files, and the embedded models and
ratings.
"""
