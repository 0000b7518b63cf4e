"""Continuous batching: the scheduler, its compiled programs, sampling, guides and drafts."""
