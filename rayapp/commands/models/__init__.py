"""Commands that bring models: a real one from the Python index, and the two that rayapp trained."""
