"""The engine for any server that speaks OpenAI's completions API."""
