"""What a run reads: prompts, preferences, texts, a model's files, embedded models and ratings."""
