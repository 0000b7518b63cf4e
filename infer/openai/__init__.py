"""OpenAI's API: bodies and answers, over HTTP and in job files."""
