"""On-policy training: prompts, who answers them, what an answer is worth, and the rows that it becomes."""
