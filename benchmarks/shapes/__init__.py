"""Models of known sizes with random weights: speed does not depend on training."""
