"""OpenAI's API: bodies and answers, over HTTP and in batch files."""
