"""Between users and the engine core: prompts to checked requests, tokens to text."""
