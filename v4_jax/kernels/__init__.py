"""The forms of the model's inner loops: a plain one each, those that one platform needs, and which runs where."""
