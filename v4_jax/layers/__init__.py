"""The parts of the model, by the sections of the technical report."""
