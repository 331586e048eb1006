"""What clients may send, field by field; the names are OpenAI's and vLLM's."""
