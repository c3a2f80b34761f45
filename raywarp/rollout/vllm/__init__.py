"""vLLM as the engine of a rollout worker, and what it takes to run the trainer's policies in it."""
