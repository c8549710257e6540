"""OpenAI's HTTP interface over a token stream.

This package knows HTTP, text and tokens. It knows neither Ray nor where tokens come from: the
protocol :class:`service.Service` is its only view of the engines. Every field of a request is
bounded before anything is tokenized, a field that we cannot honour is refused by name, and a client
that leaves cancels its request. Rejected: the OpenAI server of another engine, which would bring
that engine's scheduler with it.
"""
