"""Text: tokenizer, incremental detokenizer, stop strings and chat templates. No JAX in here."""
