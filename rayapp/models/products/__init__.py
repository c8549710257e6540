"""Products with weights as served stages multiply: packed, and joined where they can be.

A weight has one form at a time: a plain tensor, or packed for oneDNN (:mod:`.packed`). Layers that
read the same input may share one weight (:mod:`.joined`). :mod:`.stages` brings the weights of the
stages of a plan into these forms at load, so that no second copy of them stays.
"""
