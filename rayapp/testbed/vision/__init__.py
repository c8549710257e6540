"""A small LLaVA that answers questions about cluttered scenes, and the recipe that trains it.

A picture is 576 visual tokens, of which a thing covers some ten, so a few tokens chosen blindly
miss the evidence. Half of the question types name the thing that they ask about, half do not;
models with and without word targets show the effect of the likeness of pictures and words.

Invariant: in training every layer runs, and every visual token of every thing is present
(background may go missing, see the recipe); scenes of one split appear in no other. The
alternative, natural pictures and a pretrained tower, was rejected: neither fits into a few
megabytes, nor can its evidence be known.
"""
