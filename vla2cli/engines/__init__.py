"""Language-model engines: spliced prompts in, token ids out."""
