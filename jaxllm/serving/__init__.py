"""The OpenAI-compatible server: a guest of `AsyncLLM`."""
