"""Training of policies: a run's session, its actors, fine-tuning, evaluation and timing."""
