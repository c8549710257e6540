"""Methods of visual pruning side by side: answers and likelihoods by how many tokens are kept.

Invariant: every method answers the same questions about the same images, through the serving path;
only the tokens that it keeps differ.
"""
