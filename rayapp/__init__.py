"""A language model pruned per inference stage, with prefill and decode served apart on Ray.

The one artifact is a plan (:mod:`rayapp.plan`): searched by :mod:`rayapp.pruning`, realised by
:mod:`rayapp.models`, executed by :mod:`rayapp.engine`, served by :mod:`rayapp.distributed`.
"""

__version__ = "0.1.0"
