"""Anthropic's Messages API beside OpenAI's: bodies and answers in its form."""
