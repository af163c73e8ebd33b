"""The LLM: prompts, requests, and the engine or server that runs them."""
