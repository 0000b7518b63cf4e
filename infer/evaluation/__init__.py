"""Does a model stay useful at length: sets of questions, made or read, answers, grades."""
