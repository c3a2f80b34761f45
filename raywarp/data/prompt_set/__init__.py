"""How rows of datasets become prompts: rendered, tokenised, split and kept in arrow files."""
