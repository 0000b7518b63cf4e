"""The end of an attention sublayer: partial softmaxes merged, turned back, and projected twice."""
