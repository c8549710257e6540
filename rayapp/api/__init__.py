"""OpenAI's HTTP interface over a token stream.

Knows HTTP, text and tokens; knows neither ray nor where tokens come from: :class:`service.Service`
is the whole of what it asks. Every field of a request is bounded before anything is tokenized, a
field that we cannot honour is refused by name, and a client that leaves cancels its request.
Rejected: the OpenAI server of another engine, which would bring that engine's scheduler with it.
"""
